"""The memory bank's streaming step at MA-LMM's sizes: 257 tokens of width 1408, and 12 cached K and V of width 768.

Against the step as the published code takes it: similarities of the whole bank, and the shorter bank in new tensors.
"""

import itertools

import pytest
import torch

from bench.harness import Case, nbytes
from pyvidx.ops.memory_merge import memory_merge, memory_merge_, new_state, reference

N, C, KV = 257, 1408, 768
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def official_step(bank, sizes, frame, attached, attached_frame):
    """bank [B, M, N, C], sizes [B, M, N] float32: bank, sizes and attached rows after frame [B, N, C] has come in."""
    grown = torch.cat([bank, frame[:, None]], 1)
    counts = torch.cat([sizes, torch.ones_like(sizes[:, :1])], 1)
    k = torch.nn.functional.cosine_similarity(grown[:, :-1], grown[:, 1:], dim=-1).argmax(1, keepdim=True)  # [B, 1, N]
    kept = torch.arange(sizes.shape[1], device=k.device)[None, :, None]
    kept = kept + (kept > k)  # [B, M, N]
    total = counts.gather(1, kept).scatter_add_(1, k, counts.gather(1, k + 1))

    def merge(rows):
        width = (-1, -1, -1, rows.shape[-1])
        scaled = rows * counts[..., None].to(rows.dtype)
        out = scaled.gather(1, kept[..., None].expand(width))
        out.scatter_add_(1, k[..., None].expand(width), scaled.gather(1, (k + 1)[..., None].expand(width)))
        return out / total[..., None].to(rows.dtype)

    rows = [merge(torch.cat([a, f[:, None]], 1)) for a, f in zip(attached, attached_frame)]
    return merge(grown), total, rows


def step_case(B, M, dtype, layers, device, bank_dtype=None):
    """Every call is the next step: append, then at the next call merge. bank_dtype: of the bank's rows alone."""
    widths, kept = [KV] * 2 * layers, bank_dtype or dtype
    frames = torch.randn(16, B, N, C, device=device).to(dtype)
    projected = [torch.randn(B, N, width, device=device).to(dtype) for width in widths]
    state = new_state(B, M, N, C, kept, device, widths, dtype)
    for i in range(M + 1):
        memory_merge_(*state[:5], frames[i % 16], state.attached, projected)
    ours, theirs = itertools.cycle(frames), itertools.cycle(frames)
    old = [
        torch.randn(B, M, N, C, device=device).to(kept),
        torch.ones(B, M, N, device=device),
        [torch.randn(B, M, N, width, device=device).to(dtype) for width in widths],
    ]

    def eager():
        old[:] = official_step(old[0], old[1], next(theirs).to(kept), old[2], projected)

    shape = {"B": B, "M": M, "N": N, "C": C, "attached": len(widths)}
    shape |= {"bank": str(kept).removeprefix("torch.")} if kept != dtype else {}
    return Case("memory_merge_", shape, dtype,
                lambda: memory_merge_(*state[:5], next(ours), state.attached, projected), eager,
                bytes=nbytes(frames[0]) + 7 * nbytes(state.bank[:, 0]) + 5 * nbytes(*projected), compiled=False,
                footprint=nbytes(state.bank, frames, *state.attached, *projected))  # fmt: skip


def merge_case(B, T, dtype, device):
    bank, sizes = torch.randn(B, T, N, C, device=device).to(dtype), torch.ones(B, T, N, device=device)
    return Case("memory_merge", {"B": B, "T": T, "N": N, "C": C}, dtype, lambda: memory_merge(bank, sizes),
                lambda: reference(bank, sizes, True), bytes=2 * nbytes(bank) - nbytes(bank[:, 0]))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("M", [10, 20, 40])
@pytest.mark.parametrize("layers", [0, 6])
def test_memory_merge_(layers, M, dtype, device, measure):
    measure(step_case(1, M, dtype, layers, device))


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=lambda d: str(d).removeprefix("torch."))
def test_memory_merge_of_models(dtype, device, measure):
    """A model in 16 bits, whose bank is in float32."""
    measure(step_case(1, 20, dtype, 6, device, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_memory_merge(dtype, device, measure):
    measure(merge_case(1, 21, dtype, device))
