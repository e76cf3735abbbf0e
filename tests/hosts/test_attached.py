"""`attached` against compress before the model's call."""

import logging

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20.2", reason="pip install 'pyvidx[hosts]'")

from pyvidx.hosts import attached, compress  # noqa: E402
from tests.hosts.tiny import Image, Video, entries  # noqa: E402

ENTRIES = entries()
GREEDY = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
ROWS = [[5, Video(6, 1), 7], [8, 9, Video(3, 2), 5, 6]]
CLOSE = dict(atol=1e-5, rtol=0)


@pytest.fixture(scope="module", params=sorted(ENTRIES))
def host(request):
    tiny = ENTRIES[request.param]
    for package in tiny.needs:
        pytest.importorskip(package, reason=f"{tiny.kind} of transformers needs it")
    return tiny, tiny.model()


@pytest.fixture(scope="module")
def onevision():
    tiny = ENTRIES["llava_onevision"]
    return tiny, tiny.model()


def new(found, inputs):
    """What was made after the prompt, as programs take it."""
    return found[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def test_calls_are_those_of_compress(host):
    """forward and generate, twice, a batch with padding; then the model is as it was."""
    tiny, model = host
    inputs, how = tiny.inputs(*ROWS), {"capacity": 4, "processor": tiny.processor}
    before, own = dict(vars(model)), model.generate(**tiny.inputs([5, Video(5), 7]), **GREEDY)
    logits = model(**compress(model, inputs, "merge", **how)).logits
    small = compress(model, inputs, "merge", **how)
    made = new(model.generate(**small, **GREEDY), small)
    with attached(model, "merge", **how) as memory:
        for _ in range(2):
            torch.testing.assert_close(model(**inputs).logits, logits, **CLOSE)
            found = model.generate(**inputs, **GREEDY)
            assert torch.equal(new(found, inputs), made)
            assert torch.equal(found[:, : -made.shape[1]], inputs["input_ids"])  # the prompt that was given
        assert memory.calls == 4 and memory.tokens_out < memory.tokens_in
    assert vars(model) == before
    assert torch.equal(model.generate(**tiny.inputs([5, Video(5), 7]), **GREEDY), own)


def test_what_has_no_video_goes_through(onevision):
    tiny, model = onevision
    text, image = tiny.inputs([5, 6, 7]), tiny.inputs([5, Image(), 6])
    small = compress(model, tiny.inputs([5, Video(6), 7]), "merge", capacity=3)
    own = [model.generate(**x, **GREEDY) for x in (text, image, small)]
    small = compress(model, tiny.inputs([5, Video(6), 7]), "merge", capacity=3)
    with attached(model, "merge", capacity=2) as memory:
        found = [model.generate(**x, **GREEDY) for x in (text, image, small)]
    assert all(map(torch.equal, found, own)) and memory.calls == 0
    tiny = ENTRIES["instructblipvideo"]  # whose slots are embedded, beside pixels that stand for none
    model, inputs = tiny.model(), tiny.inputs([Video(6), 5])
    own = model.generate(**compress(model, inputs, "merge", capacity=3), **GREEDY)
    with attached(model, "merge", capacity=2) as memory:
        found = model.generate(**compress(model, inputs, "merge", capacity=3), **GREEDY)
    assert torch.equal(found, own) and memory.calls == 0


def test_forms_of_a_call(onevision, monkeypatch):
    """Positional arguments, `inputs`, a dict that comes back, several answers, lengths with the prompt, labels."""
    from transformers import GenerationConfig

    tiny, model = onevision
    inputs = tiny.inputs(*ROWS)
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    pixels = {name: x for name, x in inputs.items() if name != "input_ids"}

    def wanted(**options):
        small = compress(model, inputs, "merge", capacity=4)
        return new(model.generate(**small, **GREEDY | options), small)

    beams = {"num_beams": 2, "num_return_sequences": 2}
    one, several = wanted(), wanted(**beams)
    with torch.no_grad():
        loss = model(**compress(model, inputs | {"labels": ids}, "merge", capacity=4)).loss
    with attached(model, "merge", capacity=4):
        assert torch.equal(new(model.generate(ids, **pixels, **GREEDY), inputs), one)
        assert torch.equal(new(model.generate(inputs=ids, **pixels, **GREEDY), inputs), one)
        found = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
        assert torch.equal(new(found.sequences, inputs), one) and len(found.logits) == 3
        assert torch.equal(new(model.generate(**inputs, **GREEDY, **beams), inputs), several)
        lengths = {"max_length": length + 3, "min_length": length + 3, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(new(model.generate(**inputs, **lengths), inputs), one)
        assert torch.equal(new(model.generate(**inputs, generation_config=GenerationConfig(**lengths)), inputs), one)
        monkeypatch.setattr(model, "generation_config", GenerationConfig(**lengths))
        assert torch.equal(new(model.generate(**inputs), inputs), one)
        monkeypatch.undo()
        short = GREEDY | {"min_new_tokens": None, "min_length": 5}  # shorter than the prompt: of no effect
        assert new(model.generate(**inputs, **short), inputs).shape[1] <= 3
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs, labels=ids).loss, loss)
            torch.testing.assert_close(model(ids, **pixels, labels=ids).loss, loss)


