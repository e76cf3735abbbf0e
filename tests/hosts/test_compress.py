"""What every host must do: the table in tiny_*.py of this folder."""

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20.2", reason="pip install 'pyvidx[hosts]'")

from pyvidx import hosts, memory  # noqa: E402
from pyvidx.hosts import together  # noqa: E402
from pyvidx.hosts.language import host_of, names  # noqa: E402
from tests.hosts.tiny import IMAGE, VIDEO, Image, Video, entries  # noqa: E402

ENTRIES = entries()
CLOSE = dict(atol=1e-5, rtol=0)


@pytest.fixture(scope="module", params=sorted(ENTRIES))
def tiny(request):
    entry = ENTRIES[request.param]
    for package in entry.needs:
        pytest.importorskip(package, reason=f"{entry.kind} of transformers needs it")
    return entry


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.model()


def compress(model, inputs, *args, **options):
    entry = ENTRIES.get(getattr(getattr(model, "config", None), "model_type", None))
    return hosts.compress(model, inputs, *args, processor=entry and entry.processor, **options)


@torch.no_grad()
def logits(model, inputs):
    """Of the last token of each row."""
    found = model(**copy.deepcopy(dict(inputs))).logits
    mask = inputs.get("attention_mask")
    last = -1 if mask is None else (mask * torch.arange(mask.shape[1])).argmax(1)
    return found[torch.arange(len(found)), last]


