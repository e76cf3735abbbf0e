"""The value that carries frames from a file to the preprocessing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Damage:
    """What a file turned out to lack; false if nothing is known to be wrong with it.

    Args:
        skipped: packets that could not be decoded and were left out.
        concealed: frames that are shown although the decoder had to make up parts of them.
        cut: the file ends before all that its container promises.
        reason: the first sign of it, in words.
        frame: number of the first shown frame at or after that sign; None if it concerns the file as a whole.
        second: time of that frame.
    """

    skipped: int = 0
    concealed: int = 0
    cut: bool = False
    reason: str = ""
    frame: int | None = None
    second: float | None = None

    def __bool__(self) -> bool:
        return bool(self.skipped or self.concealed or self.cut or self.reason)

    def __str__(self) -> str:
        if not self:
            return "not damaged"
        parts = [f"{self.skipped} packets skipped"] if self.skipped else []
        parts += [f"{self.concealed} frames partly made up by the decoder"] if self.concealed else []
        parts += ["cut before its end"] if self.cut else []
        where = "" if self.frame is None else f" at frame {self.frame} ({self.second:.3f} s)"
        first = f"first sign{where}: {self.reason}" if self.reason else ""
        return "damaged: " + ", ".join(parts + [first] if first else parts)


@dataclass(frozen=True)
class Clip:
    """Some frames of one video, in the order they were asked for.

    Args:
        frames: [T, H, W, 3] uint8, RGB, upright (the rotation stored in the file is applied).
        seconds: [T] float64, time of each frame since the first shown frame of the video.
        indices: [T] int64, number of each frame among the shown frames of the video.
        fps: average frames per second, as the container states it; 0 in a stream whose container does not.
        path: where the frames came from; for what has no name, "<bytes>" or the like.
        damaged: what is wrong with the file, as far as these frames and the packets of the whole file tell.
    """

    frames: Tensor
    seconds: Tensor
    indices: Tensor
    fps: float
    path: str = ""
    damaged: Damage = Damage()

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
