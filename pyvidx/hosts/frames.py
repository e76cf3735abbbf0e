"""Frames as people have them, with their times."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pyvidx.ops._library import require
from pyvidx.preprocess import Frames


def stacked(frames: Frames) -> Tensor:
    """Frames as one tensor [n, C, H, W].

    Args:
        frames: PIL images, arrays or tensors [H, W, C] or [C, H, W], C 1 or 3; one, or a sequence, or [n, ...].

    Raises:
        ValueError: they are not that, or not of one size.
    """
    if isinstance(frames, list | tuple):
        parts = [stacked(x) for x in frames] or [torch.empty(0, 3, 1, 1)]
        alike = len({(x.shape[1:], x.dtype, x.device) for x in parts}) == 1
        require(alike, "Session.push: frames must be of one size and dtype", *parts)
        return torch.cat(parts)
    if not isinstance(frames, Tensor):
        frames = frames.convert("RGB") if hasattr(frames, "convert") else frames  # a PIL image
        array = np.array(frames)
        require(array.dtype.kind in "uif", f"Session.push: frames must be images, got {type(frames).__name__}")
        frames = torch.from_numpy(array)
    plain = frames.dtype != torch.bool and not frames.is_complex()
    fits = plain and frames.dim() in (3, 4) and (frames.shape[-3] in (1, 3) or frames.shape[-1] in (1, 3))
    require(fits, "Session.push: frames must be [H, W, 3] or [3, H, W], or several of them", frames)
    frames = frames if frames.dim() == 4 else frames[None]
    return frames if frames.shape[1] in (1, 3) else frames.permute(0, 3, 1, 2)


def times_after(last: float, seconds: float | Sequence[float] | Tensor) -> list[float]:
    """Seconds of frames as a list, a number alone being one.

    Raises:
        ValueError: they are no finite numbers, or one is before `last` or the one before it.
    """
    try:
        when = torch.as_tensor(seconds, dtype=torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Session.push: seconds must be numbers, got {seconds!r:.100}") from error
    require(when.dim() <= 1, "Session.push: seconds must be one number, or [n]", when)
    times = when.reshape(-1).tolist()
    rising = all(a <= b for a, b in zip([last, *times], times)) and all(map(math.isfinite, times))
    require(rising, f"Session.push: seconds must be finite and none before {last:g} or the one before it, got {times}")
    return times
