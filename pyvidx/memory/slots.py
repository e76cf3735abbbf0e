"""Steps in place on the slots of a bank that are the same for every policy: put a frame, join two entries, remove one.

Entries are given as numbers in time order, [B, G] int64. `on`, bool [B], says which videos change; None: all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyvidx.memory.bank import Bank


def full(bank: Bank, active: Tensor | None) -> Tensor | None:
    """bool [B], the active videos that use every slot; None if all videos do."""
    if not bank.ragged and active is None and bank.bound == bank.rows.shape[1]:
        return None
    over = bank.length == bank.rows.shape[1]
    return over if active is None else over & active


def slot_of(bank: Bank, entry: Tensor) -> Tensor:
    """The slots [B, G] int64 of entries [B, G]; an entry past the last slot is taken as the last."""
    return bank.order.gather(2, entry.clamp(0, bank.order.shape[2] - 1)[..., None]).squeeze(2).long()


def rows_at(rows: Tensor, slot: Tensor) -> Tensor:
    """rows [B, S, G, W] at slot [B, G] -> [B, G, W], a copy."""
    return rows[_index(rows, slot)]


def put_(
    bank: Bank, frame: Tensor, attached: Sequence[Tensor], seconds: Tensor, on: Tensor | None, size: Tensor | int = 1
) -> None:
    """Append a frame [B, G, W] with its attached rows [B, G, Wi], of `size` ([B, G] int32), in the next free slots."""
    slot = slot_of(bank, bank.length[:, None].long().expand(-1, frame.shape[1]))
    for rows, new in zip((bank.rows, *bank.attached), (frame, *attached)):
        set_rows_(rows, slot, new, on)
    set_(bank.sizes, slot, size if isinstance(size, Tensor) else torch.full_like(slot, size), on)
    stamp_(bank, slot, seconds, on)
    count_(bank, 1, on)


def stamp_(bank: Bank, slot: Tensor, seconds: Tensor, on: Tensor | None) -> None:
    """Slots [B, G] hold one frame, of the time [B]; and count it."""
    for times in (bank.first, bank.last):
        if times is not None:
            set_(times, slot, seconds[:, None].expand_as(slot), on)
    bank.seen.add_(1 if on is None else on.long())


def join_(bank: Bank, i: Tensor, j: Tensor, on: Tensor | None, how: str) -> None:
    """Entries i < j become one, at the place of i, and j is gone.

    how: "weighted", the mean of all their frames; "plain", the mean of the two rows; "first", the row of i; "last",
        that of j.
    """
    keep, gone = slot_of(bank, i), slot_of(bank, j)
    s, t = (bank.sizes.gather(2, slot[..., None]) for slot in (keep, gone))  # [B, G, 1]
    if how != "first":
        for rows in (bank.rows, *bank.attached):
            x, y = (wide(rows_at(rows, slot)) for slot in (keep, gone))
            if how == "weighted":
                y = (x * s.to(x.dtype) + y * t.to(x.dtype)) / (s + t).to(x.dtype)
            elif how == "plain":
                y = (x + y) / 2
            set_rows_(rows, keep, y.to(rows.dtype), on)
    set_(bank.sizes, keep, (s + t).squeeze(2), on)
    span_(bank, keep, gone, on)
    remove_(bank, j, on)


def copy_(bank: Bank, entry: Tensor, on: Tensor | None) -> None:
    """Append a copy of an entry; there is a free slot."""
    slot = slot_of(bank, entry)
    to = slot_of(bank, bank.length[:, None].long().expand_as(slot))
    for rows in (bank.rows, *bank.attached):
        set_rows_(rows, to, rows_at(rows, slot), on)
    for values in (bank.sizes, bank.first, bank.last):
        if values is not None:
            set_(values, to, values.gather(2, slot[..., None]).squeeze(2), on)
    count_(bank, 1, on)


def span_(bank: Bank, keep: Tensor, gone: Tensor, on: Tensor | None) -> None:
    """The times of slots `keep` reach over those of `gone` as well. on: bool [B]."""
    if bank.first is not None:
        gone = gone if on is None else torch.where(on[:, None], gone, keep)  # over their own: nothing changes
        for times, reduce in ((bank.first, "amin"), (bank.last, "amax")):
            times.scatter_reduce_(2, keep[..., None], times.gather(2, gone[..., None]), reduce)


def remove_(bank: Bank, entry: Tensor, on: Tensor | None) -> None:
    """Entries are gone; their slots are free."""
    slot = slot_of(bank, entry)
    set_(bank.sizes, slot, torch.zeros_like(slot, dtype=torch.int32), on)
    place = torch.arange(bank.order.shape[2], device=slot.device)
    shifted = bank.order.gather(2, (place + (place >= entry[..., None])).clamp_max(len(place) - 1))
    shifted[..., -1] = slot
    bank.order.copy_(shifted if on is None else torch.where(on[:, None, None], shifted, bank.order))
    count_(bank, -1, on)


def may(on: Tensor) -> bool:
    """False where it is known that no element is True: on a CPU. A GPU is not waited for."""
    return not on.is_cpu or torch.compiler.is_compiling() or bool(on.any())


def known(count: Tensor, most: int) -> int:
    """The largest of some numbers >= 1 where it is known, on a CPU; else what it is at most."""
    return most if not count.is_cpu or torch.compiler.is_compiling() else min(most, max(1, int(count.max())))


def count_(bank: Bank, change: int, on: Tensor | None) -> None:
    bank.length.add_(change if on is None else change * on.int())


def set_rows_(rows: Tensor, slot: Tensor, new: Tensor, on: Tensor | None) -> None:
    """rows [B, S, G, W] at slot [B, G] = new [B, G, W]"""
    at = _index(rows, slot)
    rows[at] = new if on is None else torch.where(on[:, None, None], new, rows[at])


def set_(values: Tensor, slot: Tensor, new: Tensor, on: Tensor | None) -> None:
    """values [B, G, S] at slot [B, G] = new [B, G]. on: bool [B] or [B, G]."""
    slot, new = slot[..., None], new[..., None].to(values.dtype)
    if on is not None:
        new = torch.where(on.view(len(on), -1, 1), new, values.gather(2, slot))
    values.scatter_(2, slot, new)


def _index(rows: Tensor, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, G = slot.shape
    return torch.arange(B, device=rows.device)[:, None], slot, torch.arange(G, device=rows.device)


def wide(x: Tensor) -> Tensor:
    """x in the dtype that means and cosines are computed in: float32, or float64."""
    return x if x.dtype == torch.float64 else x.float()
