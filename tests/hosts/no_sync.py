"""A session's push on fake CUDA tensors; run by tests/test_no_sync.py."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20.2", reason="pip install 'pyvidx[hosts]'")

from pyvidx.hosts import Session  # noqa: E402
from tests.hosts.chats import llava_onevision  # noqa: E402
from tests.hosts.tiny_llava_onevision import ENTRY  # noqa: E402
from tests.no_sync import NoTraffic, gpu  # noqa: E402

FRAMES, SECONDS = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), [0.0, 1.0, 2.0, 3.0]


class OneWay(NoTraffic):
    """Fails where the host waits for the GPU; pixels and times are copied to it without waiting."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs.get("non_blocking") and not args[0].is_cuda:
            return func(*args, **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


@torch.no_grad()
def test_a_push_waits_for_no_gpu(monkeypatch):
    """From what the processor made on: the host's encoder, the bank."""
    from transformers.initialization import no_init_weights

    session = Session(ENTRY.model(), llava_onevision(), "merge", capacity=3).push(FRAMES, SECONDS)
    processed = session._processed(session._prompt(""), FRAMES)
    monkeypatch.setattr(session, "_processed", lambda *_: processed)
    with gpu(), no_init_weights():
        session.host = type(session.host)(ENTRY.build().eval(), session.host.processor)
        pixels = processed[0]["pixel_values_videos"]
        processed[0]["pixel_values_videos"] = torch.empty(pixels.shape, device="cpu")  # a fake one, too
        bank = None
        with OneWay():
            for _ in range(3):
                bank = session._advanced(bank, torch.empty(FRAMES.shape, device="cpu"), SECONDS)
        assert bank.rows.is_cuda and bank.bound == 3
        with OneWay(), pytest.raises((AssertionError, RuntimeError)):
            bank.rows.sum().item()