def test_undone_on_an_error_and_not_twice(onevision):
    tiny, model = onevision
    other, before = tiny.model(), dict(vars(model))
    memory = attached(model, "uniform", capacity=3)
    with pytest.raises(KeyError), memory:
        raise KeyError
    assert vars(model) == before
    with memory:  # once more
        with pytest.raises(RuntimeError, match="attached already"), attached(model, "fifo"):
            pass
        with pytest.raises(RuntimeError, match="attached already"), memory:
            pass
        with attached(other, "fifo", capacity=2):  # another model
            assert vars(other).keys() > before.keys() and vars(model).keys() > before.keys()
        bad = tiny.inputs([5, Video(6), 7])
        bad["input_ids"][0, 2] = 9
        with pytest.raises(ValueError, match="placeholders"):
            model.generate(**bad, **GREEDY)
        assert model.generate(**tiny.inputs([5, Video(6), 7]), **GREEDY) is not None
    assert vars(model) == before and vars(other).keys() == before.keys()

    def hook(*args, **kwargs):  # as accelerate leaves one
        return type(model).forward(model, *args, **kwargs)

    model.forward = hook
    with attached(model, "fifo", capacity=2):
        assert model.forward is not hook
    assert vars(model)["forward"] is hook
    del model.forward


def test_it_says_what_it_does(onevision, caplog):
    tiny, model = onevision
    memory = attached(model, "merge", capacity=3, unit="token")
    assert repr(memory) == (
        "attached(LlavaOnevisionForConditionalGeneration, 'merge', capacity=3, unit='token'), not entered: "
        "0 calls, 0 tokens became 0"
    )
    with caplog.at_level(logging.INFO, "pyvidx.hosts.attached"), memory:
        model.generate(**tiny.inputs([5, Video(6), 7]), **GREEDY)
        assert "entered: 1 calls, 27 tokens became 15" in repr(memory)
    assert [r.message for r in caplog.records if "prompts" in r.message] == [
        "'merge', capacity=3, unit='token': prompts of 27 tokens became 15"
    ]
    for options, said in [
        ({"policy": "lru"}, "must be one of"),
        ({"capacity": 0}, "capacity"),
        ({"nonsense": 1}, "nonsense"),
        ({"chunk": 0}, "chunk"),
    ]:
        with pytest.raises(ValueError, match=said):
            attached(model, **options)
    with pytest.raises(ValueError, match="model_type"):
        attached(torch.nn.Linear(1, 1))


def test_wrapped_models(onevision):
    """PEFT's call ends in the model's own."""
    peft = pytest.importorskip("peft")
    tiny, _ = onevision
    wrapped = peft.get_peft_model(tiny.model(), peft.LoraConfig(target_modules=["q_proj"])).eval()
    inputs = tiny.inputs([5, Video(6), 7])
    small = compress(wrapped, inputs, "merge", capacity=3)
    made = new(wrapped.generate(**small, **GREEDY), small)
    with attached(wrapped, "merge", capacity=3) as memory:
        assert torch.equal(new(wrapped.generate(**inputs, **GREEDY), inputs), made) and memory.calls == 1
