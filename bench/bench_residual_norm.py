"""residual_norm over the branch's rows of CLIP-L/14 and B/16, T = 8, masked training and whole clips, and its gradient.

"space": with a class row in every slot, DropPath by slot and the bias of the product before. "time": DropPath by row,
and a constant that it leaves alone.
"""

import pytest
import torch

from bench.harness import Case, nbytes
from pyvidx.ops.residual_norm import reference, reference_backward, residual_norm

SIZES = {"l14-masked": (8, 78, 1024), "l14": (8, 257, 1024), "b16": (8, 197, 768)}  # slots, rows, channels
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(model, dtype, device, B=4):
    S, N, C = SIZES[model]
    x, y, z = (torch.randn(B, S, N, C, device=device).to(dtype) for _ in range(3))
    bias, weight, shift = (torch.randn(C, device=device).to(dtype) for _ in range(3))
    share = torch.full((B, S), 1 / S, device=device)
    return x, y, z, bias, weight, shift, share, {"B": B, "S": S, "N": N, "C": C}


def drops(form, share, N):
    """factor, share"""
    return (share, share) if form == "space" else (share[:, :1, None].expand(-1, share.shape[1], N), None)


def case(model, form, dtype, device):
    x, y, out, bias, weight, shift, share, shape = tensors(model, dtype, device)
    factor, share = drops(form, share, shape["N"])
    constant = None if form == "space" else shift
    normed, options = torch.empty_like(out), {"bias": bias, "constant": constant, "factor": factor, "share": share}
    run = lambda: residual_norm(x, y, (weight, shift), **options, out=(out, normed))  # noqa: E731
    eager = lambda: reference(x, y, None, bias, constant, factor, share, weight, shift, 1e-5)  # noqa: E731
    shape["form"] = form
    return Case("residual_norm", shape, dtype, run, eager, bytes=nbytes(x, y, out, normed))


def backward_case(model, form, dtype, device):
    grad, grad_normed, value, _, weight, _, share, shape = tensors(model, dtype, device)
    factor, share = drops(form, share, shape["N"])
    shape["form"] = form
    stats = torch.randn(*value.shape[:3], 2, device=device).abs()
    args = (grad, grad_normed, value, stats, factor, share, weight, False, True, form == "time", True)
    run, eager = lambda: torch.ops.pyvidx.residual_norm_backward(*args), lambda: reference_backward(*args)  # noqa: E731
    return Case("residual_norm_backward", shape, dtype, run, eager, bytes=5 * nbytes(value))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("form", ["space", "time"])
@pytest.mark.parametrize("make", [case, backward_case], ids=["forward", "backward"])
def test_residual_norm(make, form, model, dtype, device, measure):
    measure(make(model, form, dtype, device))
