"""What all functions of a whole clip share: checks, padded batches, how many tokens stay, ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvidx.ops._library import require, require_tensors


def check_clip(name: str, frames: Tensor, lengths: Tensor | None) -> Tensor:
    """Refuse what is no clip; bool [B, T], the frames that are there.

    Args:
        frames: [B, T, N, C] floating, none of them 0.
        lengths: int [B] in [0, T] on their device: video b has the first lengths[b] of the T frames. None: T.

    Raises:
        ValueError: a shape, dtype or device does not fit, a length is out of range (a GPU is not waited for: there it
            is taken as the nearest), or a gradient is asked for.
    """
    require_tensors(name, frames=frames, lengths=lengths)
    fits = frames.dim() == 4 and min(frames.shape) >= 1 and frames.is_floating_point()
    require(fits, f"{name}: frames must be floating [B, T, N, C], none of them 0", frames)
    require(not (frames.requires_grad and torch.is_grad_enabled()), f"{name}: it has no gradient; detach frames")
    B, T = frames.shape[:2]
    if lengths is None:
        return torch.ones(B, T, dtype=torch.bool, device=frames.device)
    fits = lengths.shape == (B,) and lengths.device == frames.device and lengths.dtype in (torch.int32, torch.int64)
    require(fits, f"{name}: lengths must be int [B] on the device of frames", lengths, frames)
    check_range(f"{name}: lengths", lengths, T)
    return torch.arange(T, device=frames.device) < lengths[:, None]


def check_range(what: str, x: Tensor, most: int) -> None:
    """Refuse whole numbers that are not in [0, most]; on a CPU, as a GPU would have to be waited for."""
    if x.is_cpu and x.numel() and not torch.compiler.is_compiling():
        low, high = (int(n) for n in torch.aminmax(x))
        require(0 <= low and high <= most, f"{what} must be in [0, {most}], got {low} to {high}")


def check_rate(name: str, q: float) -> None:
    """Refuse what is no pruning rate."""
    require(0 <= q < 1, f"{name}: q must be in [0, 1), got {q}")


def kept_count(there: Tensor, N: int, q: float) -> Tensor:
    """int(T * N * (1 - q)) of each video, int64 [B, 1]; there: of check_clip."""
    return ((there.sum(1, keepdim=True) * N).double() * (1 - q)).long()


def ranks(score: Tensor, descending: bool = False) -> Tensor:
    """The place of each number of the last dimension in sorted order, int64; of equals the first comes first."""
    order = score.sort(dim=-1, descending=descending, stable=True).indices
    place = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)
