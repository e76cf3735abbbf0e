"""Frames through PyAV: the streaming reader, and the sampled reader that copes with every file FFmpeg can open."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .clip import Damage
from .index import FrameIndex, stored_times
from .shown import Shown, Suspect
from .source import MAX_PIXELS, Opened, Source

Item = tuple[int, float, float, np.ndarray]


def decode(source: Source, index: FrameIndex, wanted: list[int], room: int) -> np.ndarray:
    """Decode the `wanted` frames (ascending, no repeats) to uint8 [K, H, W, 3].

    Seeks to the last keyframe before each wanted frame unless decoding on gets there first, so the cost is at most
    that of decoding the file once. Frames are recognized by their timestamps, never by counting from a seek.

    Args:
        room: bytes that the result may take.

    Raises:
        Suspect: something is wrong with the file, and the index is not that of a damaged one.
    """
    out = None
    with source.video() as opened:
        for k, frame in enumerate(_walk(source, opened, index, wanted)):
            image = rgb(source, frame)
            if out is None:
                out = np.empty((room_for(len(wanted), image.shape, room), *image.shape), dtype=np.uint8)
            if image.shape != out.shape[1:]:
                raise RuntimeError(
                    f"video: {source.name} changes its frame size from {out.shape[1:3]} to {image.shape[:2]} "
                    f"before frame {wanted[k]}"
                )
            out[k] = image
    return out


def iterate(source: Source, keep: Callable[[int, float], bool]) -> Iterator[tuple[Item | None, Damage]]:
    """Decode once from the start; for each frame with keep(number, seconds) give (number, seconds, fps, image).

    What is known of damage comes beside it, and once more after the last frame, beside None.
    """
    times, done = stored_times(source), -1
    for careful in (False, True):
        with source.video() as opened:
            fps = float(opened.stream.average_rate or 0)
            try:
                shown = Shown(source, opened, careful, times)
                for number, seconds, frame in shown:
                    # After a first sign of damage it is gone through again, with care: these were given before it.
                    if number > done and keep(number, seconds):
                        yield (number, seconds, fps, rgb(source, frame)), shown.damage
                    done = max(done, number)
            except Suspect:
                continue
        yield None, shown.damage
        return


def room_for(count: int, shape: tuple[int, ...], room: int) -> int:
    """`count`, if that many pictures of a shape fit into `room` bytes.

    Raises:
        ValueError: they do not.
    """
    need = count * math.prod(shape)
    if need > room:
        raise ValueError(
            f"read: {count} frames of {shape[1]} x {shape[0]} take {need} bytes, more than max_bytes={room}; "
            "ask for fewer, use stream, or raise max_bytes"
        )
    return count


def rgb(source: Source, frame: Any) -> np.ndarray:
    if frame.width * frame.height > MAX_PIXELS:
        raise RuntimeError(
            f"video: {source.name} has a picture of {frame.width} x {frame.height}; "
            f"at most {MAX_PIXELS} pixels are read"
        )
    image = frame.to_ndarray(format="rgb24")
    # FFmpeg reports the display matrix but does not apply it; phones store portrait video as rotated landscape.
    return np.rot90(image, frame.rotation // 90) if frame.rotation else image


def _walk(source: Source, opened: Opened, index: FrameIndex, wanted: list[int]) -> Iterator[Any]:
    shown = Shown(source, opened, index.careful)
    frames = shown.frames()
    if index.keys is None:
        ahead = iter(wanted)
        want = next(ahead)
        for number, frame in enumerate(frames):
            if number == want:
                yield frame
                want = next(ahead, None)
            if want is None:
                return
        raise Suspect(f"frame {want} cannot be decoded")
    number_of = {int(pts): number for number, pts in enumerate(index.pts)}
    last = -1
    for want in wanted:
        key = int(index.keys[bisect_right(index.keys, want) - 1])
        if key > last + 1:
            opened.container.seek(int(index.pts[key]), stream=opened.stream)
            frames = shown.frames()
        for frame in frames:
            last = number_of.get(frame.pts, last)
            if last >= want:
                break
        if last != want:
            raise Suspect(f"frame {want} ({index.seconds[want]:.3f} s) cannot be decoded")
        yield frame
