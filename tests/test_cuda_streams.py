"""How the CUDA ops launch: every one is captured in a CUDA graph and replayed on other data, on the stream of its
caller, on the device of its tensors.

On a GPU (`-m gpu`), and in the emulator (tests/test_cuda_emu.py), where every launch of every test is also held to the
stream that the op was given.
"""

import ctypes
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.op_calls import op_calls

EMULATED = "PYVIDX_OPS_LIBRARY" in os.environ
NAMES = list(op_calls("cpu"))
DTYPES = [torch.float32, torch.float16]
GPU = torch.cuda.is_available() and not EMULATED
needs_gpu = pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
# Results that sums in torch add to our kernels', which the emulator's graphs do not hold.
BY_TORCH = {"token_gather": (2, 3), "fusion_input": (4, 5, 6), "output_gate": (2,)}


def copies(inputs):
    return [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]


def fill(inputs, values):
    with torch.no_grad():
        for t, value in zip(inputs, values):
            t.copy_(value)


def assert_same(got, want, but=()):
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want)):
        assert i in but or torch.equal(a, b), f"result {i} of {len(got)}"


def two_calls(name, device, dtype):
    """A call, and other values for its inputs with what they give."""
    torch.manual_seed(1)
    first = op_calls(device, dtype)[name]
    values = op_calls(device, dtype)[name].inputs
    return first, values, first.run(*copies(values))


# ---- on a GPU ----


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_replays_on_other_data(name, dtype):
    call, values, want = two_calls(name, "cuda", dtype)
    start = copies(call.inputs)  # in-place ops change them
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call.run(*copies(call.inputs))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call.run(*start)
    for _ in range(2):
        fill(start, values)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(got, want)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", NAMES)
def test_work_is_on_the_callers_stream(name):
    """The inputs get their values late, on the same stream: what runs on another one reads what was there before."""
    call, values, want = two_calls(name, "cuda", torch.float32)
    inputs = copies(call.inputs)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # about 10 ms
        fill(inputs, values)
        got = call.run(*inputs)
    side.synchronize()
    assert_same(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU or torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("name", NAMES)
def test_work_is_on_the_device_of_the_tensors(name):
    call, _, _ = two_calls(name, "cuda:1", torch.float32)
    want = call.run(*copies(call.inputs))
    with torch.cuda.device(0):
        assert_same(call.run(*copies(call.inputs)), want)
        assert torch.cuda.current_device() == 0


# ---- in the emulator ----


class Kept(TorchDispatchMode):
    """Keeps every tensor that is made, also inside our ops, as the memory pool of a graph does."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "pyvidx":
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        out = func(*args, **kwargs)
        self.tensors.append(out)
        return out


@pytest.mark.skipif(not EMULATED, reason="for the emulator")
@pytest.mark.parametrize("name", NAMES)
def test_captured_launches_do_all_the_work(name):
    library = ctypes.CDLL(os.environ["PYVIDX_OPS_LIBRARY"])
    call, values, want = two_calls(name, "cpu", torch.float32)
    inputs = copies(call.inputs)
    with Kept() as kept:
        library.cuemu_begin_capture()
        try:
            got = call.run(*inputs)
        finally:
            launches = library.cuemu_end_capture()
    assert launches > 0 and len(kept.tensors) > 0
    fill(inputs, values)
    message = ctypes.create_string_buffer(1000)
    assert library.cuemu_replay(message, ctypes.c_size_t(1000)) == 0, message.value
    assert_same(got, want, BY_TORCH.get(name, ()))
