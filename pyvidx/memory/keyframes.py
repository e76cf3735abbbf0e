"""Keyframes (ReTaKe, arXiv:2412.20504): keep the frames at which a clip changes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyvidx.memory.clips import check_clip, ranks
from pyvidx.memory.slots import wide
from pyvidx.ops._library import require
from pyvidx.ops.memory_merge import cosine


class Keyframes(NamedTuple):
    """A regular grid: every position keeps as many frames."""

    rows: Tensor  # [B, M, N, C], dtype of the frames, in time order
    index: Tensor  # [B, M, N] int64, the frame that each is from
    peak: Tensor  # [B, M, N] bool, whether it differs more from the one before than its neighbors in time do
    mask: Tensor  # [B, M, N] bool, False beyond the frames of a short video


def keyframes(frames: Tensor, count: int, unit: str = "token", lengths: Tensor | None = None) -> Keyframes:
    """The frames that differ most from the one before, those at a local peak of the difference first.

        g[0] = 1, g[t] = 1 - cos(x[t-1], x[t]);  a peak is the first maximum of g[t-1 .. t+1];  the M largest g + 2 peak

    Args:
        frames: [B, T, N, C] floating.
        count: M, at least 1; more than T gives all. The authors take max(1, round(ratio * T)).
        unit: "token", every position picks its own frames; "synchronized", all the same, by the mean difference.
        lengths: int [B] in [0, T], the frames of each video, the first ones. None: T.

    Raises:
        ValueError: a shape, dtype, length or option does not fit, or a gradient is asked for.

    The authors' program takes the first video's choice for all of a batch; this one does not.
    """
    there = check_clip("keyframes", frames, lengths)
    require(count >= 1, f"keyframes: count must be at least 1, got {count}")
    require(unit in ("token", "synchronized"), f"keyframes: unit must be 'token' or 'synchronized', got {unit!r}")
    B, T, N, C = frames.shape
    M = min(count, T)
    x = wide(frames)
    g = torch.cat([x.new_ones(B, 1, N), 1 - cosine(x[:, :-1], x[:, 1:])], 1)
    if unit == "synchronized":
        g = g.mean(2, keepdim=True).expand(-1, -1, N)
    g = g.where(there[..., None], -torch.inf)
    outside = g.new_full((B, 1, N), -torch.inf)
    before, after = torch.cat([outside, g[:, :-1]], 1), torch.cat([g[:, 1:], outside], 1)
    peak = (g > before) & (g >= after)
    rank = ranks((g + 2 * peak).transpose(1, 2), descending=True)  # [B, N, T]
    # In time order: the chosen frames come first, by their numbers.
    index = (rank >= M).sort(dim=2, stable=True).indices[..., :M].transpose(1, 2)
    rows = frames.gather(1, index[..., None].expand(-1, -1, -1, C))
    mask = there[..., None].expand(-1, -1, N).gather(1, index)
    return Keyframes(rows.where(mask[..., None], 0), index, peak.gather(1, index), mask)
