"""Recorded calls. Where there is no GPU, a recording is emulated: the same call again, into what the first one gave.
That a GPU could record it is shown by tests/no_sync.py."""

import gc
from types import SimpleNamespace

import pytest
import torch
from torch.utils import _pytree as pytree

from pyvidx import graphs
from tests.tools import IDS, clips, differ, model

DEVICES = ["emulated", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def again(run):
    out = run()

    def replay():
        for held, new in zip(pytree.tree_leaves(out), pytree.tree_leaves(run()), strict=True):
            if isinstance(held, torch.Tensor) and held is not new:
                held.copy_(new)

    return out, replay


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cuda":
        return "cuda"
    monkeypatch.setattr(graphs, "record", again)
    monkeypatch.setattr(graphs, "why_plain", lambda example: None)
    return "cpu"


def close(a, b):
    a, b = ([x for x in pytree.tree_leaves(y) if isinstance(x, torch.Tensor)] for y in (a, b))
    assert differ(a, b) < 1e-5


@torch.no_grad()
def test_an_encoder(device):
    encoder = model("BTAdapter").eval().to(device)
    first, second = (clips(2, 4).to(device) for _ in range(2))
    encode = graphs.capture(encoder, first, outputs=("pooled",))
    assert encode.captured
    got = [encode(x) for x in (first, second)]  # the second call leaves the first one's result alone
    for x, y in zip((first, second), got):
        close(y, encoder(x, outputs=("pooled",)))
    with pytest.raises(ValueError, match="as at the capture"):
        encode(first[:1])


@torch.no_grad()
@pytest.mark.parametrize("banks", [{}, {"query": False}, {"visual": False}])
def test_a_stream(device, banks):
    malmm, length = model("MALMM").eval().to(device), 3
    prompt = malmm.prompt(IDS.to(device))
    features = malmm.features(clips(8, 2).to(device))  # 8 frames of 2 videos
    ours, theirs = (malmm.start(prompt, length=length, **banks) for _ in range(2))
    step = graphs.capture(malmm.push, ours, features[0])
    for frame in features:
        ours, theirs = step(ours, frame), malmm.push(theirs, frame)
        close(malmm.ask(ours), malmm.ask(theirs))
    assert step.replays == 8 - length - 1 and ours.seen == 8

    other = malmm.push(malmm.start(prompt, length=length, **banks), features[:5].transpose(0, 1))
    with pytest.raises(RuntimeError, match="in use"):
        step(other, features[5])
    kept = ours.clone()
    del ours
    gc.collect()
    other = step(other, features[5])
    close(malmm.ask(kept), malmm.ask(theirs))
    want = malmm.push(malmm.start(prompt, length=length, **banks), features[:6].transpose(0, 1))
    close(malmm.ask(other), malmm.ask(want))


@torch.no_grad()
def test_clips_of_any_length(device):
    encoder = model("BTAdapter").eval().to(device)
    encode = graphs.Clips(encoder, (2, 4))
    for T in (1, 3, 4, 2, 5):
        pixels = clips(2, T).to(device)
        close(encode(pixels), encoder(pixels))
    assert sorted(key[1] for key in encode.graphs) == [2, 4]
    pixels, mask = clips(2, 3).to(device), torch.tensor([[True, True, False], [True] * 3], device=device)
    close(encode(pixels, mask), encoder(pixels, frame_mask=mask))
    with pytest.raises(ValueError, match="ascending"):
        graphs.Clips(encoder, (4, 2))

    for wrong, said in ((mask[:, :2], "must be bool"), (mask.float(), "must be bool"), (mask & False, "every clip a")):
        with pytest.raises(ValueError, match=said):
            encode(pixels, wrong.cpu())


def test_what_a_recording_cannot_see(device):
    x = torch.ones(2, device=device)
    add = graphs.capture(torch.add, x, x)  # two arguments, though one tensor here
    assert add(x, 3 * x).tolist() == [4, 4]
    hidden = SimpleNamespace(x=x)
    with pytest.raises(ValueError, match="arguments must be .* got a SimpleNamespace"):
        graphs.capture(lambda y: y.x, hidden)
    with pytest.raises(ValueError, match="results must be .* got a SimpleNamespace"):
        graphs.capture(lambda y: SimpleNamespace(x=y), x)


@torch.no_grad()
def test_without_a_gpu_calls_are_plain():
    encoder, stream = model("BTAdapter").eval(), model("MALMM").eval()
    encode, pixels = graphs.capture(encoder, clips(1, 2)), clips(2, 4)
    assert not encode.captured and "CUDA" in encode.why or "on cpu" in encode.why
    close(encode(pixels), encoder(pixels))  # of any shape
    memories = stream.start(stream.prompt(IDS), length=2)
    frame = stream.features(clips(1, 2)[0])
    step = graphs.capture(stream.push, memories, frame)
    assert not step.captured and step(memories, frame).seen == 1 and step.replays == 0
