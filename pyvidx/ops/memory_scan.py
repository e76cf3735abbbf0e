"""A whole clip through a memory bank in one launch, and its merges applied to other rows (MA-LMM, arXiv:2404.05726)."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyvidx.ops._library import define, require, require_floating, require_out
from pyvidx.ops.memory_merge import check_state, reference_step, require_permutation, weighted_mean


class MergePlan(NamedTuple):
    """What t steps of a memory bank did at every position (b, n), and what was stored after each.

    Rows are named by ids, their places in an extended list of E = M + 1 + 2t rows: 0..M what the M + 1 slots held
    before, M + 1 + s frame s of these t, M + 1 + t + s the row that step s merged.
    """

    table: Tensor  # [B, t, N, M+1]  int32, the rows stored after step s in time order, -1 beyond the length
    sources: Tensor  # [B, t, N, 2]    int32, the two rows merged at step s, -1 where nothing merged
    counts: Tensor  # [B, t, N, 2]    int32, frames in each of them, 0 where nothing merged


def memory_scan_(
    bank: Tensor,
    sizes: Tensor,
    order: Tensor,
    similarity: Tensor,
    length: Tensor,
    frames: Tensor,
    *,
    weighted: bool = True,
    active: Tensor | None = None,
) -> MergePlan:
    """t streaming steps of a memory bank at once, in place: memory_merge_ with each of t frames, in one launch.

    Positions are independent, so each walks all frames by itself: a merge where its bank is full, then the frame. The
    state ends as t calls leave it, bit for bit (on CUDA if a frame alone is as aligned as the clip). The attention at
    step s reads the rows that `table[:, s]` names.

    Args:
        bank, sizes, order, similarity, length: as in memory_merge_, those of a MemoryState: `memory_scan_(*state[:5],
            frames)`. On CUDA M is at most some thousands (16 (M + 1) bytes of shared memory).
        frames: [B, t, N, C], t >= 1, dtype of bank, any strides.
        weighted: weigh by sizes; False: the plain mean of the two entries.
        active: bool [B], videos to advance; the others stay as they are. None: all.

    Returns:
        The MergePlan. For an inactive video the table repeats what it holds, and nothing merges. Not differentiable.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit, two tensors share memory, or a gradient is asked for.
        IndexError: length is out of range or order no permutation (CPU; on CUDA one out of range stops the kernel).
    """
    name = "memory_scan_"
    check_state(name, bank, sizes, order, similarity, length, active)
    require_floating(name, bank=bank, frames=frames, autocast=False)
    B, _, N, C = bank.shape
    fits = frames.dim() == 4 and frames.shape[1] >= 1 and frames.shape == (B, frames.shape[1], N, C)
    require(fits, f"{name}: frames must be [B, t, N, C] of bank with t >= 1", frames, bank)
    _require_no_gradient(name, bank, similarity, frames)
    active = None if active is None else active.to(torch.int32)
    return MergePlan(*_op_scan(bank, sizes, order, similarity, length, frames, weighted, active))


def memory_replay_(
    rows: Tensor,
    frames: Tensor,
    plan: MergePlan,
    order: Tensor,
    *,
    weighted: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """The t steps of a MergePlan for rows that follow those of the bank, such as cached keys and values, in place.

    rows end as t calls of memory_merge_ would leave them as `attached`, bit for bit in the slots in use; what attention
    reads at the steps in between is in the list that is returned.

    Args:
        rows: [B, M+1, N, W], any floating dtype, by slot, as they were before the scan. Any strides but the last,
            which is 1.
        frames: [B, t, N, W], dtype of rows, any strides.
        plan: of memory_scan_.
        order: int32 [B, N, M+1], of the state after the scan.
        weighted: as the scan was called.
        out: [B, M+1+2t, N, W] to write into, its last stride 1, or None for a new tensor.

    Returns:
        [B, M+1+2t, N, W], dtype of rows: rows as they were, frames, and the row each step merged, zeros where it merged
        none. Not differentiable.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit, two tensors share memory, or a gradient is asked for.
        IndexError: the plan names a row that its step cannot know, or order is no permutation (CPU; on CUDA what is out
            of range stops the kernel).
    """
    name = "memory_replay_"
    require(rows.dim() == 4 and frames.dim() == 4, f"{name}: rows and frames must have 4 dimensions", rows, frames)
    require_floating(name, rows=rows, frames=frames, autocast=False)
    B, slots, N, W = rows.shape
    t = frames.shape[1]
    fits = frames.shape == (B, t, N, W) and t >= 1
    require(fits, f"{name}: frames must be [B, t, N, W] of rows with t >= 1", frames, rows)
    require(rows.stride(-1) == 1 or W <= 1, f"{name}: the last stride of rows must be 1", rows)
    pairs, last = (B, t, N, 2), (B, N, slots)
    shapes = {"plan.table": (B, t, N, slots), "plan.sources": pairs, "plan.counts": pairs, "order": last}
    for (what, shape), x in zip(shapes.items(), (*plan, order)):
        fits = x.shape == shape and x.dtype == torch.int32 and x.device == rows.device
        text = "{name}: {what} must be torch.int32 {shape} on the device of rows"
        require(fits, text, x, frames, name=name, what=what, shape=list(shape))
    _require_no_gradient(name, rows, frames)
    shape = (B, slots + 2 * t, N, W)
    if out is None:
        out = rows.new_empty(shape)
    else:
        require_out(name, out, shape, rows, rows, frames)
    _op_replay(rows, frames, *plan, order, weighted, out)
    return out


def _require_no_gradient(name: str, *tensors: Tensor) -> None:
    wants = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    require(not wants, f"{name}: it has no gradient; detach its inputs, or call it under torch.no_grad()")


def reference_scan(bank, sizes, order, similarity, length, frames, weighted, active):
    slots, t = bank.shape[1], frames.shape[1]
    require_permutation("memory bank", order)
    entry = torch.arange(slots, device=bank.device)
    table = order.where(entry < length[:, None, None], -1)  # [B, N, M+1]
    on = torch.ones_like(length, dtype=torch.bool) if active is None else active != 0
    tables, sources, counts = [], [], []
    for s in range(t):
        was = sizes.gather(2, order.long())
        k = reference_step(bank, sizes, order, similarity, length, frames[:, s], (), (), weighted, active)
        merged = (k >= 0)[..., None]
        pair = torch.stack([k, k + 1], 2).clamp_min(0).long()
        sources.append(table.gather(2, pair).where(merged, -1))
        counts.append(was.gather(2, pair).where(merged, 0))
        shorter = table.gather(2, (entry + (entry > k[..., None])).clamp_max(slots - 1))
        shorter = torch.where(entry == k[..., None], slots + t + s, shorter)
        table = torch.where(merged, shorter, table)
        newest = (entry == length[:, None, None] - 1) & on[:, None, None]
        table = torch.where(newest, slots + s, table)
        tables.append(table)
    return tuple(torch.stack(x, 1).to(torch.int32) for x in (tables, sources, counts))


def reference_replay(rows, frames, sources, counts, weighted):
    slots, t = rows.shape[1], frames.shape[1]
    extended = torch.cat([rows, frames, torch.zeros_like(frames)], 1)

    def at(ids):  # [B, N] -> [B, N, W]
        return extended.gather(1, ids.clamp_min(0).long()[:, None, :, None].expand(-1, -1, -1, rows.shape[3]))[:, 0]

    for s in range(t):
        (first, second), (x, y) = sources[:, s].unbind(2), counts[:, s].unbind(2)
        mean = weighted_mean(at(first), at(second), x, y, weighted)
        extended[:, slots + t + s] = mean.where((first >= 0)[..., None], 0)
    return extended


def _fake_scan(bank, sizes, order, similarity, length, frames, weighted, active):
    (B, slots, N), t = bank.shape[:3], frames.shape[1]
    return tuple(bank.new_empty(B, t, N, n, dtype=torch.int32) for n in (slots, 2, 2))


def _require_plan(table, sources, order):
    """The plan names rows that are there; asked on the CPU alone, as in require_index."""
    slots, t = table.shape[3], table.shape[1]
    if table.device.type != "cpu" or torch.compiler.is_compiling():
        return
    s = torch.arange(t)[:, None, None]  # beside [B, t, N, 2]
    merged = (sources >= slots + t) & (sources < slots + t + s)
    there = ((sources >= 0) & (sources < slots + s)) | merged | (sources == -1).all(3, keepdim=True)
    if not there.all():
        raise IndexError("memory_replay_: sources must be rows from before their step")
    last = table[:, -1]
    fits = (order.sort(2).values == torch.arange(slots)).all()
    fits &= ((last < 0) | (last == order) | ((last >= slots) & (last < slots + 2 * t))).all()
    if not fits:
        raise IndexError("memory_replay_: table and order must be those after the scan")


def _reference_replay_(rows, frames, table, sources, counts, order, weighted, out):
    _require_plan(table, sources, order)
    out.copy_(reference_replay(rows, frames, sources, counts, weighted))
    slot = order.transpose(1, 2).long()  # [B, M+1, N]
    last = table[:, -1].transpose(1, 2).long()
    source = torch.where(last >= 0, last, slot)  # the list begins with the slots as they were
    b = torch.arange(rows.shape[0], device=rows.device)[:, None, None]
    n = torch.arange(rows.shape[2], device=rows.device)
    rows[b, slot, n] = out[b, source, n]


_op_scan = define(
    "memory_scan_(Tensor(a!) bank, Tensor(b!) sizes, Tensor(c!) order, Tensor(d!) similarity, Tensor(e!) length, "
    "Tensor frames, bool weighted, Tensor? active) -> (Tensor table, Tensor sources, Tensor counts)",
    reference=reference_scan,
    fake=_fake_scan,
)
_op_replay = define(
    "memory_replay_(Tensor(a!) rows, Tensor frames, Tensor table, Tensor sources, Tensor counts, Tensor order, "
    "bool weighted, Tensor(b!) out) -> ()",
    reference=_reference_replay_,
    fake=lambda rows, frames, table, sources, counts, order, weighted, out: None,
)
