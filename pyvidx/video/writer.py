"""Frames to a video file, through PyAV."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction

import torch
from torch import Tensor

from pyvidx.files import whole

from .ffmpeg import import_av


def write(
    path: str | os.PathLike[str],
    frames: Tensor | Iterable[Tensor],
    fps: float = 25.0,
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
) -> None:
    """Encode frames at a constant rate, to a file that is there whole or not at all; its name says the container.

    Args:
        path: file to write, replaced if it exists.
        frames: uint8 [T, H, W, 3] RGB, or anything that gives [H, W, 3] frames one by one.
        fps: frames per second.
        codec, pixel_format, options: passed to FFmpeg ("libx264", "libvpx-vp9", "libsvtav1", ...; {"crf": "18"}).

    Raises:
        ValueError: no frame, a frame that is not uint8 [H, W, 3] or differs in size, an odd size with yuv420p, a rate
            that is no positive number, or a name whose end stands for no container.
    """
    av = import_av()
    rate = Fraction(fps).limit_denominator(65535)
    # "file:" lets a name hold a colon.
    with whole(path) as part, av.open(f"file:{part}", "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.pix_fmt = pixel_format
        size = None
        for count, frame in enumerate(frames):
            if frame.dtype != torch.uint8 or frame.dim() != 3 or frame.shape[2] != 3:
                raise ValueError(f"write: frames must be uint8 [H, W, 3], got {frame.dtype} {tuple(frame.shape)}")
            if size is None:
                size = frame.shape
                if pixel_format == "yuv420p" and (size[0] % 2 or size[1] % 2):
                    raise ValueError(f"write: yuv420p needs an even H and W, got {tuple(size[:2])}; try yuv444p")
                stream.height, stream.width = size[:2]
            if frame.shape != size:
                raise ValueError(f"write: frames must have one size, got {tuple(size)} and {tuple(frame.shape)}")
            picture = av.VideoFrame.from_ndarray(frame.contiguous().numpy(), format="rgb24")
            picture.pts, picture.time_base = count, 1 / rate
            container.mux(stream.encode(picture))
        if size is None:
            raise ValueError("write: frames must hold at least one frame")
        container.mux(stream.encode())
