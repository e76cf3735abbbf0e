"""Gated branch fusion at BT-Adapter's shapes: into the branch's rows, with and without the next LayerNorm."""

import pytest
import torch

from bench.harness import Case, nbytes
from pyvidx.ops import fusion_input, gated_fusion
from pyvidx.ops import gated_fusion_reference as plain

CLIP = {"b16": (196, 768), "l14": (256, 1024)}  # patches, width
SIZES = [(1, 8), (1, 16), (1, 32), (1, 64), (8, 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(form, norm, model, B, T, dtype, device, keep=None):
    P, C = CLIP[model]
    K = P if keep is None else keep.shape[-1]

    def random(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    x, out = random(B, T, 1 + P, C), (random(B, T, K, C), random(B, C))
    affine = (random(C), random(C)) if norm else (None, None)
    options = {"keep": keep, "norm": (*affine, 1e-5) if norm else None}
    out = (*out, random(B, T, K, C)) if norm else out
    if form == "first":
        position, time, seed = random(1 + P, C), random(64, C), random(C)
        args = (x, None, seed, None, position, time, keep, *affine, 1.0, 1e-5, False)
        moved = 2 * nbytes(out[0]) + nbytes(position, time[:T])
        run = lambda: fusion_input(x, position, time, seed, out=out, **options)  # noqa: E731
    else:
        z, cls, gate = random(B, T, K, C), random(B, C), random(C) / 100
        args = (x, z, cls, gate, None, None, keep, *affine, 100.0, 1e-5, False)
        moved = 3 * nbytes(out[0])
        run = lambda: gated_fusion(x, z, cls, gate, out=out, **options)  # noqa: E731
    return Case(
        f"gated_fusion {form}{' + norm' if norm else ''}",
        {"B": B, "T": T, "P": P, "K": K, "C": C},
        dtype,
        run,
        lambda: plain.fuse(*args),
        bytes=moved + nbytes(*out[2:]) + nbytes(x[:, :, 0]),
    )


def backward_case(model, B, T, dtype, device, keep=None):
    """As in training beside a frozen backbone: every gradient but that of x, with the class rows in z."""
    P, C = CLIP[model]
    K = P if keep is None else keep.shape[-1]

    def random(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    x, z, gate, weight = random(B, T, 1 + P, C), random(B, T, 1 + K, C), random(C) / 100, random(C)
    stats = torch.randn(B, T, K, 2, device=device).abs()
    grads = random(B, T, K, C), random(B, C), random(B, T, K, C)
    flags = {"pair": False, "first": False, "packed": True, "need_x": False, "need_z": True, "need_gate": True}
    args = (*grads, None, x, z, None, gate, keep, None, weight, stats, T, P, 100.0, *flags.values())
    return Case(
        "gated_fusion_backward gate + norm",
        {"B": B, "T": T, "P": P, "K": K, "C": C},
        dtype,
        lambda: torch.ops.pyvidx.gated_fusion_backward(*args),
        lambda: plain.fuse_backward(*args),
        bytes=5 * nbytes(z),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("B, T", SIZES, ids=lambda n: str(n))
@pytest.mark.parametrize("model", CLIP)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_gate(norm, model, B, T, dtype, device, measure):
    measure(case("gate", norm, model, B, T, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("model", CLIP)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_first(norm, model, dtype, device, measure):
    measure(case("first", norm, model, 1, 16, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("model", CLIP)
def test_masked(model, dtype, device, measure):
    P = CLIP[model][0]
    keep = torch.stack([torch.randperm(P)[: P - int(0.7 * P)].sort().values for _ in range(8)]).to(device)
    measure(case("gate", True, model, 8, 8, dtype, device, keep))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("model", CLIP)
def test_backward(model, masked, dtype, device, measure):
    P = CLIP[model][0]
    keep = torch.stack([torch.randperm(P)[: P - int(0.7 * P)].sort().values for _ in range(4)]).to(device)
    measure(backward_case(model, 4, 8, dtype, device, keep if masked else None))
