"""Temporal attention at the sizes of CLIP-B/16 and CLIP-L/14: eager is reshape, matmul, softmax, matmul; also SDPA.

Bytes are 4 passes over [B, T, P, C], backward 7. On a CPU the arithmetic (4 T^2 D flops per position and head, backward
10 T^2 D) outweighs them from T = 16 on: read `gflops` against the core's FMA peak there.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.harness import Case, interleaved, nbytes
from pyvidx.ops.temporal_attention import reference, reference_backward, temporal_attention

CLIP = {"b16": (196, 12), "l14": (256, 16)}  # patches, heads of width 64
D = 64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 8), (1, 16), (1, 32), (1, 64), (8, 8)]
parametrize = pytest.mark.parametrize
names = {"ids": lambda d: str(d).removeprefix("torch.")}


def sdpa(qkv):
    B, T, P, _, H, D = qkv.shape
    q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).reshape(3, B * P, H, T, D)
    return scaled_dot_product_attention(q, k, v).view(B, P, H, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, P, H * D)


def case(model, B, T, dtype, device, seconds=0.0):
    P, H = CLIP[model]
    qkv = torch.randn(B, T, P, 3, H, D, device=device).to(dtype)
    out = torch.empty(B, T, P, H * D, device=device, dtype=dtype)
    run = lambda: temporal_attention(qkv, out=out)  # noqa: E731
    times = interleaved({"pyvidx": run, "sdpa": lambda: sdpa(qkv)}, device, seconds)
    ours, theirs = (sorted(t)[len(t) // 2] for t in times.values())
    return Case(
        "temporal_attention",
        {"B": B, "T": T, "P": P, "H": H, "D": D},
        dtype,
        run,
        lambda: reference(qkv, D**-0.5),
        bytes=nbytes(qkv, out),
        flops=4 * B * P * H * T * T * D,
        extra={"sdpa_ms": theirs * 1e3, "vs_sdpa": theirs / ours},
    )


def backward_case(model, B, T, dtype, device):
    P, H = CLIP[model]
    qkv = torch.randn(B, T, P, 3, H, D, device=device).to(dtype)
    grad_out = torch.randn(B, T, P, H * D, device=device).to(dtype)
    return Case(
        "temporal_attention_backward",
        {"B": B, "T": T, "P": P, "H": H, "D": D},
        dtype,
        lambda: torch.ops.pyvidx.temporal_attention_backward(grad_out, qkv, D**-0.5),
        lambda: reference_backward(grad_out, qkv, D**-0.5),
        bytes=2 * nbytes(qkv) + nbytes(grad_out),
        flops=10 * B * P * H * T * T * D,
    )


@parametrize("dtype", DTYPES, **names)
@parametrize("B, T", SIZES, ids=str)
@parametrize("model", CLIP)
def test_temporal_attention(model, B, T, dtype, device, measure, request):
    smallest = request.config.getoption("--smallest")
    measure(case(model, B, T, dtype, device, 0.0 if smallest else request.config.getoption("--seconds") / 2))


@parametrize("dtype", DTYPES, **names)
@parametrize("B, T", SIZES, ids=str)
@parametrize("model", CLIP)
def test_temporal_attention_backward(model, B, T, dtype, device, measure):
    measure(backward_case(model, B, T, dtype, device))
