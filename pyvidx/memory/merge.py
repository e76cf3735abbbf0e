"""Merging the two most similar neighbors in time (MA-LMM, MA-LLM), and the mean of all frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyvidx.memory.bank import Bank, Entries
from pyvidx.memory.neighbors import Likeness, mean_cosine, merge_once_, put_alike_, shrunk, whole_cosine
from pyvidx.memory.policy import Policy, plain
from pyvidx.memory.registry import register
from pyvidx.memory.slots import full, slot_of, span_, stamp_
from pyvidx.ops import memory_merge_, memory_replay_, memory_scan_
from pyvidx.ops._library import require

CHUNK = 64  # frames that one scan takes beside attached rows, whose list grows with their number; 4 times it, without


@register("merge")
@dataclass(frozen=True)
class Merge(Policy):
    """Merge the two most similar neighbors in time (MA-LMM, arXiv:2404.05726, section 3.2, equations 6 and 7):

        k = argmax_j cos(e[j], e[j+1]),  e[k] <- (s[k] e[k] + s[k+1] e[k+1]) / (s[k] + s[k+1]),  s[k] <- s[k] + s[k+1]

    Args:
        capacity: M, entries kept.
        weighted: the mean of all frames, as in the authors' code; False: the plain mean of the two entries, as printed
            in equation 7, which forgets old frames geometrically.
        unit: "token", every position picks its own pair; "frame", one pair for the whole frame, by the cosine over all
            N*C numbers; "synchronized", one pair by the mean of the N cosines, one per position (patch_sync of MA-LLM).
        hard: the later of the two entries stands for both, as it is (MA-LLM-hard); `weighted` then says nothing.

    MA-LLM (ReTaKe, arXiv:2412.20504) is `shrink`: all frames of a clip are there before the first merge.
    """

    name = "merge"
    similarity = True
    capacity: int = 20
    weighted: bool = True
    unit: str = "token"
    hard: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        units = ("token", "frame", "synchronized")
        require(self.unit in units, f"merge: unit must be one of {', '.join(units)}, got {self.unit!r}")

    @property
    def whole_frame(self) -> bool:
        return self.unit != "token"

    def shrink(self, frames: Tensor, seconds: Tensor | None = None, lengths: Tensor | None = None) -> Entries:
        """Merge a whole clip down to `capacity` entries: the best pair of all frames first. A stream, which decides by
        what it has seen so far, may find other pairs.

        Args:
            frames: [B, T, N, C] floating, T >= 1.
            seconds: [B, T]. None: the numbers of the frames.
            lengths: int [B] in [0, T], the frames of each video, the first ones. None: T.

        Returns:
            At most `capacity` entries in time order, the first `anchors` frames among them as they are.

        Raises:
            ValueError: a shape, dtype or length does not fit, or a gradient is asked for.
        """
        name, likeness = f"{self.name}.shrink", self._likeness
        whole = self.whole_frame
        return shrunk(name, frames, seconds, lengths, self.capacity, likeness, self._how, whole, self.anchors)

    @property
    def _likeness(self) -> Likeness:
        return mean_cosine if self.unit == "synchronized" else whole_cosine

    @property
    def _how(self) -> str:
        return "last" if self.hard else "weighted" if self.weighted else "plain"

    @property
    def _by_op(self) -> bool:
        """memory_merge_ knows the rule."""
        return not self.hard and self.unit != "synchronized"

    def _shrink_(self, bank: Bank, active: Tensor | None) -> None:
        if self._by_op:
            self._step_(bank, None, (), active)
        else:
            merge_once_(bank, self._likeness, self._how, full(bank, active))

    def _advance_(
        self,
        bank: Bank,
        frame: Tensor,
        attached: Sequence[Tensor],
        when: Tensor | None,
        active: Tensor | None,
        size: Tensor | int,
    ) -> Bank:
        if not self._by_op:
            if self._due(bank):
                bank = self._compress(bank, active)
            put_alike_(bank, self._likeness, frame, attached, when, active, size)
            return bank
        self._step_(bank, frame.contiguous(), [x.contiguous() for x in attached], active)
        last = (bank.length[:, None].long() - 1).expand(-1, frame.shape[1])
        stamp_(bank, slot_of(bank, last), when, active)
        return bank

    def _step_(self, bank: Bank, frame: Tensor | None, attached: Sequence[Tensor], active: Tensor | None) -> None:
        order = bank.order.clone() if bank.first is not None and bank.bound > self.room else None
        step = (bank.rows, bank.sizes, bank.order, bank.similarity, bank.length)
        index = memory_merge_(*step, frame, bank.attached, attached, weighted=self.weighted, active=active)
        if order is not None:
            k, on = index.clamp_min(0), index >= 0  # where nothing merged, keep and gone are one slot
            span_(bank, *(order.gather(2, e.long()[..., None]).squeeze(2).long() for e in (k, k + on)), None)

    def _extend(
        self, bank: Bank, frames: Tensor, seconds: Tensor | None, active: Tensor | None, attached: Sequence[Tensor]
    ) -> Bank:
        alone = 0 if bank.head is None else min(self.anchors - bank.head.bound, frames.shape[1])  # for the anchors
        if not self._by_op or active is not None or (bank.head is not None and bank.ragged):
            alone = frames.shape[1]
        given = (frames, seconds, active, *attached)
        if alone:
            new, when, on, *kept = (None if x is None else x[:, :alone] for x in given)
            bank = super()._extend(bank, new, when, on, kept)
        if alone == frames.shape[1]:
            return bank
        new, when, _, *kept = (None if x is None else x[:, alone:] for x in given)
        return self._scan(bank, new, when, kept)

    def _scan(self, bank: Bank, frames: Tensor, seconds: Tensor | None, attached: Sequence[Tensor]) -> Bank:
        """Push T frames [B, T, N, C] to all videos by memory_scan_: each position walks them alone, in one launch."""
        self._check_frame(
            bank, frames[:, 0], None if seconds is None else seconds[:, 0], None, [x[:, 0] for x in attached]
        )
        bank = bank.give_up()
        T, chunk = frames.shape[1], CHUNK if attached else 4 * CHUNK
        with plain(bank.rows.device.type):
            number = torch.arange(T, device=frames.device)
            when = (bank.frames[:, None] + number if seconds is None else seconds).double()
            order = bank.order.long()
            before = bank.sizes.gather(2, order), order
            step = (bank.rows, bank.sizes, bank.order, bank.similarity, bank.length)
            for begin in range(0, T, chunk):
                new, *kept = (
                    x[:, begin : begin + chunk].reshape(len(bank), -1, *rows.shape[2:]).to(rows.dtype)
                    for x, rows in zip((frames, *attached), (bank.rows, *bank.attached))
                )
                plan = memory_scan_(*step, new, weighted=self.weighted)
                for rows, x in zip(bank.attached, kept):
                    memory_replay_(rows, x, plan, bank.order, weighted=self.weighted)
            bank.seen.add_(T)
            bank = dataclasses.replace(bank, bound=min(bank.bound + T, bank.rows.shape[1]))
            if bank.first is not None:
                _spans_(bank, *before, when)
            return self._compress(bank, None) if self._due(bank) else bank


def _spans_(bank: Bank, sizes: Tensor, order: Tensor, when: Tensor) -> None:
    """The times of all entries after frames of the times [B, T] have come in, from what the bank held before: sizes
    [B, G, S] in time order, and the order. An entry holds consecutive frames, so where it ends is the sum of sizes."""
    B, G, S = sizes.shape
    items = torch.cat([sizes, sizes.new_ones(B, G, when.shape[1])], 2)
    slot = bank.order.long()
    counts = bank.sizes.gather(2, slot)
    entry = torch.searchsorted(counts.cumsum(2), items.cumsum(2) - items, right=True).clamp_max_(S - 1)
    of_both = lambda x: x.expand(2, *x.shape)  # noqa: E731
    spans = torch.stack([bank.first, -bank.last])  # the least of both is wanted
    held = spans.gather(3, of_both(order)).where(sizes > 0, torch.inf)
    given = torch.stack([when, -when])[:, :, None].expand(2, B, G, -1)
    reached = torch.full_like(spans, torch.inf)
    reached.scatter_reduce_(3, of_both(entry), torch.cat([held, given], 3), "amin")
    spans.scatter_(3, of_both(slot), reached.where(counts > 0, spans.gather(3, of_both(slot))))
    bank.first.copy_(spans[0])
    torch.neg(spans[1], out=bank.last)


@register("average")
@dataclass(frozen=True)
class Average(Merge):
    """The mean of all frames (beside the anchors): merge with room for one entry."""

    name = "average"
    capacity: int = field(default=1, init=False)
    weighted: bool = field(default=True, init=False)
    unit: str = field(default="frame", init=False)
    hard: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "capacity", self.anchors + 1)
        super().__post_init__()
