"""Frames through PyAV: the streaming reader, and the sampled reader that copes with every file FFmpeg can open."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .index import FrameIndex, open_video


class FrameLost(RuntimeError):
    """The decoder did not deliver a frame that the packets promised."""


def decode(path: str, index: FrameIndex, wanted: list[int]) -> np.ndarray:
    """Decode the `wanted` frames (ascending, no repeats) to uint8 [K, H, W, 3].

    Seeks to the last keyframe before each wanted frame unless decoding on gets there first, so the cost is at most
    that of decoding the file once. Frames are recognized by their timestamps, never by counting from a seek.
    """
    out = None
    with open_video(path) as (container, stream):
        for k, frame in enumerate(_walk(path, container, stream, index, wanted)):
            image = _rgb(frame)
            if out is None:
                out = np.empty((len(wanted), *image.shape), dtype=np.uint8)
            if image.shape != out.shape[1:]:
                raise RuntimeError(
                    f"video: {path} changes its frame size from {out.shape[1:3]} to {image.shape[:2]} "
                    f"before frame {wanted[k]}"
                )
            out[k] = image
    return out


def iterate(path: str, keep: Callable[[int, float], bool]) -> Iterator[tuple[int, float, float, np.ndarray]]:
    """Decode once from the start; for each frame with keep(number, seconds) give number, seconds, fps, image."""
    with open_video(path) as (container, stream):
        fps = float(stream.average_rate or 0)
        first, last = None, -1.0
        for number, frame in enumerate(container.decode(stream)):
            if frame.pts is None:
                if not fps:
                    raise RuntimeError(f"video: {path} has neither timestamps nor a frame rate")
                seconds = number / fps
            else:
                first = frame.pts if first is None else first
                seconds = (frame.pts - first) * float(stream.time_base)
            if seconds <= last:
                raise RuntimeError(
                    f"video: {path} has a time out of order at frame {number}; use read, or re-encode it"
                )
            last = seconds
            if keep(number, seconds):
                yield number, seconds, fps, _rgb(frame)


def _rgb(frame: Any) -> np.ndarray:
    image = frame.to_ndarray(format="rgb24")
    # FFmpeg reports the display matrix but does not apply it; phones store portrait video as rotated landscape.
    return np.rot90(image, frame.rotation // 90) if frame.rotation else image


def _walk(path: str, container: Any, stream: Any, index: FrameIndex, wanted: list[int]) -> Iterator[Any]:
    frames = container.decode(stream)
    if index.keys is None:
        ahead = iter(wanted)
        want = next(ahead)
        for number, frame in enumerate(frames):
            if number == want:
                yield frame
                want = next(ahead, None)
            if want is None:
                return
        raise FrameLost(f"video: frame {want} of {path} cannot be decoded")
    number_of = {int(pts): number for number, pts in enumerate(index.pts)}
    last = -1
    for want in wanted:
        key = int(index.keys[bisect_right(index.keys, want) - 1])
        if key > last + 1:
            container.seek(int(index.pts[key]), stream=stream)
            frames = container.decode(stream)
        for frame in frames:
            last = number_of.get(frame.pts, last)
            if last >= want:
                break
        if last != want:
            raise FrameLost(f"video: frame {want} of {path} ({index.seconds[want]:.3f} s) cannot be decoded")
        yield frame
