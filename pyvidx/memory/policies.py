"""The simplest policies: fifo, uniform, concat."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyvidx.memory.bank import Bank
from pyvidx.memory.policy import Policy
from pyvidx.memory.registry import register
from pyvidx.memory.slots import full, join_, remove_


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