def answer(model, inputs, **options):
    start = inputs["input_ids"].shape[1]
    with torch.no_grad():
        found = model.generate(
            **copy.deepcopy(dict(inputs)),
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    return found[:, start:]


def alone(tiny, model, row):
    return logits(model, tiny.inputs(row))


def test_every_host_has_an_entry():
    assert sorted(ENTRIES) == [name for name in names() if name in ENTRIES]
    from pyvidx.hosts.language.registry import HOSTS

    assert {HOSTS[kind] for kind in ENTRIES} == set(HOSTS.values()), "a host without a tiny_<model_type>.py"


@pytest.mark.parametrize(
    "policy, capacity", [("merge", 5), ("uniform", 9), ("fifo", 5), ("concat", None), ("keyframes", 6)]
)
def test_a_video_that_fits_gives_the_numbers_of_its_pixels(tiny, model, policy, capacity):
    inputs = tiny.inputs([5, 6, Video(5), 7, 8])
    before = copy.deepcopy(inputs)
    small = compress(model, inputs, policy, capacity=capacity)
    assert type(small) is type(inputs)
    if not tiny.embedded:
        assert small.keys() & set(host_of(model).pixels) == set()
        assert torch.equal(small["input_ids"], inputs["input_ids"])
    torch.testing.assert_close(logits(model, small), logits(model, inputs), **CLOSE)
    assert torch.equal(answer(model, small), answer(model, inputs))
    assert before.keys() == inputs.keys() and all(torch.equal(before[k], inputs[k]) for k in before)


def test_fewer_slots(tiny, model):
    inputs = tiny.inputs([5, 6, Video(7), 7, 8])
    small = compress(model, inputs, "merge", capacity=3)
    if tiny.timeless:
        assert tiny.embedded or torch.equal(small["input_ids"], tiny.inputs([5, 6, Video(3), 7, 8])["input_ids"])
        last = compress(model, inputs, "fifo", capacity=3)
        own = alone(tiny, model, [5, 6, Video(3, first=4), 7, 8])
        torch.testing.assert_close(logits(model, last), own, **CLOSE)
    assert small["attention_mask"].all()
    assert answer(model, small).shape == (1, 4)
    one = compress(model, inputs, memory.create("merge", capacity=1, unit="frame"))
    average = compress(model, inputs, "average")
    torch.testing.assert_close(logits(model, one), logits(model, average), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("capacity", [6, 4])
def test_a_row_of_a_batch_is_what_it_is_alone(tiny, model, side, capacity):
    """Unequal lengths, two videos in one prompt, a prompt without, padding."""
    batch = compress(model, tiny.inputs(*tiny.rows, side=side), "merge", capacity=capacity)
    found = logits(model, batch)
    for row, mine in zip(tiny.rows, found):
        one = compress(model, tiny.inputs(row), "merge", capacity=capacity)
        torch.testing.assert_close(mine[None], logits(model, one), **CLOSE)
        if capacity == 6:
            torch.testing.assert_close(mine[None], alone(tiny, model, row), **CLOSE)
    padded = batch["attention_mask"][:, 0 if side == "left" else -1]
    assert (padded == 0).any() and batch["attention_mask"][:, -1 if side == "left" else 0].all()
    assert batch["attention_mask"].sum(1).max() == batch["attention_mask"].shape[1]


def test_prompts_together(tiny, model):
    """Prompts that were processed one at a time."""
    batch = compress(model, together([tiny.inputs(row) for row in tiny.rows]), "merge", capacity=4)
    torch.testing.assert_close(
        logits(model, batch), logits(model, compress(model, tiny.inputs(*tiny.rows), "merge", capacity=4)), **CLOSE
    )


def test_beams_and_answers(tiny, model):
    rows = tiny.rows[:3]
    batch = compress(model, tiny.inputs(*rows), "merge", capacity=4)
    found = answer(model, batch, num_beams=2, num_return_sequences=2).unflatten(0, (3, 2))
    for row, mine in zip(rows, found):
        one = compress(model, tiny.inputs(row), "merge", capacity=4)
        assert torch.equal(mine, answer(model, one, num_beams=2, num_return_sequences=2))


def test_images_stay(tiny, model):
    if not tiny.images:
        pytest.skip(f"{tiny.kind} takes no images beside videos")
    row = [5, Image(1), 6, Video(5), 7, Image(2), 8]
    inputs = tiny.inputs(row)
    same = compress(model, inputs, "merge", capacity=5)
    assert torch.equal(same["input_ids"], inputs["input_ids"])
    torch.testing.assert_close(logits(model, same), logits(model, inputs), **CLOSE)
    assert torch.equal(answer(model, same), answer(model, inputs))
    small = compress(model, inputs, "fifo", capacity=2)
    if tiny.timeless:
        own = alone(tiny, model, [5, Image(1), 6, Video(2, first=3), 7, Image(2), 8])
        torch.testing.assert_close(logits(model, small), own, **CLOSE)
    only = tiny.inputs([5, Image(1), 6])
    assert compress(model, only, "merge", capacity=2) == only


@pytest.mark.parametrize("policy", ["merge", "keyframes"])
def test_chunks_give_the_numbers_of_the_whole(tiny, model, policy):
    inputs = tiny.inputs([5, Video(7), 6])
    whole, *parts = (compress(model, inputs, policy, capacity=3, chunk=n) for n in (7, 1, 3))
    for part in parts:
        torch.testing.assert_close(logits(model, part), logits(model, whole), **CLOSE)


def test_labels_and_types_follow(tiny, model):
    if tiny.embedded:
        pytest.skip("its slots have no ids to compare labels with")
    inputs = tiny.inputs([5, 6, Video(4), 7, 8], [9, Video(2), 7], types=True)
    inputs["labels"] = inputs["input_ids"].where(inputs["input_ids"] < 9, -100)
    small = compress(model, inputs, "fifo", capacity=2)
    ids, labels = small["input_ids"], small["labels"]
    seen = small["attention_mask"] == 1
    assert torch.equal(labels, ids.where((ids < 9) & seen, -100) | 0)
    if "mm_token_type_ids" in small:
        want = (ids == VIDEO) * 2 + (ids == IMAGE) * 1
        assert torch.equal(small["mm_token_type_ids"], want)
    everything = compress(model, inputs | {"labels": inputs["input_ids"].clone()}, "fifo", capacity=2)
    assert torch.equal(everything["labels"][seen], ids[seen])


def test_every_policy_of_a_grid(tiny, model):
    inputs = tiny.inputs([5, Video(6), 6])

    def shown(inputs):
        ids = inputs["input_ids"]
        return ids.shape[1] if tiny.embedded else int((ids == host_of(model).token).sum())

    for options in (
        {"policy": "merge", "unit": "token"}, {"policy": "merge", "unit": "synchronized"}, {"policy": "uniform"},
        {"policy": "flash_vstream"}, {"policy": "tome"}, {"policy": "keyframes", "unit": "token"},
    ):  # fmt: skip
        small = compress(model, inputs, capacity=3, **options)
        assert shown(small) == shown(tiny.inputs([5, Video(3), 6])), options
        assert logits(model, small).isfinite().all()


@pytest.mark.parametrize("options", [
    {"policy": "evs", "q": 0.5}, {"policy": "vidcom2", "q": 0.5}, {"policy": "vidcom2", "q": 0.5, "form": "authors"},
    {"policy": "dtd"}, {"policy": "fluxmem", "short": 1, "medium": 1}, {"policy": "tome", "axis": "space", "tokens": 1},
], ids=lambda o: "-".join(map(str, o.values())))  # fmt: skip
def test_ragged_results_where_the_host_takes_them(tiny, model, options):
    inputs = tiny.inputs([5, Video(6), 6], [7, 5, Video(4, 1), 6])
    if not tiny.ragged:
        with pytest.raises(ValueError, match="takes whole slots of a step's positions"):
            compress(model, inputs, **options)
        return
    if options["policy"] == "fluxmem" and not tiny.square:
        with pytest.raises(ValueError, match="grid must be"):
            compress(model, inputs, **options)
        return
    if options["policy"] == "tome" and tiny.in_place:
        with pytest.raises(ValueError, match="have places in a step, and those of tome none"):
            compress(model, inputs, **options)
        return
    small = compress(model, inputs, **options)
    assert small["input_ids"].shape[1] <= inputs["input_ids"].shape[1]
    found = logits(model, small)
    for row, mine in zip(([5, Video(6), 6], [7, 5, Video(4, 1), 6]), found):
        one = compress(model, tiny.inputs(row), **options)
        torch.testing.assert_close(mine[None], logits(model, one), **CLOSE)


def test_ragged_tokens_stand_where_they_stood(tiny, model):
    """Of all tokens that is the whole video; of some, the model's own numbers for them among all positions."""
    if not tiny.in_place:
        pytest.skip(f"{tiny.kind} has no positions but the order")
    inputs = tiny.inputs([5, Image(1), Video(6), 6, Video(6, 1)], [7, Video(6, 2), 8])
    whole = compress(model, inputs, "evs", q=0.0)
    torch.testing.assert_close(logits(model, whole), logits(model, inputs), **CLOSE)
    assert torch.equal(answer(model, whole), answer(model, inputs))
    assert torch.equal(answer(model, whole, num_beams=2), answer(model, inputs, num_beams=2))
    small = compress(model, inputs, "evs", q=0.6)
    assert small["position_ids"].shape[-1] == small["input_ids"].shape[1] < inputs["input_ids"].shape[1]
    kept = memory.evs(
        torch.stack([x.unflatten(0, (6, -1)) for x in whole["mm_encoder_outputs"]["video"].pooler_output]), 0.6
    )
    long, short = (x["input_ids"] == host_of(model).token for x in (inputs, small))
    stood = whole["position_ids"][:, long][:, kept.flatten()]
    assert torch.equal(small["position_ids"][:, short], stood)
    texts = [x["position_ids"][:, ~mask & (x["attention_mask"] == 1)] for x, mask in ((whole, long), (small, short))]
    assert torch.equal(*texts)
    assert answer(model, small).shape == (2, 4)
    with pytest.raises(ValueError, match="needs the whole video's prompt"):
        hosts.Session(model, object(), "dtd")


def test_nothing_to_compress(tiny, model):
    text = {k: v for k, v in tiny.inputs([5, 6, 7]).items() if k in ("input_ids", "attention_mask")}
    assert compress(model, text, "merge", capacity=2) == text


WRONG = {
    "another host": (lambda i: i, {"host": "bert"}, "must be one of .*llava_onevision.*got 'bert'"),
    "no model": (lambda i: i, {"host": None}, "must be one of"),
    "pixels missing": (lambda i: {k: v for k, v in i.items() if not k.startswith("pixel")}, {}, "no pixels"),
    "a token missing": (lambda i: i | {k: i[k][:, :-8] for k in ("input_ids", "attention_mask")}, {}, "compress: "),
    "not a mapping": (lambda i: [i], {}, "must be a mapping"),
    "no ids": (lambda i: {k: v for k, v in i.items() if k != "input_ids"}, {}, "must hold input_ids"),
    "ids in a list": (lambda i: i | {"input_ids": i["input_ids"].tolist()}, {}, "must hold input_ids"),
    "embedded": (lambda i: i | {"inputs_embeds": torch.zeros(1, 3, 32)}, {}, "inputs_embeds"),
    "a mask of another shape": (lambda i: i | {"attention_mask": torch.ones(1, 2)}, {}, "attention_mask must be"),
    "hidden": (lambda i: i | {"attention_mask": torch.zeros_like(i["attention_mask"])}, {}, "attention_mask must be 1"),
    "unknown along tokens": (lambda i: i | {"weights": torch.ones(i["input_ids"].shape)}, {}, "weights has the shape"),
    "encoded in a list": (lambda i: i | {"mm_encoder_outputs": [1]}, {}, "mm_encoder_outputs must be .*got list"),
    "compressed": (lambda i: i | {"mm_encoder_outputs": {"video": 1}}, {}, "encoded video already"),
    "no capacity": (lambda i: i, {"capacity": 0}, "capacity"),
    "half a slot": (lambda i: i, {"capacity": 1.5}, "capacity"),
    "a capacity of concat": (lambda i: i, {"policy": "concat"}, "do not fit 'concat'"),
    "a policy that is none": (lambda i: i, {"policy": "best"}, "policy must be one of .*merge.*got 'best'"),
    "a policy and options": (lambda i: i, {"policy": memory.create("fifo")}, "has its options already"),
    "an option": (lambda i: i, {"sharp": True}, "sharp"),
    "evs with a capacity": (lambda i: i, {"policy": "evs", "q": 0.5}, "evs takes q, got capacity"),
    "evs of a word": (lambda i: i, {"policy": "evs", "q": "half", "capacity": None}, "q must be a number"),
    "evs of all": (lambda i: i, {"policy": "evs", "q": 1.0, "capacity": None}, "q must be in"),
    "vidcom2 of another": (lambda i: i, {"policy": "vidcom2", "q": 0.5, "form": "x", "capacity": None}, "form must be"),
    "evs without q": (lambda i: i, {"policy": "evs", "capacity": None}, "must be given q"),
    "keyframes without capacity": (lambda i: i, {"policy": "keyframes", "capacity": None}, "must be given capacity"),
    "keyframes of none": (lambda i: i, {"policy": "keyframes", "capacity": 0}, "capacity must be"),
    "no chunk": (lambda i: i, {"chunk": 0}, "chunk must be"),
    "times of another video": (lambda i: i, {"seconds": [[0.0], [1.0]]}, "seconds must be of 1 videos"),
    "times of nothing": (lambda i: i, {"seconds": 3.0}, "seconds must be of 1 videos, .*got 3.0"),
    "few times": (lambda i: i, {"seconds": [[0.0]]}, "seconds of video 0 must be one for each of its 4 steps"),
    "falling times": (lambda i: i, {"seconds": [[0.0, 2.0, 1.0, 3.0]]}, "not fall"),
    "no time": (lambda i: i, {"seconds": [[0.0, 1.0, 2.0, torch.nan]]}, "finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_an_error_before_the_model_runs(tiny, model, case, monkeypatch):
    change, options, message = WRONG[case]
    inputs = change(tiny.inputs([5, Video(4), 6]))
    options = {"capacity": 2} | options
    if "host" in options:
        kind = options.pop("host")
        config = copy.copy(model.config)
        object.__setattr__(config, "model_type", kind)
        model = type("Other", (), {"config": config}) if kind else object()
    host = {} if not hasattr(model, "parameters") else {"encode": type(host_of(model))}
    for name, where in host.items():
        monkeypatch.setattr(where, name, lambda *a: pytest.fail("the encoder ran"))
    with pytest.raises(ValueError, match=message):
        compress(model, inputs, **options)
