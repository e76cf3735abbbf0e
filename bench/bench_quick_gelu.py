"""QuickGELU over the MLP rows of CLIP-L/14 and B/16, T = 8, and its gradient. Eager is x * sigmoid(1.702 x)."""

import pytest
import torch

from bench.harness import Case, nbytes
from pyvidx.ops.quick_gelu import quick_gelu, reference, reference_backward

ROWS = {"l14": (8 * 257, 4096), "b16": (8 * 197, 3072)}
DTYPES = [torch.float32, torch.bfloat16]


def case(model, dtype, device):
    x = torch.randn(*ROWS[model], device=device).to(dtype)
    out = torch.empty_like(x)
    shape = dict(zip(("rows", "C"), ROWS[model]))
    run, eager = lambda: quick_gelu(x, out=out), lambda: reference(x)  # noqa: E731
    return Case("quick_gelu", shape, dtype, run, eager, bytes=nbytes(x, out))


def backward_case(model, dtype, device):
    x, grad = (torch.randn(*ROWS[model], device=device).to(dtype) for _ in range(2))
    run, eager = lambda: torch.ops.pyvidx.quick_gelu_backward(grad, x), lambda: reference_backward(grad, x)  # noqa: E731
    shape = dict(zip(("rows", "C"), ROWS[model]))
    return Case("quick_gelu_backward", shape, dtype, run, eager, bytes=3 * nbytes(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("model", ROWS)
@pytest.mark.parametrize("make", [case, backward_case], ids=["forward", "backward"])
def test_quick_gelu(make, model, dtype, device, measure):
    measure(make(model, dtype, device))
