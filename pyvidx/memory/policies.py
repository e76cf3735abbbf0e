"""The policies: merge, average, fifo, uniform, concat."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyvidx.memory.bank import Bank
from pyvidx.memory.layout import grown
from pyvidx.memory.policy import Policy
from pyvidx.memory.registry import register
from pyvidx.memory.slots import join_, put_, remove_, slot_of, span_, stamp_
from pyvidx.ops import memory_merge_
from pyvidx.ops._library import require


def full(bank: Bank, active: Tensor | None) -> Tensor | None:
    """bool [B], the active videos that use every slot; None if all videos do."""
    if not bank.ragged and active is None and bank.bound == bank.rows.shape[1]:
        return None
    over = bank.length == bank.rows.shape[1]
    return over if active is None else over & active


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
            N*C numbers.
    """

    name = "merge"
    similarity = True
    capacity: int = 20
    weighted: bool = True
    unit: str = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.unit in ("token", "frame"), f"merge: unit must be 'token' or 'frame', got {self.unit!r}")

    @property
    def whole_frame(self) -> bool:
        return self.unit == "frame"

    def _shrink_(self, bank: Bank, active: Tensor | None) -> None:
        self._step_(bank, None, (), active)

    def _advance_(self, bank: Bank, frame, attached, when, active, size) -> Bank:
        self._step_(bank, frame.contiguous(), [x.contiguous() for x in attached], active)
        last = (bank.length[:, None].long() - 1).expand(-1, frame.shape[1])
        stamp_(bank, slot_of(bank, last), when, active)
        return bank

    def _step_(self, bank: Bank, frame, attached, active) -> None:
        order = bank.order.clone() if bank.first is not None and bank.bound > self.room else None
        step = (bank.rows, bank.sizes, bank.order, bank.similarity, bank.length)
        index = memory_merge_(*step, frame, bank.attached, attached, weighted=self.weighted, active=active)
        if order is not None:
            k = index.long().clamp_min(0)
            keep, gone = (order.gather(2, (k + i)[..., None]).squeeze(2).long() for i in (0, 1))
            span_(bank, keep, gone, index >= 0)


@register("average")
@dataclass(frozen=True)
class Average(Merge):
    """The mean of all frames (beside the anchors): merge with room for one entry."""

    name = "average"
    capacity: int = field(default=1, init=False)
    weighted: bool = field(default=True, init=False)
    unit: str = field(default="frame", init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "capacity", self.anchors + 1)
        super().__post_init__()

    def spec(self) -> dict:
        return {"name": self.name, "anchors": self.anchors}


@register("fifo")
@dataclass(frozen=True)
class Fifo(Policy):
    """Keep the last `capacity` frames: the oldest goes."""

    name = "fifo"
    capacity: int = 20

    def _shrink_(self, bank: Bank, active: Tensor | None) -> None:
        remove_(bank, torch.zeros_like(bank.sizes[..., 0], dtype=torch.int64), full(bank, active))


@register("uniform")
@dataclass(frozen=True)
class Uniform(Policy):
    """Keep `capacity` frames spread evenly over a stream of unknown length.

    Every entry is one frame and stands for the frames from it up to the next entry. Where there is one too many, the
    two neighbors that stand for the fewest frames (the first such pair) become one and the earlier frame stays. After
    T frames none stands for more than 2 T / M (T and M without the anchors).
    """

    name = "uniform"
    capacity: int = 20

    def _shrink_(self, bank: Bank, active: Tensor | None) -> None:
        sizes = bank.sizes.gather(2, bank.order.long())
        k = (sizes[..., 1:] + sizes[..., :-1]).argmin(2)
        join_(bank, k, k + 1, full(bank, active), how="first")


@register("concat")
@dataclass(frozen=True)
class Concat(Policy):
    """Keep everything. The bank doubles its slots when they are used up, so memory grows with the video."""

    name = "concat"
    endless = True
    capacity: None = field(default=None, init=False)

    def spec(self) -> dict:
        return {"name": self.name, "anchors": self.anchors}

    def _first_slots(self) -> int:
        return 16

    def _advance_(self, bank: Bank, frame, attached, when, active, size) -> Bank:
        slots = bank.rows.shape[1]
        if bank.bound == slots:
            bank = grown(bank, 2 * slots)
        put_(bank, frame, attached, when, active, size)
        return bank

    def _fits(self, mine: Tensor, given: Tensor) -> bool:
        """Equal but for the number of slots, which is in another place in each tensor."""
        return mine.dim() == given.dim() and sum(a != b for a, b in zip(mine.shape, given.shape)) <= 1
