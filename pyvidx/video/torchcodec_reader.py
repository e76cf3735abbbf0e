"""Frames through torchcodec: used only when asked for, because its wheels fit one torch and need a system FFmpeg."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .clip import Damage
from .index import FrameIndex
from .pyav_reader import Item, room_for


def decode(path: str, index: FrameIndex, wanted: list[int], room: int) -> np.ndarray:
    """Decode the `wanted` frames (ascending, no repeats) to uint8 [K, H, W, 3], in at most `room` bytes."""
    room_for(len(wanted), (*index.size, 3), room)
    if index.careful:
        raise RuntimeError("it does not say what damage it finds")
    if index.keys is None:
        raise RuntimeError(f"its frame numbers cannot be trusted here: {index.caution}")
    decoder = _open(path)
    if len(decoder) != len(index.pts):
        raise RuntimeError(f"it counts {len(decoder)} frames where {len(index.pts)} are shown")
    batch = decoder.get_frames_at(wanted)
    # In MPEG streams its frame numbers can be off; the times it reports tell.
    if np.abs(batch.pts_seconds.numpy() - index.start - index.seconds[wanted]).max() > 1e-6:
        raise RuntimeError("its frame numbers cannot be trusted here: they belong to other times")
    return batch.data.numpy()


def iterate(path: str, keep: Callable[[int, float], bool]) -> Iterator[tuple[Item | None, Damage]]:
    """As pyav_reader.iterate; but it knows nothing of damage."""
    decoder = _open(path)
    fps = float(decoder.metadata.average_fps_from_header or 0)
    first = last = None
    for number in range(len(decoder)):
        frame = decoder.get_frame_at(number)
        first = frame.pts_seconds if first is None else first
        if last is not None and frame.pts_seconds <= last:
            raise RuntimeError(f"video: torchcodec loses count at frame {number} of {path}; stream it with PyAV")
        last = frame.pts_seconds
        if keep(number, last - first):
            yield (number, last - first, fps, frame.data.numpy()), Damage()
    yield None, Damage()


def _open(path: str) -> Any:
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeError(f"torchcodec cannot be loaded: {error}") from error
    return VideoDecoder(path, dimension_order="NHWC")
