"""Sessions against compress of the same frames at once, with the hosts' own processors."""

import json

import pytest
import torch

from tests.torchvision_shim import mend_torchvision

mend_torchvision()
pytest.importorskip("transformers", minversion="5.20.2", reason="pip install 'pyvidx[hosts]'")
pytest.importorskip("torchvision", reason="the processors of transformers need torchvision")
Image = pytest.importorskip("PIL.Image", reason="pip install pillow")

from bench import hosts as bench  # noqa: E402
from pyvidx import memory  # noqa: E402
from pyvidx.hosts import Session, compress  # noqa: E402
from tests.hosts.chats import PROCESSORS  # noqa: E402
from tests.hosts.tiny import entries  # noqa: E402

HOSTS = {kind: entry for kind, entry in entries().items() if kind in PROCESSORS}
GREEDY = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
T, FPS = 7, 2.0
FRAMES = torch.randint(0, 256, (T + 4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SECONDS = [t / FPS for t in range(len(FRAMES))]
QUESTION = "What now?"


@pytest.fixture(scope="module", params=sorted(HOSTS))
def host(request):
    """Model and processor."""
    for package in HOSTS[request.param].needs:
        pytest.importorskip(package, reason=f"{request.param} of transformers needs it")
    return HOSTS[request.param].model(), PROCESSORS[request.param]()


@pytest.fixture(scope="module", params=sorted(HOSTS.keys() & {"llava_onevision", "qwen3_vl"}))
def one(request):
    """Frames one by one, and in pairs."""
    return HOSTS[request.param].model(), PROCESSORS[request.param]()


@pytest.fixture(scope="module")
def onevision():
    return HOSTS["llava_onevision"].model(), PROCESSORS["llava_onevision"]()


def at_once(model, processor, frames, seconds, policy="merge", video=None, **options):
    """What compress makes of all frames."""
    parts = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    about = {"total_num_frames": len(frames), "fps": FPS, "frames_indices": list(range(len(frames)))}
    about["duration"] = seconds[-1]
    inputs = processor(
        text=[prompt], videos=[[frames]], video_metadata=[about], do_sample_frames=False, return_tensors="pt"
    )
    return compress(model, inputs, policy, processor=processor, seconds=[seconds], **options)


def check_same(model, found, wanted):
    """Ids and all that goes beside them, features to 1e-5, tokens."""
    assert found.keys() == wanted.keys()
    for name in found.keys() - {"mm_encoder_outputs"}:
        torch.testing.assert_close(found[name], wanted[name], msg=name)
    features = [x["mm_encoder_outputs"] for x in (found, wanted)]
    (kind,) = features[0]  # "video", or "image" to whom frames are those
    for name in features[0][kind].keys() & {"pooler_output", "deepstack_features"}:
        torch.testing.assert_close(*(x[kind][name] for x in features), atol=1e-5, rtol=0)
    assert torch.equal(*(model.generate(**x, **GREEDY) for x in (found, wanted)))


@pytest.mark.parametrize("chunks, capacity", [([3, 0, 4], 3), ([T], 9)], ids=str)
def test_any_chunks_are_compress_of_the_whole(host, chunks, capacity):
    model, processor = host
    session, at = Session(model, processor, "merge", capacity=capacity, chunk=2), 0
    for n in chunks:
        assert session.push(FRAMES[at : at + n], SECONDS[at : at + n]) is session
        at += n
    wanted = at_once(*host, FRAMES[:T], SECONDS[:T], capacity=capacity)
    check_same(model, session.inputs(QUESTION), wanted)
    answer = session.ask(QUESTION, **GREEDY)
    found = model.generate(**wanted, **GREEDY)[0]
    assert torch.equal(answer.tokens, found[-3:]) and answer.text == processor.decode(
        found[-3:], skip_special_tokens=True
    )
    assert session.frames == T and len(answer.slots) <= capacity
    step = (SECONDS[1] if session.held else 0) / 2  # two frames are at their mean
    assert answer.slots[0][0] == step and answer.slots[-1][1] == SECONDS[T - 1]
    assert all(a <= b for a, b in answer.slots)
    assert session.slots() == answer.slots


def test_an_ask_changes_nothing(one):
    """Also where a frame waits for the other half of its step."""
    model, processor = one
    session = Session(model, processor, "merge", capacity=3)
    session.push(FRAMES[0], SECONDS[0]).ask(QUESTION, **GREEDY)
    for t in range(1, T):
        session.push(FRAMES[t], SECONDS[t])
        check_same(model, session.inputs(QUESTION), at_once(*one, FRAMES[: t + 1], SECONDS[: t + 1], capacity=3))
        session.ask("Another?", **GREEDY)
    assert session.held in (0, T % 2)


def test_forks_and_files(one, tmp_path):
    model, processor = one
    for seen in (1, T):
        session = Session(model, processor, "merge", capacity=3).push(FRAMES[:seen], SECONDS[:seen])
        path = session.save(tmp_path / "session.safetensors")
        other, again = session.fork(), Session.resume(path, model, processor)
        assert repr(again) == repr(session) and again.held == session.held and again.policy == session.policy
        other.push(FRAMES.flip(0)[:3], [10, 10, 10])
        for each in (session, again):
            each.push(FRAMES[seen:], SECONDS[seen:])
        mine, resumed, apart = (x.inputs(QUESTION) for x in (session, again, other))
        check_same(model, mine, at_once(*one, FRAMES, SECONDS, capacity=3))
        check_same(model, resumed, mine)
        assert other.slots()[-1][1] == 10 and other.frames == seen + 3
        pooled = [torch.cat(list(x["mm_encoder_outputs"]["video"].pooler_output)) for x in (mine, apart)]
        assert not torch.allclose(pooled[0][-9:], pooled[1][-9:])
        policy, bank = memory.load(path)  # a session's file is a bank's
        assert policy == session.policy and len(bank) == 1


@pytest.mark.parametrize(
    "shown",
    [
        lambda x: [Image.fromarray(frame) for frame in x.permute(0, 2, 3, 1).numpy()],
        lambda x: x.permute(0, 2, 3, 1).numpy(),
        lambda x: list(x.numpy()),
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: tuple(x),
    ],
)
def test_frames_of_any_kind(onevision, shown):
    model, processor = onevision
    kinds = shown(FRAMES[:T])
    session = Session(model, processor, capacity=3).push(kinds[0], 0).push(kinds[1:], torch.tensor(SECONDS[1:T]))
    check_same(model, session.inputs(QUESTION), at_once(*onevision, FRAMES[:T], SECONDS[:T], capacity=3))


@pytest.mark.parametrize(
    "policy, options",
    [
        ("uniform", {"capacity": 3}),
        ("average", {}),
        ("concat", {}),
        ("merge", {"capacity": 3, "unit": "token", "anchors": 1}),
        ("moviechat", {"fragment": 3, "merged": 1}),
        ("dtd", {"threshold": None, "ratio": 0.5}),
        ("fluxmem", {"short": 1, "medium": 1}),
        (memory.create("fifo", capacity=2), {}),
    ],
    ids=str,
)
def test_policies(onevision, policy, options):
    """Ragged ones and those that ask for the grid too."""
    session = Session(*onevision, policy, **options)
    for part in (slice(0, 2), slice(2, T)):
        session.push(FRAMES[part], SECONDS[part])
    wanted = at_once(*onevision, FRAMES[:T], SECONDS[:T], policy, **options)
    check_same(onevision[0], session.inputs(QUESTION), wanted)
    slots = session.slots()
    assert all(0 <= a <= b <= SECONDS[T - 1] for a, b in slots) and slots == sorted(slots)


def test_questions(onevision):
    """Words, a conversation, a whole prompt."""
    model, processor = onevision
    session = Session(model, processor, capacity=3).push(FRAMES[:T], SECONDS[:T])
    parts = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    talk = [{"role": "user", "content": parts}]
    whole = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    same = [session.ask(x, **GREEDY).tokens.tolist() for x in (QUESTION, talk, whole)]
    assert same[0] == same[1] == same[2]
    more = [
        *talk,
        {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
        talk[0] | {"content": parts[1:]},
    ]
    assert session.inputs(more)["input_ids"].shape[1] > session.inputs(talk)["input_ids"].shape[1]
    options = GREEDY | {"num_beams": 2, "return_dict_in_generate": True}
    assert session.ask(QUESTION, **options).tokens.shape == (3,)


def test_what_does_not_fit_is_said(onevision, tmp_path, monkeypatch):
    model, processor = onevision
    session = Session(model, processor, capacity=3)
    for call in (lambda: session.ask("?"), session.slots, lambda: session.save(tmp_path / "a.safetensors")):
        with pytest.raises(ValueError, match="push a frame first"):
            call()
    session.push(FRAMES[:2], [1, 2])
    before = session.inputs(QUESTION)
    for frames, seconds, said in [
        (FRAMES[:2], [3], "one per frame"),
        (FRAMES[:1], 1.5, "none before 2"),
        (FRAMES[:2], [4, 3], "none before"),
        (FRAMES[:1], float("nan"), "finite"),
        (FRAMES[:1], "now", "must be numbers"),
        (FRAMES[:1, :, :9], 3, "size and dtype of the first"),
        (FRAMES[:1].float(), 3, "size and dtype of the first"),
        (FRAMES[:1, :2], 3, r"\[H, W, 3\]"),
        (FRAMES[:1] > 9, 3, r"\[H, W, 3\]"),
        ("a.mp4", 3, "must be images"),
        ([FRAMES[0], FRAMES[0, :, :9]], [3, 4], "of one size"),
    ]:
        with pytest.raises(ValueError, match=said):
            session.push(frames, seconds)
    check_same(model, session.inputs(QUESTION), before)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="one sequence"):
        patch.setattr(model, "generate", lambda **_: pytest.fail("the model ran"))
        session.ask(QUESTION, **GREEDY | {"num_return_sequences": 2, "num_beams": 2})
    with pytest.raises(ValueError):
        session.ask([{"role": "user", "content": [{"type": "text", "text": "No video?"}]}])
    with pytest.raises(ValueError, match="must be a text or a conversation, got None"):
        session.ask(None)
    for options, said in [
        ({"policy": "evs", "q": 0.5}, "whole clip"),
        ({"policy": "keyframes", "capacity": 3}, "whole clip"),
        ({"policy": "lru"}, "must be one of"),
        ({"capacity": 0}, "capacity"),
        ({"chunk": 0}, "chunk"),
        ({"clip": 0}, "clip"),
        ({"processing": {"size": object()}}, "plain values"),
        ({"processing": {"do_sample_frames": True}}, "leave do_sample_frames"),
        ({"processor": None}, "processor"),
    ]:
        with pytest.raises(ValueError, match=said):
            Session(**{"model": model, "processor": processor} | options)
    with pytest.raises(ValueError, match="model_type"):
        Session(torch.nn.Linear(1, 1), processor)
    with pytest.raises(ValueError, match="reads the question"):
        Session(entries()["instructblipvideo"].model(), processor)


def test_a_file_goes_on_with_its_own_model_alone(onevision, tmp_path):
    model, processor = onevision
    session = Session(model, processor, capacity=3).push(FRAMES[:5], SECONDS[:5])
    path = session.save(tmp_path / "a.safetensors")
    torch.manual_seed(1)
    other = HOSTS["llava_onevision"].build()
    with pytest.raises(ValueError, match="other weights"):
        Session.resume(path, other, processor)
    llava = HOSTS["video_llava"].model()
    with pytest.raises(ValueError, match="'llava_onevision' model, this is a 'video_llava'"):
        Session.resume(path, llava, PROCESSORS["video_llava"]())
    bank = memory.save(tmp_path / "b.safetensors", *memory.load(path))
    with pytest.raises(ValueError, match="must be a file of Session.save"):
        Session.resume(bank, model, processor)
    with pytest.raises(FileNotFoundError):
        Session.resume(tmp_path / "none.safetensors", model, processor)
    policy, loaded = memory.load(path)
    about, tensors = memory.beside(path, "pyvidx.session")
    for change in [
        {"frames": 6}, {"frames": "5"}, {"frames": None}, {"held": [1.0]}, {"held": 3}, {"dtype": "int8"}, {"clip": -1},
        {"processing": 3}, {"last": "x"}, {"host": None}, {"weights": 3},
    ]:  # fmt: skip
        notes = {"pyvidx.session": json.dumps(about | change)}
        bad = memory.save(tmp_path / "c.safetensors", policy, loaded, tensors=tensors, notes=notes)
        with pytest.raises(ValueError, match=r"Session.resume: .*c\.safetensors"):
            Session.resume(bad, model, processor)


@pytest.mark.parametrize("kind", ["qwen3_vl", "video_llama_3"])
def test_processors_that_size_frames_by_their_number(kind):
    """A clip has so many pixels in all: the session says of how many frames."""
    model, n = HOSTS[kind].model(), 8
    processor = PROCESSORS[kind](size={"shortest_edge": 64, "longest_edge": n * 16 * 24})
    wanted = at_once(model, processor, FRAMES[:n], SECONDS[:n], capacity=2)
    for chunk in (1, 8):
        session = Session(model, processor, capacity=2, clip=n, chunk=chunk)
        for at in range(0, n, 2):
            session.push(FRAMES[at : at + 2], SECONDS[at : at + 2])
        check_same(model, session.inputs(QUESTION), wanted)
    wide = Session(model, processor, capacity=2).push(FRAMES[:n], SECONDS[:n])  # as of 4 frames: twice the pixels
    assert wide.inputs(QUESTION)["input_ids"].shape[1] > wanted["input_ids"].shape[1]


def test_memory_stays_flat():
    """100,000 frames by `python -m bench.hosts session`, committed in bench/results; some hundreds here."""
    first, *_, last = bench.main(["session", "--frames", "600"])["rows"][1:]
    assert last["frames"] == 600 and last["resident_mib"] < first["resident_mib"] + 8


def test_cost_is_measured():
    small = ["--small", "--frames", "6", "--capacity", "4", "--rounds", "1", "--hosts", "video_llava"]
    (row,) = bench.main(["cost", *small])["rows"]
    assert 0 < row["bank_ms"] < row["compress_ms"] < row["encoder_ms"]
