"""QuickGELU over the MLP rows of CLIP-L/14 and B/16, T = 8, with and without a bias, and its gradients.

Eager is v * sigmoid(1.702 v), v = x + bias.
"""

import pytest
import torch

from bench.harness import Case, nbytes
from pyvidx.ops.quick_gelu import quick_gelu, reference, reference_backward

ROWS = {"l14": (8 * 257, 4096), "b16": (8 * 197, 3072)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(model, dtype, with_bias, device):
    x, bias = tensors(model, 1, with_bias, dtype, device)
    out = torch.empty_like(x)
    run, eager = lambda: quick_gelu(x, bias, out=out), lambda: reference(x, bias)  # noqa: E731
    return Case("quick_gelu", shape(model, with_bias), dtype, run, eager, bytes=nbytes(x, bias, out))


def backward_case(model, dtype, with_bias, device):
    x, grad, bias = tensors(model, 2, with_bias, dtype, device)
    run = lambda: torch.ops.pyvidx.quick_gelu_backward(grad, x, bias)  # noqa: E731
    eager = lambda: reference_backward(grad, x, bias)  # noqa: E731
    bytes_moved = 3 * nbytes(x) + 2 * nbytes(bias)
    return Case("quick_gelu_backward", shape(model, with_bias), dtype, run, eager, bytes=bytes_moved)


def tensors(model, count, with_bias, dtype, device):
    C = ROWS[model][1]
    rows = [torch.randn(*ROWS[model], device=device).to(dtype) for _ in range(count)]
    return *rows, torch.randn(C, device=device).to(dtype) if with_bias else None


def shape(model, with_bias):
    return dict(zip(("rows", "C"), ROWS[model])) | ({"with": "bias"} if with_bias else {})


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("model", ROWS)
@pytest.mark.parametrize("make", [case, backward_case], ids=["forward", "backward"])
def test_quick_gelu(make, model, with_bias, dtype, device, measure):
    measure(make(model, dtype, with_bias, device))
