"""MA-LMM's memory in InstructBLIP and BLIP-2 of transformers: where the answer is the host's own, and streams."""

import json

import pytest
import torch

from pyvidx import memory

transformers = pytest.importorskip("transformers", reason="pip install 'pyvidx[hosts]'")

from pyvidx.hosts import compress  # noqa: E402
from pyvidx.hosts.instructblip import InstructBLIP  # noqa: E402
from pyvidx.hosts.settings import preset_of  # noqa: E402
from pyvidx.models import MALMM  # noqa: E402
from pyvidx.models.language import Language  # noqa: E402
from pyvidx.preprocess import preprocess  # noqa: E402
from tests.test_language import causal_lm  # noqa: E402
from tests.tiny_hosts import blip, tokenizer  # noqa: E402

ASK, OTHER = "what is the person doing ?", "color of cup ?"
GREEDY = {"num_beams": 1, "do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5}
HOSTS = [("instructblipvideo", "opt"), ("instructblip", "llama"), ("blip-2", "opt"), ("instructblip", "t5")]


def built(kind, language):
    theirs = blip(kind, language)
    return theirs, InstructBLIP.of(theirs, tokenizer(["<video>"]), tokenizer(bos=False))


@pytest.fixture(scope="module")
def video():
    return built("instructblipvideo", "opt")


@pytest.fixture(scope="module")
def frames():
    return torch.randint(0, 256, (9, 30, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def processed(host, frames, n, *, blip2=False):
    """What the host's processor makes, with n placeholders."""
    ids = torch.tensor([[3] * n + host.language.tokenizer(ASK)["input_ids"]])
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": preprocess(frames, host.preset)}
    text = tokenizer(bos=False)(ASK, return_tensors="pt", return_token_type_ids=False)
    return found if blip2 else found | {f"qformer_{name}": x for name, x in text.items()}


@pytest.mark.parametrize("kind, language", HOSTS)
@torch.no_grad()
def test_one_frame_is_the_hosts_own_answer(kind, language, frames):
    """With any memory; in its own generate, which but for BLIP-2 counts the prompt's words, and in ours."""
    theirs, host = built(kind, language)
    inputs = processed(host, frames[:1], 8, blip2=kind == "blip-2")
    if kind == "instructblipvideo":
        inputs["pixel_values"] = inputs["pixel_values"][None]
    begin = 0 if language == "t5" else inputs["input_ids"].shape[1]
    penalty = {} if kind == "blip-2" else {"repetition_penalty": 1.5, "suppress_tokens": [3]}
    want, penalized = (theirs.generate(**inputs, **GREEDY, **options)[:, begin:] for options in ({}, penalty))
    assert kind == "blip-2" or not torch.equal(want, penalized)
    for capacity in (0, 3):
        found = theirs.generate(**host.inputs(inputs, capacity=capacity), **GREEDY, **penalty)
        assert torch.equal(found[:, 0 if kind == "blip-2" else begin :], penalized)
        said = host.answer(frames[:1], ASK, capacity=capacity, repetition_penalty=1.0, **GREEDY)
        assert said == host.language.tokenizer.decode(want[0], skip_special_tokens=True).strip()


@pytest.mark.parametrize("T", [4, 7])
@torch.no_grad()
def test_without_memory_it_is_the_hosts_own_at_any_length(video, frames, T):
    theirs, host = video
    inputs = processed(host, frames[:T], 8 * T)
    inputs["pixel_values"] = inputs["pixel_values"][None]
    want, ids = theirs(**inputs).logits, theirs.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    torch.testing.assert_close(theirs(**host.inputs(inputs, capacity=0)).logits, want, atol=1e-5, rtol=1e-5)
    said = host.answer(frames[:T], ASK, capacity=0, repetition_penalty=1.0, **GREEDY)
    assert said == host.language.tokenizer.decode(ids, skip_special_tokens=True).strip()


@torch.no_grad()
def test_any_number_of_frames_is_as_many_tokens(video, frames):
    """The processor's placeholders for 4 frames become those of MA-LMM; labels go along; padded batches."""
    theirs, host = video
    one = processed(host, frames, 32)
    two = {k: torch.cat([x, x]) for k, x in one.items()}
    two["pixel_values"] = two["pixel_values"].view(2, 9, 3, 28, 28)
    two["labels"] = two["input_ids"].clone()
    two["attention_mask"][1, 32:34] = 0
    made = host.inputs(two, capacity=3)
    L = one["input_ids"].shape[1] - 24
    assert made["inputs_embeds"].shape == (2, L, 32) and made["attention_mask"].shape == made["labels"].shape == (2, L)
    assert made["labels"][0, :8].eq(-100).all() and torch.equal(made["labels"][0, 8:], one["input_ids"][0, 32:])
    assert made["attention_mask"][1, 8:10].eq(0).all()
    alone = theirs(**host.inputs(one | {"pixel_values": one["pixel_values"][None]}, capacity=3)).logits
    torch.testing.assert_close(theirs(**made).logits[:1], alone, atol=1e-5, rtol=1e-5)


def test_streams(video, frames):
    """Frame by frame is all at once; a fork goes its own way; slots hold what a bank of their own says."""
    _, host = video
    options = GREEDY | {"repetition_penalty": 1.0}
    session = host.session([ASK, OTHER], capacity=3)
    policy = memory.create("merge", capacity=3)
    bank, twin = policy.new(1, 5, 48), None
    for i, frame in enumerate(frames):
        session.push(frame[None], [i / 2])
        (features,) = session.encode(preprocess(frame[None], host.preset))
        bank = policy.append(bank, features[None], torch.tensor([i / 2]))
        entries = bank.entries()
        assert torch.equal(session.held.sizes.T, entries.sizes[0])
        assert torch.equal(session.held.first.T, entries.first[0]) and torch.equal(session.held.last.T, entries.last[0])
        twin = session.fork() if i == 4 else twin if i > 4 else None
    assert session.ask(OTHER, **options) == host.answer(frames, OTHER, capacity=3, **options)
    assert session.frames == 9 and twin.frames == 5
    assert twin.ask(ASK, **options) == host.answer(frames[:5], ASK, capacity=3, **options)


def test_questions_that_come_later(video, frames):
    """With the visual bank alone, or where the Q-Former reads no text."""
    _, host = video
    for each, options in ((host, {"query": False}), (built("blip-2", "llama")[1], {})):
        session = each.session(capacity=3, **options)
        session.push(frames)
        for question in (ASK, OTHER):
            assert session.ask(question, **GREEDY) == each.answer(frames, question, capacity=3, **options, **GREEDY)


def test_a_folder_of_transformers(video, frames, tmp_path):
    pytest.importorskip("torchvision", reason="pip install 'pyvidx[hosts]'")
    theirs, host = video
    theirs.save_pretrained(tmp_path)
    processor = transformers.InstructBlipVideoProcessor(
        transformers.InstructBlipVideoVideoProcessor(size={"height": 28, "width": 28}), tokenizer(["<video>"]),
        tokenizer(bos=False), num_query_tokens=8,
    )  # fmt: skip
    processor.save_pretrained(tmp_path)
    again = InstructBLIP.from_pretrained(tmp_path)
    assert again.preset == host.preset and preset_of(tmp_path).filter == "pillow"
    assert again.answer(frames, ASK, capacity=3, **GREEDY) == host.answer(frames, ASK, capacity=3, **GREEDY)
    inputs = processor(images=[list(frames.numpy())], text=ASK, return_tensors="pt")
    assert len(again.inputs(inputs)["inputs_embeds"][0]) == inputs["input_ids"].shape[1] - 32 + 8
    # torchvision's filter rounds once where Pillow's rounds twice: a level of 255 / std
    torch.testing.assert_close(inputs["pixel_values"][0], preprocess(frames, again.preset), atol=0.04, rtol=0)
    # frames alone, as of an image processor, and keys that nobody reads
    alone = inputs | {"pixel_values": inputs["pixel_values"][0], "notes": ["x"], "labels": None}
    found = again.inputs(alone)
    assert found.pop("notes") == ["x"]
    assert torch.equal(theirs.generate(**found, **GREEDY), theirs.generate(**again.inputs(inputs), **GREEDY))
    told = json.loads((tmp_path / "processor_config.json").read_text())
    for changes in ({"size": {"shortest_edge": 28}}, {"do_normalize": False}):
        (tmp_path / "processor_config.json").write_text(
            json.dumps(told | {"video_processor": told["video_processor"] | changes})
        )
        with pytest.raises(ValueError, match="must squash frames to a square and normalize"):
            preset_of(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no .*config.json"):
        InstructBLIP.from_pretrained(tmp_path / "qformer_tokenizer")


@pytest.mark.parametrize("policy", [memory.create("fifo", capacity=3), memory.create("dtd")])
def test_any_policy_behind_the_q_former(video, frames, policy):
    """As pyvidx.hosts.compress does it in the host's own model; several questions, each of its own tokens."""
    theirs, host = video
    inputs = processed(host, frames, 32)
    inputs["pixel_values"] = inputs["pixel_values"][None]
    small = compress(theirs, inputs, policy)
    ids = theirs.generate(**small, **GREEDY)[0, small["input_ids"].shape[1] :]
    options = GREEDY | {"repetition_penalty": 1.0}
    session = host.session([OTHER, ASK], policy=policy)
    session.push(frames[:4]), session.push(frames[4:])
    assert session.ask(ASK, **options) == host.language.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert session.ask(OTHER, **options) == host.answer(frames, OTHER, policy=policy, **options)
    assert policy.name != "fifo" or session.slots() == [(6.0, 6.0), (7.0, 7.0), (8.0, 8.0)]


def test_our_own_model():
    """A MALMM with a temporal table, and a language model: as MALMM.generate, also beyond the table."""
    model = MALMM.default(compat="paper")
    torch.nn.init.normal_(model.time)
    host = InstructBLIP(model, Language(causal_lm(), tokenizer(), tokenizer(bos=False)))
    frames = torch.randint(0, 256, (20, 42, 42, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for T in (5, 20):
        pixels = preprocess(frames[:T], host.preset)[None]
        want = model.generate(pixels, [ASK], host.language, memory={"length": 3}, **GREEDY)
        assert [host.answer(frames[:T], ASK, capacity=3, **GREEDY)] == want


def test_errors(video, frames):
    theirs, host = video
    inputs = processed(host, frames, 32)
    for wrong, message in (
        (lambda: host.session(), "needs its questions; with query=False"),
        (lambda: host.session(ASK, capacity=-1), "capacity must be whole and at least 0"),
        (lambda: host.session(ASK).ask(), "needs a frame"),
        (lambda: host.session([ASK, OTHER]).ask(), "needs a question"),
        (lambda: host.session(ASK).push(frames, [0.0]), "seconds must be one per frame, 9"),
        (lambda: host.inputs({"input_ids": inputs["input_ids"]}), "must have input_ids and pixel_values"),
        (lambda: host.inputs(inputs | {"qformer_input_ids": None}), "must have qformer_input_ids"),
        (lambda: host.inputs(inputs | {"input_ids": inputs["input_ids"].clamp(min=4)}), "one block of placeholders"),
        (lambda: host.inputs(inputs | {"input_ids": inputs["input_ids"].flip(1).roll(5)}), "one block of placeholders"),
        (lambda: host.inputs(inputs | {"input_ids": inputs["input_ids"].tolist()}), "must be a tensor.* got list"),
        (lambda: host.session(ASK).push(frames, chunk=0), "chunk must be a whole number"),
        (lambda: host.inputs(inputs | {"pixel_values": torch.zeros(2, 1, 3, 28, 28)}), "videos of 1 prompts"),
        (lambda: InstructBLIP.of(theirs.language_model, tokenizer()), "host must be one of Blip2For"),
        (lambda: InstructBLIP.of(theirs, tokenizer()), "language must have a text_tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    session = host.session(ASK)
    session.push(frames[:1], 3.0)
    for seconds in ([2.0, 4.0], [5.0, 4.0], [4.0, float("nan")], ["x", "y"]):
        with pytest.raises(ValueError, match="seconds must be"):
            session.push(frames[:2], seconds)
    assert session.frames == 1
    with pytest.raises(ValueError, match="must be one of the session's"):
        session.ask(OTHER)
    _, t5 = built("instructblip", "t5")
    with pytest.raises(ValueError, match="loss needs a decoder alone"):
        t5.language.loss(torch.zeros(1, 8, 32), [ASK], ["red"])
