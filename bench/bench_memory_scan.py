"""A clip through the memory bank, and its merges on one layer's keys and values, at MA-LMM's sizes: 257 tokens; and a
clip through the policy merge, `extend` against a loop of pushes.

Against the steps one by one: t calls of memory_merge_, and of memory_merge_ on the layer's rows alone. Floors: the scan
reads the clip and those of the bank's rows that a step merges or compares, and writes its plan and the slots that
changed; the replay reads M + 1 + t rows per position and writes M + 1 + 2t and those slots that changed.
"""

import pytest
import torch

from bench.harness import Case, nbytes
from pyvidx.memory import create
from pyvidx.ops.memory_merge import memory_merge_, new_state
from pyvidx.ops.memory_scan import memory_replay_, memory_scan_

T, N, C, KV = 16, 257, 1408, 1536
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(M, width, dtype, device, bank=torch.float32):
    """A full memory with one attached tensor, a clip, and the clip's rows for it."""
    state = new_state(1, M, N, C, bank, device, [width], dtype)
    clip = torch.randn(1, T, N, C, device=device).to(bank)
    rows = torch.randn(1, T, N, width, device=device).to(dtype)
    for i in range(M + 1):
        memory_merge_(*state[:5], clip[:, i % T], state.attached, [rows[:, i % T]])
    return state, clip, rows


def bank_rows(plan, before):
    """How many rows of a full bank a scan must read, and how many it changes. before: ids [B, N, M+1] in time order."""
    tables = torch.cat([before[:, None], plan.table], 1)
    slots, read = tables.shape[3], torch.zeros_like(before, dtype=torch.bool)
    for s in range(T):
        ids = tables[:, s]
        k = (ids == plan.sources[:, s, :, :1]).long().argmax(2, keepdim=True)
        for entry in (k - 1, k, k + 1, k + 2, torch.full_like(k, slots - 1)):  # the pair, its neighbors, the newest
            named = ids.gather(2, entry.clamp(0, slots - 1))
            read |= torch.zeros_like(read).scatter_(2, named.clamp_max(slots - 1).long(), named < slots)
    return int(read.sum()), int((tables[:, -1] >= slots).sum())


def scan_case(M, device, dtype=torch.float32):
    state, clip, _ = inputs(M, 1, dtype, device, dtype)
    other, _, _ = inputs(M, 1, dtype, device, dtype)

    def eager():
        for s in range(T):
            memory_merge_(*other[:5], clip[:, s])

    before = state.order.clone()
    plan = memory_scan_(*state[:5], clip)
    rows = sum(bank_rows(plan, before)) * C * clip.element_size()
    return Case("memory_scan_", {"B": 1, "T": T, "M": M, "N": N, "C": C}, dtype,
                lambda: memory_scan_(*state[:5], clip), eager, compiled=False,
                bytes=nbytes(clip, *plan) + rows)  # fmt: skip


def replay_case(M, dtype, device):
    state, clip, rows = inputs(M, KV, dtype, device)
    other = state.attached[0].clone()
    plan = memory_scan_(*state[:5], clip)
    no_bank, no_frame = torch.zeros(1, M + 1, N, 1, device=device), torch.zeros(1, N, 1, device=device)
    out = torch.empty(1, M + 1 + 2 * T, N, KV, dtype=dtype, device=device)

    def eager():
        for s in range(T):
            memory_merge_(no_bank, *state[1:5], no_frame, [other], [rows[:, s]])

    order = state.order.clone()  # eager's goes on
    changed = int((plan.table[:, -1] >= M + 1).sum()) * KV * rows.element_size()
    return Case("memory_replay_", {"B": 1, "T": T, "M": M, "N": N, "W": KV}, dtype,
                lambda: memory_replay_(state.attached[0], rows, plan, order, out=out), eager, compiled=False,
                bytes=nbytes(state.attached[0], rows, out) + changed)  # fmt: skip


def extend_case(n, width, device):
    """A clip of 100 frames of n tokens through `extend` of the policy merge, against a loop of its pushes."""
    policy, frames, M = create("merge", capacity=20), torch.randn(1, 100, n, width, device=device), 20

    def new():
        return policy.new(1, n, width, device=device)

    def eager():
        bank = new()
        for t in range(100):
            bank = policy.push(bank, frames[:, t])

    return Case("memory.extend", {"B": 1, "T": 100, "M": M, "N": n, "C": width}, torch.float32,
                lambda: policy.extend(new(), frames), eager, compiled=False, graph=False,
                bytes=nbytes(frames, frames[:, : M + 1]))  # fmt: skip


@pytest.mark.parametrize("n, width", [(1, 1408), (32, 768), (196, 768), (257, 1408)])
def test_memory_extend(n, width, device, measure):
    measure(extend_case(n, width, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("M", [10, 20, 40])
def test_memory_scan_(M, dtype, device, measure):
    measure(scan_case(M, device, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("M", [10, 20, 40])
def test_memory_replay_(M, dtype, device, measure):
    measure(replay_case(M, dtype, device))
