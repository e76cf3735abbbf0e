"""FluxMem (arXiv:2603.02096): newest frames whole, then without what did not change, then alike neighbors merged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvidx.memory.bank import Bank
from pyvidx.memory.policies import Concat
from pyvidx.memory.registry import register
from pyvidx.memory.slots import may, rows_at, set_, set_rows_, slot_of, wide
from pyvidx.ops._library import require
from pyvidx.ops.memory_merge import EPS, cosine

BINS = 128  # of Otsu's histogram, over distances from 0 to 2
NOISE = 1e-6  # distances below are rounding


@register("fluxmem")
@dataclass(frozen=True)
class FluxMem(Concat):
    """Three levels, ragged. near(t, u)[p] is the largest cosine of token p of frame t to the 3 x 3 places around p in
    frame u. The newest `short` frames are whole. Frame t leaves them when frame t + short comes, and keeps token p iff

        (1 - near(t, t+1)[p] >= A or 1 - near(t, t-1)[p] >= B) and near(t, t+1)[p] <= drop

    with A and B by Otsu's rule over the distances of the frame. `medium` frames later its kept tokens merge, once:
    neighbors (8 around) whose distance 1 - cos is at most Otsu's threshold of all such are joined to regions, and each
    region becomes its plain mean, at the place of the token nearest to it, the first of equals.

    Args:
        short, medium: frames of the first two levels, in steps of the grid (the authors count pictures, two to a step).
        drop: a token that is more alike than this to the next frame goes.
        threshold: a distance in [0, 2] in place of A and B (1 - the authors' pair_sim_threshold). None: Otsu.
        grid: (h, w) of a frame's tokens; None: a square.

    Where the authors leave it to rounding, this does not: the distance of an exact repeat is 0 (theirs may be negative,
    which they take for "no frame before"), a region of two stands at the place of the first, and Otsu's rule counts in
    whole numbers (theirs hangs on the order of sums, on CUDA also where bins are empty). Of their program this leaves
    out, too: it writes into the hidden states that it is given; images in the prompt count as frames; frames of one
    time id overwrite each other; frames of one token stay whole; it asks the device over ten times a frame.
    """

    name = "fluxmem"
    layout = "ragged"
    whole_frame = False
    short: int = 8
    medium: int = 16
    drop: float = 0.8
    threshold: float | None = None
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = min(self.short, self.medium) >= 1
        require(levels, f"fluxmem: short and medium must be at least 1, got {self.short} and {self.medium}")
        fits = self.threshold is None or 0 <= self.threshold <= 2
        require(fits, f"fluxmem: threshold must be in [0, 2], got {self.threshold}")
        if self.grid is not None:
            object.__setattr__(self, "grid", tuple(self.grid))
            fits = len(self.grid) == 2 and all(isinstance(n, int) and n >= 1 for n in self.grid)
            require(fits, f"fluxmem: grid must be (h, w), got {self.grid}")

    def new(self, B: int, N: int, C: int, *args: Any, **options: Any) -> Bank:
        self._grid(N)
        return super().new(B, N, C, *args, **options)

    new.__doc__ = Concat.new.__doc__

    def _grid(self, N: int) -> tuple[int, int]:
        h, w = self.grid or (math.isqrt(N), math.isqrt(N))
        require(h * w == N, f"fluxmem: grid must be (h, w) with h * w = N = {N}, got {self.grid}")
        return h, w

    def _advance_(
        self,
        bank: Bank,
        frame: Tensor,
        attached: Sequence[Tensor],
        when: Tensor | None,
        active: Tensor | None,
        size: Tensor | int,
    ) -> Bank:
        bank = super()._advance_(bank, frame, attached, when, active, size)
        for level, age in ((self._thin_, self.short), (self._join_, self.short + self.medium)):
            entry = bank.length[:, None].long() - 1 - age
            on = (entry >= 0)[:, 0] if active is None else (entry >= 0)[:, 0] & active
            if bank.bound + 1 > age and may(on):
                level(bank, entry.expand(-1, bank.positions), on)
        return bank

    def _thin_(self, bank: Bank, entry: Tensor, on: Tensor) -> None:
        """The frame that leaves the newest ones keeps what changed."""
        grid = self._grid(bank.positions)
        now, before, after = (_unit(rows_at(bank.rows, slot_of(bank, entry + i))) for i in (0, -1, 1))
        like_next, like_last = near(now, after, grid), near(now, before, grid)
        change, was = (_distance(x) for x in (like_next, like_last))
        if self.threshold is None:
            a, b = (otsu(d, torch.ones_like(d, dtype=torch.bool), median=True)[:, None] for d in (change, was))
        else:
            a = b = self.threshold
        kept = ((change >= a) | ((entry > 0) & (was >= b))) & (like_next <= self.drop)
        set_(bank.sizes, slot_of(bank, entry), kept.int(), on)

    def _join_(self, bank: Bank, entry: Tensor, on: Tensor) -> None:
        """The frame that leaves the medium ones has its alike neighbors merged."""
        slot = slot_of(bank, entry)
        kept = bank.sizes.gather(2, slot[..., None]).squeeze(2) > 0

        def rows_of(rows: Tensor) -> Tensor:  # without what was dropped: 0 times NaN is NaN
            return wide(rows_at(rows, slot)).where(kept[..., None], 0)

        x = rows_of(bank.rows)
        p, q = pairs(self._grid(bank.positions), x.device)
        both = kept[:, p] & kept[:, q]
        distance = (1 - cosine(x[:, p], x[:, q])).clamp(0, 2)
        joined = both & (distance <= otsu(distance, both, median=False)[:, None])
        label = regions(joined, p, q, bank.positions)
        place = torch.arange(bank.positions, device=x.device)
        # Products with zeros and ones instead of sums by index, whose order varies on CUDA.
        member = (label[:, None] == place[:, None]) & kept[:, None]  # [B, region, place]
        count = member.sum(2)
        share = member.to(x.dtype) / count[..., None].clamp_min(1)
        mean = (share @ x).gather(1, label[..., None].expand_as(x))  # of the region of each token
        size = count.gather(1, label)
        off = (x - mean).square().sum(2).where(size != 2, 0)  # two are equally far
        nearest = off[:, None].where(member, torch.inf).argmin(2).gather(1, label)
        stands = kept & ((size < 2) | (nearest == place))
        for rows in (bank.rows, *bank.attached):
            y = rows_of(rows)
            mean = (share.to(y.dtype) @ y).gather(1, label[..., None].expand_as(y))
            set_rows_(rows, slot, mean.where((stands & (size > 1))[..., None], y).to(rows.dtype), on)
        set_(bank.sizes, slot, size.where(stands, 0), on)


def near(x: Tensor, y: Tensor, grid: tuple[int, int]) -> Tensor:
    """x, y [B, h*w, C] of length 1: the largest product of each place of x with the 3 x 3 around it in y, [B, h*w]."""
    (h, w), B = grid, len(x)
    x = x.view(B, h, w, -1)
    y = F.pad(y.view(B, h, w, -1), (0, 0, 1, 1, 1, 1))
    inside = F.pad(x.new_ones(h, w), (1, 1, 1, 1)) > 0
    best = x.new_full((B, h, w), -torch.inf)
    for i in range(3):
        for j in range(3):
            product = (x * y[:, i : i + h, j : j + w]).sum(3)
            best = torch.maximum(best, product.where(inside[i : i + h, j : j + w], -torch.inf))
    return best.flatten(1)


def pairs(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Every two places of a grid that touch, corners included: their numbers, [E] each."""
    h, w = grid
    place = torch.arange(h * w, device=device).view(h, w)
    ends = (
        (place[:, :-1], place[:, 1:]),
        (place[:-1], place[1:]),
        (place[:-1, :-1], place[1:, 1:]),
        (place[:-1, 1:], place[1:, :-1]),
    )
    return tuple(torch.cat([side.flatten() for side in both]) for both in zip(*ends))


def otsu(distance: Tensor, there: Tensor, median: bool) -> Tensor:
    """Otsu's threshold of the distances [B, n] in [0, 2] that are there: of the splits of a histogram the first with
    the largest variance between its classes; the center of the last bin of the lower one, float [B].

    median: where the distances are equal or there is no split, their lower median; False: -1, below all.
    """
    there = there & ~distance.isnan()
    distance = distance.clamp(0, 2).where(there, 0)
    bin_ = (distance * (BINS / 2)).long().clamp_max(BINS - 1)
    zeros = torch.zeros(len(distance), BINS, dtype=torch.int64, device=distance.device)
    count = zeros.scatter_add(1, bin_, there.long())
    # Whole numbers: a bin's center is 2k + 1 halves of a bin. Sums in any order are the same.
    center = 2 * torch.arange(BINS, device=distance.device) + 1
    below, sums = count.cumsum(1), (count * center).cumsum(1)
    n, total = below[:, -1:], sums[:, -1:]
    between = (total * below - sums * n).double().square() / (below * (n - below)).clamp_min(1).double()
    best, k = between.max(1)
    threshold = (k.to(distance.dtype) + 0.5) / (BINS / 2)
    if not median:
        return threshold.where(best > 0, -1)
    middle = distance.sort(1).values[:, (distance.shape[1] - 1) // 2]
    spread = distance.var(1) if distance.shape[1] > 1 else torch.zeros_like(middle)
    return threshold.where((best > 0) & (spread > 1e-12), middle)


def regions(joined: Tensor, p: Tensor, q: Tensor, N: int) -> Tensor:
    """Connected regions: pairs [E] of places p, q, joined where [B, E] says so -> the least place of each place's
    region, int64 [B, N].

    In a round every region joins the least one that it touches, if that is less than itself. Of two rounds each joins
    one or is joined, so 2 log2(N) are enough; on a CPU they end when nothing changes.
    """
    label = torch.arange(N, device=joined.device).expand(len(joined), N).contiguous()
    depth = max(1, math.ceil(math.log2(N)))
    for _ in range(2 * depth):
        a, b = label[:, p], label[:, q]
        less = torch.minimum(a, b).where(joined, a)
        parent = torch.arange(N, device=joined.device).expand_as(label)
        parent = parent.scatter_reduce(1, torch.maximum(a, b).where(joined, a), less, "amin")
        for _ in range(depth):
            parent = parent.gather(1, parent)
        new = parent.gather(1, label)
        changed, label = new != label, new
        if not may(changed):
            break
    return label


def _unit(x: Tensor) -> Tensor:
    x = wide(x)
    return x / x.norm(dim=-1, keepdim=True).clamp_min(EPS)


def _distance(likeness: Tensor) -> Tensor:
    d = 1 - likeness
    return d.where(d > NOISE, 0)
