"""Masked token gathering with position and time rows: 77 of 256 patches kept (BT-Adapter's 70 % tube mask)."""

import pytest
import torch

from bench.harness import Case, nbytes
from pyvidx.ops.token_gather import reference, token_gather

CLIP = {"b16": (196, 768), "l14": (256, 1024)}  # patches, width
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(model, B, T, dtype, device):
    P, C = CLIP[model]
    K = P - int(0.7 * P)
    tokens = torch.randn(B, T, 1 + P, C, device=device).to(dtype)
    x = tokens[:, :, 1:]
    keep = torch.stack([torch.randperm(P)[:K].sort().values for _ in range(B)]).to(device)
    position, time = torch.randn(P, C, device=device).to(dtype), torch.randn(64, C, device=device).to(dtype)
    out = torch.empty(B, T, K, C, device=device, dtype=dtype)
    return Case(
        "token_gather",
        {"B": B, "T": T, "P": P, "K": K, "C": C},
        dtype,
        lambda: token_gather(x, keep, position, time, out=out),
        lambda: reference(x, keep, position, time),
        bytes=2 * nbytes(out) + nbytes(position, time[:T]),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("B, T", [(1, 8), (1, 16), (1, 32), (1, 64), (8, 8)], ids=lambda n: str(n))
@pytest.mark.parametrize("model", CLIP)
def test_token_gather(model, B, T, dtype, device, measure):
    measure(case(model, B, T, dtype, device))
