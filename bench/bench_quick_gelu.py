"""QuickGELU over the MLP rows of CLIP-L/14 and B/16, T = 8, and its gradient. Eager is x * sigmoid(1.702 x)."""

import pytest
import torch

from bench.harness import Case, nbytes
from pyvidx.ops.quick_gelu import quick_gelu, reference, reference_backward

ROWS = {"l14": (8 * 257, 4096), "b16": (8 * 197, 3072)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(model, dtype, device):
    (x,) = tensors(model, 1, dtype, device)
    run, eager = lambda: quick_gelu(x), lambda: reference(x)  # noqa: E731
    return Case("quick_gelu", shape(model), dtype, run, eager, bytes=2 * nbytes(x))


def backward_case(model, dtype, device):
    x, grad = tensors(model, 2, dtype, device)
    run = lambda: torch.ops.pyvidx.quick_gelu_backward(grad, x)  # noqa: E731
    eager = lambda: reference_backward(grad, x)  # noqa: E731
    return Case("quick_gelu_backward", shape(model), dtype, run, eager, bytes=3 * nbytes(x))


def tensors(model, count, dtype, device):
    return [torch.randn(*ROWS[model], device=device).to(dtype) for _ in range(count)]


def shape(model):
    return dict(zip(("rows", "C"), ROWS[model]))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("model", ROWS)
@pytest.mark.parametrize("make", [case, backward_case], ids=["forward", "backward"])
def test_quick_gelu(make, model, dtype, device, measure):
    measure(make(model, dtype, device))
