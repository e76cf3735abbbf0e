"""Spatial and temporal pooling at the sizes of Video-ChatGPT (CLIP-L/14, 100 frames) and smaller; eager is two means.

Bytes are one read of x and the two results; the backward writes x's gradient.
"""

import pytest
import torch

from bench.harness import Case, nbytes
from pyvidx.ops.st_pool import reference, reference_backward, st_pool

CLIP = {"b16": (196, 768), "l14": (256, 1024)}  # patches, width
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 8), (1, 16), (1, 64), (1, 100), (8, 8)]
parametrize = pytest.mark.parametrize
names = {"ids": lambda d: str(d).removeprefix("torch.")}


def case(model, B, T, dtype, device):
    P, C = CLIP[model]
    x = torch.randn(B, T, 1 + P, C, device=device).to(dtype)[:, :, 1:]
    out = torch.empty(B, P, C, device=device, dtype=dtype), torch.empty(B, T, C, device=device, dtype=dtype)
    return Case(
        "st_pool",
        {"B": B, "T": T, "P": P, "C": C},
        dtype,
        lambda: st_pool(x, out=out),
        lambda: reference(x, None),
        bytes=nbytes(x, *out),
    )


def backward_case(model, B, T, dtype, device):
    P, C = CLIP[model]
    grads = torch.randn(B, P, C, device=device).to(dtype), torch.randn(B, T, C, device=device).to(dtype)
    return Case(
        "st_pool_backward",
        {"B": B, "T": T, "P": P, "C": C},
        dtype,
        lambda: torch.ops.pyvidx.st_pool_backward(*grads, None),
        lambda: reference_backward(*grads, None),
        bytes=nbytes(*grads) + B * T * P * C * dtype.itemsize,
    )


@parametrize("dtype", DTYPES, **names)
@parametrize("B, T", SIZES, ids=str)
@parametrize("model", CLIP)
def test_st_pool(model, B, T, dtype, device, measure):
    measure(case(model, B, T, dtype, device))


@parametrize("dtype", DTYPES, **names)
@parametrize("B, T", SIZES, ids=str)
@parametrize("model", CLIP)
def test_st_pool_backward(model, B, T, dtype, device, measure):
    measure(backward_case(model, B, T, dtype, device))
