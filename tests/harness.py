"""What the tests of every op share: devices, awkward inputs, poisoned outputs, one criterion for rounding errors."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from pyvidx.ops import _library

# Of the pure wheel: its references take some arguments that a kernel must refuse. tests/test_library.py wants kernels.
needs_kernels = pytest.mark.skipif(_library.LOAD_ERROR is not None, reason="about compiled kernels, and there are none")
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# What a result may be off by when plain torch happens to be exact: a few roundings to the dtype, relative to the
# largest value of the output.
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def randn(*shape: int, dtype=torch.float32, device="cpu", seed=0, sliced=True) -> Tensor:
    """Normal values in the dtype. sliced: a window of a larger tensor, so no stride is what it would be by luck."""
    generator = torch.Generator().manual_seed(seed)
    pad = [n + 1 for n in shape[:-1]] + [shape[-1] + 3] if sliced else list(shape)
    x = torch.randn(pad, generator=generator, dtype=torch.float64).to(device, dtype)
    return x[tuple(slice(n) for n in shape)]


def poisoned(shape: Sequence[int], like: Tensor) -> Tensor:
    """An output buffer full of NaN: what is not written shows."""
    return torch.full(tuple(shape), float("nan"), dtype=like.dtype, device=like.device)


def tensors_of(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if t is not None]


def assert_close_to_reference(run: Callable, reference: Callable, inputs: Sequence, *, slack: float = 1.0) -> None:
    """Our error against the reference in float64 is at most twice that of the reference run in the inputs' own dtype,
    plus the dtype's floor. `slack` loosens the floor; a test that needs it says why."""
    exact = tensors_of(reference(*_as(inputs, torch.float64)))
    ours = tensors_of(run(*inputs))
    plain = tensors_of(reference(*inputs))
    assert len(ours) == len(exact)
    for i, (a, b, c) in enumerate(zip(ours, plain, exact)):
        assert a.shape == c.shape, f"output {i}: {tuple(a.shape)}, expected {tuple(c.shape)}"
        if not a.is_floating_point():
            assert torch.equal(a, c), f"output {i} differs"
            continue
        if a.numel() == 0:
            continue
        assert torch.isfinite(a).all(), f"output {i} holds values that are not finite"
        scale = max(1.0, c.abs().max().item())
        error = (a.double() - c).abs().max().item()
        allowed = 2 * (b.double() - c).abs().max().item() + slack * FLOOR[a.dtype] * scale
        assert error <= allowed, f"output {i}: error {error:.3g}, allowed {allowed:.3g} ({a.dtype})"


def assert_gradients_close(run: Callable, reference: Callable, inputs: Sequence, *, slack: float = 1.0) -> None:
    """The same criterion for the gradients of a random weighted sum, in every floating input that requires grad."""

    def gradients(function, arguments):
        leaves = [a.detach().requires_grad_() if _wants_grad(a) else a for a in arguments]
        outputs = [t for t in tensors_of(function(*leaves)) if t.is_floating_point()]
        loss = sum(
            (t * randn(*t.shape, dtype=t.dtype, device=t.device, seed=7 + i, sliced=False)).double().sum()
            for i, t in enumerate(outputs)
        )
        return torch.autograd.grad(loss, [a for a in leaves if _wants_grad(a)])

    assert_close_to_reference(lambda *a: gradients(run, a), lambda *a: gradients(reference, a), inputs, slack=slack)


def _wants_grad(a) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point() and a.requires_grad


def _as(inputs, dtype):
    def cast(a):
        if isinstance(a, Tensor) and a.is_floating_point():
            return a.detach().to(dtype).requires_grad_(a.requires_grad)
        return a

    return [cast(a) for a in inputs]
