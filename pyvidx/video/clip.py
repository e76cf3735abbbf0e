"""The value that carries frames from a file to the preprocessing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """Some frames of one video, in the order they were asked for.

    Args:
        frames: [T, H, W, 3] uint8, RGB, upright (the rotation stored in the file is applied).
        seconds: [T] float64, time of each frame since the first shown frame of the video.
        indices: [T] int64, number of each frame among the shown frames of the video.
        fps: average frames per second, as the container states it; 0 in a stream whose container does not.
        path: where the frames came from.
    """

    frames: Tensor
    seconds: Tensor
    indices: Tensor
    fps: float
    path: str = ""

    def __post_init__(self) -> None:
        if self.frames.dtype != torch.uint8 or self.frames.dim() != 4 or self.frames.shape[3] != 3:
            raise ValueError(
                f"Clip: frames must be uint8 [T, H, W, 3], got {self.frames.dtype} {tuple(self.frames.shape)}"
            )
        for name, value, dtype in (("seconds", self.seconds, torch.float64), ("indices", self.indices, torch.int64)):
            if value.dtype != dtype or value.shape != self.frames.shape[:1]:
                raise ValueError(
                    f"Clip: {name} must be {dtype} [T] with T = {len(self.frames)}, "
                    f"got {value.dtype} {tuple(value.shape)}"
                )

    def __len__(self) -> int:
        return len(self.frames)
