"""What all functions of a whole clip share: checks, padded batches, ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvidx.ops._library import require, require_tensors


def check_clip(name: str, frames: Tensor, lengths: Tensor | None) -> Tensor:
    """Refuse what is no clip; bool [B, T], the frames that are there.

    Args:
        frames: [B, T, N, C] floating, none of them 0.
        lengths: int [B] on their device: video b has the first lengths[b] of the T frames. None: T.
    """
    require_tensors(name, frames=frames, lengths=lengths)
    fits = frames.dim() == 4 and min(frames.shape) >= 1 and frames.is_floating_point()
    require(fits, f"{name}: frames must be floating [B, T, N, C], none of them 0", frames)
    require(not (frames.requires_grad and torch.is_grad_enabled()), f"{name}: it has no gradient; detach frames")
    B, T = frames.shape[:2]
    if lengths is None:
        return torch.ones(B, T, dtype=torch.bool, device=frames.device)
    fits = lengths.shape == (B,) and lengths.device == frames.device and not lengths.is_floating_point()
    require(fits, f"{name}: lengths must be int [B] on the device of frames", lengths, frames)
    return torch.arange(T, device=frames.device) < lengths[:, None]


def ranks(score: Tensor, descending: bool = False) -> Tensor:
    """The place of each number of the last dimension in sorted order, int64; of equals the first comes first."""
    order = score.sort(dim=-1, descending=descending, stable=True).indices
    place = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)
