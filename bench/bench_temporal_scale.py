"""ST-Adapter's depthwise convolution over time at its bottleneck of 384 channels; eager is the sum of shifted scales.

The public code goes through [B, C, T, H, W] and conv3d: `vs_conv3d`. Bytes are 2 passes over [B, T, P, C], backward 3.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from bench.harness import Case, interleaved, nbytes
from pyvidx.ops.temporal_scale import reference, reference_backward, temporal_scale

PATCHES = {"b16": 196, "l14": 256}
C, K = 384, 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 8), (1, 16), (1, 64), (8, 8)]
parametrize = pytest.mark.parametrize
names = {"ids": lambda d: str(d).removeprefix("torch.")}


def inputs(model, B, T, dtype, device):
    P = PATCHES[model]
    x, weight = torch.randn(B, T, P, C, device=device).to(dtype), torch.randn(C, K, device=device).to(dtype)
    return x, weight, torch.randn(C, device=device).to(dtype), {"B": B, "T": T, "P": P, "C": C, "K": K}


def conv3d(x, weight, bias):
    side = math.isqrt(x.shape[2])
    grid = x.unflatten(2, (side, side)).permute(0, 4, 1, 2, 3).contiguous()
    y = F.conv3d(grid, weight.view(C, 1, K, 1, 1), bias, padding=(K // 2, 0, 0), groups=C)
    return y.permute(0, 2, 3, 4, 1).contiguous()


def case(model, B, T, dtype, device, seconds=0.0):
    x, weight, bias, shape = inputs(model, B, T, dtype, device)
    out = torch.empty_like(x)
    run = lambda: temporal_scale(x, weight, bias, out=out)  # noqa: E731
    times = interleaved({"pyvidx": run, "conv3d": lambda: conv3d(x, weight, bias)}, device, seconds)
    ours, theirs = (sorted(t)[len(t) // 2] for t in times.values())
    return Case(
        "temporal_scale",
        shape,
        dtype,
        run,
        lambda: reference(x, weight, bias, None, None),
        bytes=nbytes(x, out),
        extra={"conv3d_ms": theirs * 1e3, "vs_conv3d": theirs / ours},
    )


def backward_case(model, B, T, dtype, device):
    x, weight, _, shape = inputs(model, B, T, dtype, device)
    grad = torch.randn_like(x)
    return Case(
        "temporal_scale_backward",
        shape,
        dtype,
        lambda: torch.ops.pyvidx.temporal_scale_backward(grad, x, weight, None),
        lambda: reference_backward(grad, x, weight, None),
        bytes=2 * nbytes(x) + nbytes(grad),
    )


@parametrize("dtype", DTYPES, **names)
@parametrize("B, T", SIZES, ids=str)
@parametrize("model", PATCHES)
def test_temporal_scale(model, B, T, dtype, device, measure, request):
    smallest = request.config.getoption("--smallest")
    measure(case(model, B, T, dtype, device, 0.0 if smallest else request.config.getoption("--seconds") / 2))


@parametrize("dtype", DTYPES, **names)
@parametrize("B, T", SIZES, ids=str)
@parametrize("model", PATCHES)
def test_temporal_scale_backward(model, B, T, dtype, device, measure):
    measure(backward_case(model, B, T, dtype, device))
