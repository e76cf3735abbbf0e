"""residual_norm over the branch's rows of CLIP-L/14 and B/16, T = 8, masked training and whole clips, and its gradient:
with a class row in every slot, DropPath and the bias of the product before."""

import pytest
import torch

from bench.harness import Case, nbytes
from pyvidx.ops.residual_norm import reference, reference_backward, residual_norm

SIZES = {"l14-masked": (8, 78, 1024), "l14": (8, 257, 1024), "b16": (8, 197, 768)}  # slots, rows, channels
DTYPES = [torch.float32, torch.bfloat16]


def tensors(model, dtype, device, B=4):
    S, N, C = SIZES[model]
    x, y, z = (torch.randn(B, S, N, C, device=device).to(dtype) for _ in range(3))
    bias, weight, shift = (torch.randn(C, device=device).to(dtype) for _ in range(3))
    share = torch.full((B, S), 1 / S, device=device)
    return x, y, z, bias, weight, shift, share, {"B": B, "S": S, "N": N, "C": C}


def case(model, dtype, device):
    x, y, out, bias, weight, shift, share, shape = tensors(model, dtype, device)
    normed, norm = torch.empty_like(out), (weight, shift)
    run = lambda: residual_norm(x, y, norm, bias=bias, factor=share, share=share, out=(out, normed))  # noqa: E731
    eager = lambda: reference(x, y, None, bias, share, share, weight, shift, 1e-5)  # noqa: E731
    return Case("residual_norm", shape, dtype, run, eager, bytes=nbytes(x, y, out, normed))


def backward_case(model, dtype, device):
    grad, grad_normed, value, _, weight, _, share, shape = tensors(model, dtype, device)
    stats = torch.randn(*value.shape[:3], 2, device=device).abs()
    args = (grad, grad_normed, value, stats, share, share, weight, False, True, True)
    run, eager = lambda: torch.ops.pyvidx.residual_norm_backward(*args), lambda: reference_backward(*args)  # noqa: E731
    return Case("residual_norm_backward", shape, dtype, run, eager, bytes=5 * nbytes(value))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("make", [case, backward_case], ids=["forward", "backward"])
def test_residual_norm(make, model, dtype, device, measure):
    measure(make(model, dtype, device))
