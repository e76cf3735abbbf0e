"""Merging neighbors in time by any likeness, in place: what memory_merge_ does, for rules that it does not know.

A likeness is a function of rows x and y, both [B, G, W], and N, the positions that they hold together, to [B, G]. The
values between neighbors are kept in Bank.similarity, so a merge costs two of them, not one per entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyvidx.memory.bank import Bank, Entries
from pyvidx.memory.clips import check_clip
from pyvidx.memory.layout import new_bank
from pyvidx.memory.policy import plain
from pyvidx.memory.slots import join_, put_, rows_at, set_, slot_of, wide
from pyvidx.ops._library import require
from pyvidx.ops.memory_merge import cosine

Likeness = Callable[[Tensor, Tensor, int], Tensor]


def whole_cosine(x: Tensor, y: Tensor, N: int) -> Tensor:
    """One cosine over all numbers of a group."""
    return cosine(wide(x), wide(y))


def mean_cosine(x: Tensor, y: Tensor, N: int) -> Tensor:
    """The mean of the cosines at each position of a frame."""
    x, y = (wide(v).unflatten(2, (N, -1)) for v in (x, y))
    return cosine(x, y).mean(2)


def mean_product(x: Tensor, y: Tensor, N: int) -> Tensor:
    """The mean of the N * N inner products of two frames' rows, which is the product of their mean rows."""
    x, y = (wide(v).unflatten(2, (N, -1)).mean(2) for v in (x, y))
    return (x * y).sum(-1)


def put_alike_(
    bank: Bank,
    likeness: Likeness,
    frame: Tensor,
    attached: Sequence[Tensor],
    seconds: Tensor | None,
    on: Tensor | None,
    size: Tensor | int = 1,
) -> None:
    """slots.put_, and how like the new entry is to the one before."""
    put_(bank, frame, attached, seconds, on, size)
    relate_(bank, bank.length[:, None].long() - 2, likeness, on)


def relate_(bank: Bank, e: Tensor, likeness: Likeness, on: Tensor | None) -> None:
    """Work out anew how like entries e and e + 1 are, e int64 [B, 1] or [B, G]; where there are no such two, nothing
    changes."""
    e = e.expand(-1, bank.order.shape[1])
    there = (e >= 0) & (e + 1 < bank.length[:, None])
    x, y = (rows_at(bank.rows, slot_of(bank, entry)) for entry in (e, e + 1))
    value = likeness(x, y, bank.positions)
    set_(bank.similarity, e.clamp(0, bank.similarity.shape[2] - 1), value, there if on is None else there & on[:, None])


def merge_once_(bank: Bank, likeness: Likeness, how: str, on: Tensor | None, first: Tensor | int = 0) -> None:
    """Join the two neighbors that are most alike, in every group; the first of equals wins.

    Args:
        how: as in slots.join_.
        on: bool [B], the videos that change, with at least two entries from `first` on. None: all.
        first: int64 [B, 1, 1], or one number: entries before it stay.
    """
    pair = torch.arange(bank.similarity.shape[2], device=bank.rows.device)
    open_ = (pair >= first) & (pair + 1 < bank.length[:, None, None])
    k = bank.similarity.where(open_, -torch.inf).argmax(2)
    join_(bank, k, k + 1, on, how)
    shifted = bank.similarity.gather(2, (pair + (pair >= k[..., None])).clamp_max(len(pair) - 1))
    bank.similarity.copy_(shifted if on is None else shifted.where(on[:, None, None], bank.similarity))
    for e in (k - 1, k):
        relate_(bank, e, likeness, on)


def shrunk(
    name: str,
    frames: Tensor,
    seconds: Tensor | None,
    lengths: Tensor | None,
    capacity: int,
    likeness: Likeness,
    how: str,
    whole: bool,
    first: int = 0,
) -> Entries:
    """A whole clip [B, T, N, C] merged down to `capacity` entries, the best pair of all first; of video b the first
    lengths[b] frames. whole: frames merge as they are; False: each position for itself. first: as in merge_once_."""
    there = check_clip(name, frames, lengths)
    fits = seconds is None or (seconds.shape == there.shape and seconds.device == frames.device)
    require(fits, f"{name}: seconds must be [B, T] on the device of frames", seconds, frames)
    B, T, N, C = frames.shape
    common = dict(dtype=frames.dtype, device=frames.device, attached=(), attached_dtype=frames.dtype, times=True)
    bank = new_bank(B, max(T, 2), N, C, whole_frame=whole, similarity=True, **common)
    with plain(frames.device.type):
        bank.length.add_(there.sum(1))
        bank.seen.add_(bank.length)
        bank.rows[:, :T] = frames.reshape(B, T, *bank.rows.shape[2:])
        bank.sizes[..., :T] = there[:, None]
        when = torch.arange(T, device=frames.device).expand(B, T) if seconds is None else seconds
        for times in (bank.first, bank.last):
            times[..., :T] = when[:, None]
        if T > 1:
            x, y = (rows.flatten(0, 1) for rows in (bank.rows[:, : T - 1], bank.rows[:, 1:T]))
            bank.similarity[..., : T - 1] = likeness(x, y, N).unflatten(0, (B, T - 1)).transpose(1, 2)
        for left in range(T, capacity, -1):
            merge_once_(bank, likeness, how, None if lengths is None else bank.length == left, first)
    return dataclasses.replace(bank, bound=min(T, capacity), ragged=lengths is not None).entries()
