"""VidCom2 (arXiv:2505.14454): keep the tokens of a clip that are unlike its mean, and more of the frames that are."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvidx.memory.clips import check_clip, check_rate, kept_count, ranks
from pyvidx.memory.slots import wide
from pyvidx.ops._library import require
from pyvidx.ops.memory_merge import EPS

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)  # of the Gaussians
TEMPERATURE = 0.01


def vidcom2_count(T: int, N: int, q: float) -> int:
    """The tokens kept of T frames of N in the form "vllm": the share 1 - q, and never less than one per frame."""
    return max(T, int(T * N * (1 - q)))


def vidcom2(frames: Tensor, q: float, lengths: Tensor | None = None, form: str = "vllm") -> Tensor:
    """The tokens of a clip that are least like the mean of the video and that of their frame, ragged.

    Rows y are cut to the half of the channels that vary least over the clip, and to length 1. With centers c of the
    video and of each frame (means of rows) and g(y, c) = sum over a of exp(-|y - c|^2 / (2 a)), a from 1/8 to 2:

        v = g(y, c of the video), f = g(y, c of the frame);  s = softmax over frames of (-mean_p v) / 0.01
        k[t] = max(1, round(N min(1, (1 - q)(1 + s[t] - 1/T))));  frame t keeps its k[t] smallest v + f

    Args:
        frames: [B, T, N, C] floating, C >= 2; worked out in float32 whatever their dtype.
        q: the pruning rate, in [0, 1).
        lengths: int [B] in [0, T], the frames of each video, the first ones. None: T.
        form: "vllm", the number of tokens is that of `vidcom2_count`: the largest v + f of those kept go, or the
            smallest of the rest come back, so a frame may end with none. "authors": as the frames' numbers add up,
            which is not known beforehand. (The authors' program does nothing to a batch of two; this one does.)

    Returns:
        bool [B, T, N], True where a token is kept.

    Raises:
        ValueError: a shape or dtype does not fit, q or a length is out of range, the form is unknown, or a gradient is
            asked for.
    """
    there = check_clip("vidcom2", frames, lengths)
    check_rate("vidcom2", q)
    B, T, N, C = frames.shape
    require(form in ("vllm", "authors"), f"vidcom2: form must be 'vllm' or 'authors', got {form!r}")
    require(C >= 2, "vidcom2: frames must have at least two channels, half of which it looks at", frames)
    present = there[..., None, None]
    x = wide(frames).where(present, 0)
    count = there.sum(1)[:, None, None].to(x.dtype).clamp_min(1)  # frames, [B, 1, 1]
    mean = x.sum((1, 2), keepdim=True) / (count * N)[..., None]
    variance = (x - mean).where(present, 0).square().sum((1, 2)) / (count[:, 0] * N)
    steady = variance.sort(dim=1, stable=True).indices[:, : C // 2].sort(dim=1).values
    y = x.gather(3, steady[:, None, None].expand(-1, T, N, -1))
    y = y / y.norm(dim=-1, keepdim=True).clamp_min(EPS)

    def alike(center: Tensor) -> Tensor:
        distance = (y - center).square().sum(-1)
        return sum((distance / (-2 * a)).exp() for a in WIDTHS)

    v = alike(y.sum((1, 2), keepdim=True) / (count * N)[..., None])
    score = v + alike(y.mean(2, keepdim=True))  # [B, T, N]
    unlike = (-v.mean(2) / TEMPERATURE).where(there, -torch.inf)
    share = (1 - q) * (1 + unlike.softmax(1) - 1 / count[..., 0])
    kept = ranks(score) < (N * share.clamp_max(1)).round().clamp_min(1)[..., None]
    kept &= there[..., None]
    if form == "authors":
        return kept
    total = kept_count(there, N, q).maximum(there.sum(1, keepdim=True))  # of each video as vidcom2_count has it
    # Those kept come first, each group by its score: the first `total` stay.
    score = score.where(there[..., None], torch.inf).flatten(1)
    by_score = score.sort(dim=1, stable=True).indices
    order = by_score.gather(1, kept.flatten(1).gather(1, by_score).sort(dim=1, descending=True, stable=True).indices)
    place = torch.arange(T * N, device=score.device).expand_as(order)
    final = torch.zeros_like(kept.flatten(1)).scatter_(1, order, place < total)
    return final.view(B, T, N) & there[..., None]
