"""Efficient video sampling (EVS, arXiv:2510.14624): keep the tokens that changed most since the frame before."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvidx.memory.clips import check_clip, check_rate, kept_count, ranks
from pyvidx.memory.slots import wide
from pyvidx.ops.memory_merge import cosine


def evs_count(T: int, N: int, q: float) -> int:
    """The tokens kept of T frames of N: the share 1 - q, and never less than one frame's."""
    return max(N, int(T * N * (1 - q)))


def evs(frames: Tensor, q: float, lengths: Tensor | None = None) -> Tensor:
    """The `evs_count` tokens of a clip that differ most from the one before them at their place, ragged.

        d[t, p] = 1 - cos(x[t, p], x[t-1, p]),  d[0, p] above all others; of equal ones the earlier stays

    So the first frame is whole. x are an encoder's rows, as in vLLM and SGLang, where the paper compares pixels. Worked
    out in float32: in bfloat16 a few hundred tokens share some hundred values of d, and the ties would decide.

    Args:
        frames: [B, T, N, C] floating.
        q: the pruning rate, in [0, 1).
        lengths: int [B] in [0, T], the frames of each video, the first ones. None: T.

    Returns:
        bool [B, T, N], True where a token is kept.

    Raises:
        ValueError: a shape or dtype does not fit, q or a length is out of range, or a gradient is asked for.
    """
    there = check_clip("evs", frames, lengths)
    check_rate("evs", q)
    B, T, N, _ = frames.shape
    x = wide(frames)
    d = torch.cat([x.new_full((B, 1, N), torch.inf), 1 - cosine(x[:, 1:], x[:, :-1])], 1)
    d = d.where(there[..., None], -torch.inf)
    count = kept_count(there, N, q).clamp_min(N)  # of each video as evs_count has it
    return (ranks(d.flatten(1), descending=True) < count).view(B, T, N) & there[..., None]
