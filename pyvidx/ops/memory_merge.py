"""Merging the most similar neighbors of a memory bank (MA-LMM, arXiv:2404.05726, section 3.2), in place or not."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyvidx.ops._library import FLOATING, LOW, define, require, require_floating, require_index

EPS = 1e-8  # the least norm a cosine divides by


class MemoryState(NamedTuple):
    """A memory bank of at most M entries (M + 1 between a step and its merge), on M + 1 slots. Made by new_state.

    An entry never moves: merging rewrites one slot and frees another, the next frame lands in the free one.
    """

    bank: Tensor  # [B, M+1, N, C]   rows by slot
    sizes: Tensor  # [B, N, M+1]      int32, frames merged into each slot, 0 if free
    order: Tensor  # [B, N, M+1]      int32, a permutation: the first `length` slots in time order
    similarity: Tensor  # [B, N, M]        float32, cosines between consecutive entries
    length: Tensor  # [B]              int32, entries stored; on the device, so videos may be ragged
    attached: tuple[Tensor, ...] = ()  # [B, M+1, N, Ci]  rows that merge with those of the bank


def new_state(
    B: int,
    M: int,
    N: int,
    C: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attached_widths: Sequence[int] = (),
    attached_dtype: torch.dtype | None = None,
) -> MemoryState:
    """An empty memory of M entries for B videos with N positions of width C, and one attached tensor per width.

    Keep the bank in float32: the similarities of 16-bit rows choose other pairs. The attached may be 16-bit.
    """
    sizes = (B, M, N, C)
    require(min(sizes) >= 1, "new_state: B, M, N and C must be at least 1, got {sizes}", sizes=sizes)
    slots = torch.arange(M + 1, dtype=torch.int32, device=device)
    return MemoryState(
        bank=torch.zeros(B, M + 1, N, C, dtype=dtype, device=device),
        sizes=torch.zeros(B, N, M + 1, dtype=torch.int32, device=device),
        order=slots.expand(B, N, M + 1).contiguous(),
        similarity=torch.zeros(B, N, M, dtype=torch.float32, device=device),
        length=torch.zeros(B, dtype=torch.int32, device=device),
        attached=tuple(
            torch.zeros(B, M + 1, N, width, dtype=attached_dtype or dtype, device=device) for width in attached_widths
        ),
    )


def in_order(state: MemoryState, length: int | None = None) -> tuple[Tensor, Tensor]:
    """The stored rows of a memory in time order, as new tensors.

    Args:
        length: L, entries to read per video. None: that of the longest video, which waits for the device.

    Returns:
        rows [B, L, N, C] and sizes [B, L, N] int32. A video shorter than L ends in rows of zeros with size 0.
    """
    L = int(state.length.max()) if length is None else length
    sizes = state.sizes.gather(2, state.order[..., :L].long()).transpose(1, 2)
    return rows_in_order(state.bank, state.order, L).where(sizes[..., None] > 0, 0), sizes


def rows_in_order(rows: Tensor, order: Tensor, length: int) -> Tensor:
    """The first `length` entries [B, length, N, Ci] of a bank or an attached tensor [B, M+1, N, Ci]."""
    index = order[..., :length].long().transpose(1, 2)[..., None]  # [B, L, N, 1]
    return rows.gather(1, index.expand(-1, -1, -1, rows.shape[-1]))


def memory_merge_(
    bank: Tensor,
    sizes: Tensor,
    order: Tensor,
    similarity: Tensor,
    length: Tensor,
    frame: Tensor | None = None,
    attached: Sequence[Tensor] = (),
    attached_frame: Sequence[Tensor] = (),
    *,
    weighted: bool = True,
    active: Tensor | None = None,
) -> Tensor:
    """One streaming step of a memory bank, in place: merge where it is full, then append a frame.

    At every position (b, n) whose bank holds M + 1 entries e[0..M] in time order, with s[j] frames in entry j,

        k = argmax_j cos(e[j], e[j+1]),  e[k] <- (s[k] e[k] + s[k+1] e[k+1]) / (s[k] + s[k+1]),  s[k] <- s[k] + s[k+1]

    and e[k+1] is gone; the first k wins a tie, a NaN wins over all. Then, if given, the frame becomes the last entry,
    of size 1. (MA-LMM, equations 6 and 7; equation 7 prints the plain mean, `weighted=False`; the published code and
    this default take the mean of all frames.) MA-LMM appends, attends and then merges: that is this function with a
    frame, the attention, and at the next frame the merge. Calling it without a frame brings the merge forward.

    Rows stay in their slots and similarities are cached, so a step moves 8 rows per position whatever M is. Nothing is
    read back by the host: ragged videos, streams and CUDA graphs work. The tensors are those of a MemoryState:
    `memory_merge_(*state[:5], frame, state.attached, frames)`.

    Args:
        bank: [B, M+1, N, C], any floating dtype and strides, but the last stride is 1. As in all other arguments that
            are written, no two elements share memory.
        sizes: int32 [B, N, M+1], frames merged into each slot, 0 if free. On CUDA M is at most some thousands: it takes
            12 (M + 1) bytes of shared memory.
        order: int32 [B, N, M+1], a permutation of the slots, the stored ones first, in time order.
        similarity: float32 [B, N, M], cosines between consecutive entries, each norm at least 1e-8.
        length: int32 [B], entries stored.
        frame: [B, N, C], dtype of bank, or None: only merge. For a float32 bank it may have 16 bits: the result is that
            of the frame cast to float32, bit for bit.
        attached: tensors [B, M+1, N, Ci], of any dtype and width each, whose rows merge with the same k and weights
            (cached keys and values: an affine map of the rows stays one, because the weights sum to 1).
        attached_frame: [B, N, Ci] for each of attached, or empty without a frame.
        weighted: weigh by sizes; False: the plain mean of the two entries.
        active: bool [B], videos to advance; the others stay as they are. None: all.

    Returns:
        index: int32 [B, N], the k that merged, -1 where nothing did. Not differentiable.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit, two tensors share memory, or a gradient is asked
            for: memory_merge has one.
        IndexError: length is out of range or order no permutation (CPU; on CUDA a number out of range, or a length that
            is not the number of slots in use, stops the kernel).
    """
    attached, attached_frame = list(attached), list(attached_frame)
    _check_step(bank, sizes, order, similarity, length, frame, attached, attached_frame, active)
    active = None if active is None else active.to(torch.int32)
    return _op_step(bank, sizes, order, similarity, length, frame, attached, attached_frame, weighted, active)


def memory_merge(bank: Tensor, sizes: Tensor, *, weighted: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Shorten a memory bank by one entry at every position: one merge of memory_merge_, of rows in time order.

    Args:
        bank: [B, T, N, C], T >= 2 entries in time order, any strides.
        sizes: [B, T, N] float32 or int32, frames merged into each entry.
        weighted: weigh by sizes; False: the plain mean of the two entries.

    Returns:
        out: [B, T-1, N, C], dtype of bank. Differentiable in bank (the choice of the pair is taken as constant).
        out_sizes: [B, T-1, N], dtype of sizes; its sum over T is that of sizes.
        index: int32 [B, N], the first of the two entries that merged.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    require(bank.dim() == 4 and bank.shape[1] >= 2, "memory_merge: bank must be [B, T, N, C] with T >= 2", bank)
    require_floating("memory_merge", bank=bank)
    fits = sizes.shape == bank.shape[:3] and sizes.dtype in (torch.float32, torch.int32) and sizes.device == bank.device
    require(fits, "memory_merge: sizes must be [B, T, N] of bank, float32 or int32, on its device", sizes, bank)
    require(not sizes.requires_grad, "memory_merge: sizes are counts and have no gradient; detach them")
    return _op(bank, sizes, weighted)


def takes_frame(bank: Tensor, frame: Tensor) -> bool:
    """Whether memory_merge_ takes a frame of this dtype for this bank as it is."""
    return frame.dtype == bank.dtype or (bank.dtype == torch.float32 and frame.dtype in LOW)


def check_state(name, bank, sizes, order, similarity, length, active):
    """What every op that changes a MemoryState in place asks of it."""
    require(bank.dim() == 4 and bank.shape[1] >= 2, f"{name}: bank must be [B, M+1, N, C] with M >= 1", bank)
    require_floating(name, bank=bank)
    B, slots, N, _ = bank.shape

    def state(what, tensor, shape, dtype):
        fits = tensor.shape == shape and tensor.dtype == dtype and tensor.device == bank.device
        text = "{name}: {what} must be {dtype} {shape} on the device of bank"
        require(fits, text, tensor, bank, name=name, what=what, dtype=dtype, shape=shape)

    state("sizes", sizes, (B, N, slots), torch.int32)
    state("order", order, (B, N, slots), torch.int32)
    state("similarity", similarity, (B, N, slots - 1), torch.float32)
    state("length", length, (B,), torch.int32)
    if active is not None:
        state("active", active, (B,), torch.bool)
    _check_rows(name, bank)


def _check_rows(name, *tensors):
    for rows in tensors:
        require(
            rows.stride(3) == 1 or rows.shape[3] <= 1,
            f"{name}: rows are changed in place: their stride must be 1",
            rows,
        )


def _check_step(bank, sizes, order, similarity, length, frame, attached, attached_frame, active):
    name = "memory_merge_"
    check_state(name, bank, sizes, order, similarity, length, active)
    fits = frame is None or (takes_frame(bank, frame) and frame.device == bank.device)
    text = f"{name}: frame must have the dtype of bank, or 16 bits where bank is float32, and its device"
    require(fits, text, frame, bank)
    B, slots, N, C = bank.shape
    require(frame is None or frame.shape == (B, N, C), f"{name}: frame must be [B, N, C] of bank", frame, bank)
    one_each = len(attached_frame) == (0 if frame is None else len(attached))
    require(one_each, f"{name}: with a frame, attached_frame must hold one frame per attached tensor, without one none")
    for i, rows in enumerate(attached):
        fits = rows.dim() == 4 and rows.shape[:3] == (B, slots, N) and rows.dtype in FLOATING
        require(
            fits and rows.device == bank.device,
            f"{name}: attached[{i}] must be a floating [B, M+1, N, Ci] on the device of bank",
            rows,
            bank,
        )
    for i, (rows, new) in enumerate(zip(attached, attached_frame)):
        require(
            new.shape == (B, N, rows.shape[3]) and new.dtype == rows.dtype and new.device == rows.device,
            f"{name}: attached_frame[{i}] must be [B, N, Ci] with the dtype and device of attached[{i}]",
            new,
            rows,
        )
    _check_rows(name, *attached)
    if torch.is_grad_enabled():
        wants = any(t.requires_grad for t in (bank, similarity, *attached, *attached_frame)) or (
            frame is not None and frame.requires_grad
        )
        require(not wants, f"{name}: the step in place has no gradient; detach its inputs, or call memory_merge")


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine similarity over the last dimension, as torch.nn.functional.cosine_similarity since 1.13."""
    x, y = (v / v.norm(dim=-1, keepdim=True).clamp_min(EPS) for v in (x, y))
    return (x * y).sum(-1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def weighted_mean(x: Tensor, y: Tensor, sx: Tensor, sy: Tensor, weighted: bool) -> Tensor:
    """x, y [..., C], their sizes [...]; the mean has the dtype of x."""
    x_, y_ = _wide(x), _wide(y)
    if not weighted:
        return ((x_ + y_) / 2).to(x.dtype)
    sx, sy = sx[..., None].to(x_.dtype), sy[..., None].to(x_.dtype)
    return ((x_ * sx + y_ * sy) / (sx + sy)).to(x.dtype)


def _row(rows: Tensor, slot: Tensor) -> Tensor:
    """rows [B, M+1, N, C] at slot [B, N] -> [B, N, C]"""
    return rows.gather(1, slot[:, None, :, None].expand(-1, -1, -1, rows.shape[3])).squeeze(1)


def _set_row(rows: Tensor, slot: Tensor, new: Tensor, where: Tensor) -> None:
    """rows[slot] = new at the positions where [B, 1] holds, in place."""
    new = torch.where(where[..., None], new, _row(rows, slot))
    rows.scatter_(1, slot[:, None, :, None].expand(-1, -1, -1, rows.shape[3]), new[:, None])


def _set(values: Tensor, index: Tensor, new: Tensor, where: Tensor) -> None:
    """values [B, N, L] at index [B, N] = new [B, N] where [B, N] holds, in place; index may lie outside there."""
    index = index.clamp(0, values.shape[2] - 1)[..., None]
    values.scatter_(2, index, torch.where(where[..., None], new[..., None].to(values.dtype), values.gather(2, index)))


def require_permutation(op: str, order: Tensor) -> None:
    """order [B, N, M+1] holds each slot once; asked on the CPU alone, as in require_index."""
    if order.device.type == "cpu" and not torch.compiler.is_compiling():
        slots = torch.arange(order.shape[2], dtype=order.dtype)
        if not torch.equal(order.sort(2).values, slots.expand_as(order)):
            raise IndexError(f"{op}: order must hold each of the slots 0 .. M")


def reference_step(bank, sizes, order, similarity, length, frame, attached, attached_frame, weighted, active):
    M = similarity.shape[2]
    require_index("memory bank: length must be", length, M + 2)
    require_permutation("memory bank", order)
    on = torch.ones_like(length, dtype=torch.bool) if active is None else active != 0
    full = (on & (length == M + 1))[:, None]  # [B, 1]
    k = similarity.argmax(2)  # [B, N]
    at = lambda e: order.gather(2, e.clamp(0, M)[..., None]).squeeze(2).long()  # noqa: E731  slot of entry e [B, N]
    keep, gone = at(k), at(k + 1)
    s_keep, s_gone = sizes.gather(2, keep[..., None]).squeeze(2), sizes.gather(2, gone[..., None]).squeeze(2)
    for rows in (bank, *attached):
        _set_row(rows, keep, weighted_mean(_row(rows, keep), _row(rows, gone), s_keep, s_gone, weighted), full)
    every = full.expand_as(k)
    _set(sizes, keep, s_keep + s_gone, every)
    _set(sizes, gone, torch.zeros_like(s_gone), every)
    entry = torch.arange(M + 1, device=bank.device)
    shifted = order.gather(2, (entry + (entry > k[..., None])).clamp_max(M))
    shifted[..., M] = gone
    order.copy_(torch.where(full[..., None], shifted, order))
    moved = similarity.gather(2, (entry[:M] + (entry[:M] >= k[..., None])).clamp_max(M - 1))
    moved[..., M - 1] = 0
    similarity.copy_(torch.where(full[..., None], moved, similarity))
    for e in (k - 1, k):  # the pairs (e, e + 1) around entry k
        value = cosine(_wide(_row(bank, at(e))), _wide(_row(bank, at(e + 1))))
        _set(similarity, e, value, full & (e >= 0) & (e + 1 < M))
    length -= full.squeeze(1).to(length.dtype)
    if frame is not None:
        last = (length[:, None].long() - 1).expand_as(k)
        target = at(last + 1)
        _set(similarity, last, cosine(_wide(_row(bank, at(last))), _wide(frame)), (on[:, None] & (last >= 0)))
        for rows, new in zip((bank, *attached), (frame, *attached_frame)):
            _set_row(rows, target, new, on[:, None])
        _set(sizes, target, torch.ones_like(target), on[:, None].expand_as(k))
        length += on.to(length.dtype)
    return torch.where(full, k, -1).to(torch.int32)


def merge_at(bank, sizes, index, weighted):
    """The continuous part of memory_merge: the merge at a given index [B, N]."""
    t = torch.arange(bank.shape[1] - 1, device=bank.device)[None, :, None]  # [1, T-1, 1]
    k = index[:, None]  # [B, 1, N]
    mean = weighted_mean(bank[:, :-1], bank[:, 1:], sizes[:, :-1], sizes[:, 1:], weighted)
    out = torch.where((t == k)[..., None], mean, torch.where((t < k)[..., None], bank[:, :-1], bank[:, 1:]))
    return out, torch.where(t <= k, sizes[:, :-1], 0) + torch.where(t >= k, sizes[:, 1:], 0)


def reference(bank, sizes, weighted):
    index = cosine(_wide(bank[:, :-1]), _wide(bank[:, 1:])).argmax(1)  # [B, N]
    return (*merge_at(bank, sizes, index, weighted), index.to(torch.int32))


def reference_backward(grad_out, sizes, index, weighted):
    require_index("memory_merge_backward: index must be", index, grad_out.shape[1])
    bank = grad_out.new_zeros(*sizes.shape, grad_out.shape[-1])
    return torch.func.vjp(lambda x: merge_at(x, sizes, index, weighted)[0], bank)[1](grad_out)[0]


def _fake(bank, sizes, weighted):
    B, T, N, C = bank.shape
    return bank.new_empty(B, T - 1, N, C), sizes.new_empty(B, T - 1, N), bank.new_empty(B, N, dtype=torch.int32)


def _fake_step(bank, *_):
    return bank.new_empty(bank.shape[0], bank.shape[2], dtype=torch.int32)


def _setup_context(ctx, inputs, output):
    _, sizes, ctx.weighted = inputs
    ctx.save_for_backward(sizes, output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx, grad_out, _grad_sizes, _grad_index):
    return _op_backward(grad_out, *ctx.saved_tensors, ctx.weighted), None, None


_op_step = define(
    "memory_merge_(Tensor(a!) bank, Tensor(b!) sizes, Tensor(c!) order, Tensor(d!) similarity, Tensor(e!) length, "
    "Tensor? frame, Tensor(f!)[] attached, Tensor[] attached_frame, bool weighted, Tensor? active) -> Tensor",
    reference=reference_step,
    fake=_fake_step,
)
_op = define(
    "memory_merge(Tensor bank, Tensor sizes, bool weighted) -> (Tensor out, Tensor out_sizes, Tensor index)",
    reference=reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
_op_backward = define(
    "memory_merge_backward(Tensor grad_out, Tensor sizes, Tensor index, bool weighted) -> Tensor",
    reference=reference_backward,
    fake=lambda grad_out, sizes, index, weighted: grad_out.new_empty(*sizes.shape, grad_out.shape[-1]),
)
