"""Token merging (ToMe) of lists of unequal lengths in one batch, down to unequal lengths, without asking the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyvidx.memory.clips import ranks
from pyvidx.memory.slots import wide
from pyvidx.memory.tome import match


def best_matches(x: Tensor, count: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """For each even token of a list the odd one that is most like it.

    Args:
        x: [B, n, C], n >= 2, of which the first count[b] are there.
        heads: the cosines are those of the mean over the heads of a token's C / heads numbers.

    Returns:
        The cosines [B, ceil(n/2)], -inf where there is no token or no other; and which odd one, int64.
    """
    a, b = (torch.arange(side, x.shape[1], 2, device=x.device) < count[:, None] for side in (0, 1))
    score = match(wide(x).unflatten(2, (heads, -1)).mean(2))
    best = score.masked_fill(~b[:, None], -torch.inf).max(2)
    return best.values.masked_fill(~a, -torch.inf), best.indices


def shorten(
    x: Tensor, sizes: Tensor, count: Tensor, target: Tensor, heads: int, width: int, ratio: float
) -> tuple[Tensor, Tensor]:
    """Merge the first count[b] tokens of each list down to target[b], by rounds that halve a list at most.

    Args:
        x: [B, n, C]. sizes: int [B, n], what each counts in a mean.
        count, target: int64 [B]; a list that is no longer than its target stays as it is.
        heads: as in best_matches.
        width: no target is above; the width of the result.
        ratio: count / target is at most this, so log2(ratio) rounds are enough.

    Returns:
        x [B, width, C] in float32 (or float64) and sizes [B, width], both 0 beyond a list: of each round the even
        tokens that are left, by falling likeness, then all odd ones.
    """
    x = wide(x)
    for _ in range(math.ceil(math.log2(max(ratio, 1)))):
        if x.shape[1] < 2:
            break
        x, sizes, count = _round(x, sizes, count, target, heads)
        most = max(-(-x.shape[1] // 2), width)
        x, sizes = x[:, :most], sizes[:, :most]
    x, sizes = (y[:, :width] for y in (x, sizes))
    there = torch.arange(x.shape[1], device=x.device) < count[:, None]
    more = (0, width - x.shape[1])
    x, sizes = x.where(there[..., None], 0), sizes.where(there, 0)
    return torch.nn.functional.pad(x, (0, 0, *more)), torch.nn.functional.pad(sizes, more)


def _round(x: Tensor, sizes: Tensor, count: Tensor, target: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    n, C = x.shape[1:]
    gone = torch.minimum((count - target).clamp_min(0), count // 2)[:, None]  # so many even tokens join odd ones
    score, into = best_matches(x, count, heads)
    rank = ranks(score, descending=True)
    size = sizes.to(x.dtype)
    # A product with zeros and ones instead of sums by index, whose order varies on CUDA.
    joins = (into[:, None] == torch.arange(n // 2, device=x.device)[:, None]) & (rank < gone)[:, None]
    share = joins * size[:, None, 0::2]
    total = size[:, 1::2] + share.sum(2)
    odd = (x[:, 1::2] * size[:, 1::2, None] + share @ x[:, 0::2]) / total[..., None].clamp_min(1)
    # Where each token of the result comes from: of the even ones that rank beyond those gone, then of the odd ones.
    left = (count[:, None] + 1) // 2 - gone
    place = torch.arange(n, device=x.device)
    by_rank = torch.empty_like(rank).scatter_(1, rank, torch.arange(rank.shape[1], device=x.device).expand_as(rank))
    even = by_rank.gather(1, (place + gone).clamp_max(rank.shape[1] - 1))
    source = torch.where(place < left, 2 * even, 2 * (place - left) + 1)
    source = torch.where(gone > 0, source, place).clamp(0, n - 1)
    mixed, counts = x.clone(), size.clone()
    mixed[:, 1::2], counts[:, 1::2] = odd, total
    mixed, counts = torch.where((gone > 0)[..., None], mixed, x), torch.where(gone > 0, counts, size)
    rows = mixed.gather(1, source[..., None].expand(-1, -1, C))
    return rows, counts.gather(1, source).to(sizes.dtype), count - gone[:, 0]
