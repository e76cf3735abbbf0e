"""residual_norm over the branch's rows of CLIP-L/14 and B/16, T = 8, masked training and whole clips, and its gradient.

"space": BT-Adapter's branch, with a class row in every slot and DropPath by slot. "plain": a block of CLIP.
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
    weight, shift = (torch.randn(C, device=device).to(dtype) for _ in range(2))
    share = torch.full((B, S), 1 / S, device=device)
    return x, y, z, weight, shift, share, {"B": B, "S": S, "N": N, "C": C}


def case(model, form, dtype, device):
    x, y, out, weight, shift, share, shape = tensors(model, dtype, device)
    share, normed = share if form == "space" else None, torch.empty_like(out)
    run = lambda: residual_norm(x, y, (weight, shift), factor=share, share=share, out=(out, normed))  # noqa: E731
    eager = lambda: reference(x, y, None, share, share, weight, shift, 1e-5)  # noqa: E731
    shape["form"] = form
    return Case("residual_norm", shape, dtype, run, eager, bytes=nbytes(x, y, out, normed))


def backward_case(model, form, dtype, device):
    grad, grad_normed, value, weight, _, share, shape = tensors(model, dtype, device)
    share = share if form == "space" else None
    shape["form"] = form
    stats = torch.randn(*value.shape[:3], 2, device=device).abs()
    args = (grad, grad_normed, value, stats, share, share, weight, False, share is not None)
    run, eager = lambda: torch.ops.pyvidx.residual_norm_backward(*args), lambda: reference_backward(*args)  # noqa: E731
    passes = 4 if share is None else 5  # of a plain sum x and y have one gradient
    return Case("residual_norm_backward", shape, dtype, run, eager, bytes=passes * nbytes(value))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("form", ["space", "plain"])
@pytest.mark.parametrize("make", [case, backward_case], ids=["forward", "backward"])
def test_residual_norm(make, form, model, dtype, device, measure):
    measure(make(model, form, dtype, device))
