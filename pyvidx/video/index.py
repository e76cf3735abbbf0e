"""Which frames a file shows, and when: found by reading packets, without decoding.

Every reader is held to this one index. It makes frame numbers and times equal in all of them, and tells where a reader
would give a wrong frame without noticing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

# VP8 keeps reference frames that are never shown in packets of their own; AVI stores no presentation times.
_COUNT_BY_DECODING = {"vp8", "avi"}
# Containers that list their frames, by the first of FFmpeg's names for them.
_LISTS_FRAMES = {"mov", "matroska", "flv"}


@dataclass(frozen=True)
class FrameIndex:
    """The shown frames of a video, in order of presentation.

    Args:
        pts: [N] int64, presentation time of each frame in units of the stream's time base; frame numbers if the
            stream has no timestamps.
        seconds: [N] float64, the same in seconds since frame 0.
        start: time of frame 0 on the clock of the container, in seconds.
        fps: average frames per second, as the container states it.
        keys: frame numbers where decoding can start, ascending; None if frames must be counted by decoding them all.
        caution: why frame n may not be the n-th one after seeking, for a reader that does not check; "" if it is.
    """

    pts: np.ndarray
    seconds: np.ndarray
    start: float
    fps: float
    keys: np.ndarray | None
    caution: str

    def between(self, start: float | None, end: float | None) -> tuple[int, int]:
        """First and one past the last frame with `start` <= seconds < `end`."""
        first = 0 if start is None else int(np.searchsorted(self.seconds, start, side="left"))
        last = len(self.seconds) if end is None else int(np.searchsorted(self.seconds, end, side="left"))
        if first >= last:
            raise ValueError(
                f"read: [start, end) must hold a frame, got [{start}, {end}) "
                f"in a video of {len(self.seconds)} frames from 0 to {self.seconds[-1]:.3f} s"
            )
        return first, last


def import_av() -> Any:
    """PyAV, or an error that says what to install."""
    try:
        import av
    except ImportError as error:
        raise RuntimeError("video: reading and writing files needs PyAV: pip install 'pyvidx[video]'") from error
    return av


@contextmanager
def open_video(path: str) -> Iterator[tuple[Any, Any]]:
    """A PyAV container and its best video stream, closed at the end of the block.

    Raises:
        RuntimeError: the file is no video, or holds no video stream, or PyAV stumbles while the block reads it.
    """
    av = import_av()
    try:
        with av.open(path) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise RuntimeError(f"video: {path} holds no video stream")
            stream.thread_type = "AUTO"
            yield container, stream
    except av.FFmpegError as error:
        raise RuntimeError(f"video: {path} cannot be decoded by PyAV: {error}") from error


def scan(path: str, *, decode: bool = False) -> FrameIndex:
    """List the shown frames of a video.

    Args:
        path: a video file.
        decode: count by decoding every frame, which is slow and always right. It is done anyway where packets do not
            tell: no or repeated timestamps, AVI, VP8.

    Raises:
        RuntimeError: the file cannot be opened, or holds no video stream, or no frame.
    """
    with open_video(path) as (container, stream):
        family = container.format.name.split(",")[0]
        base, rate = stream.time_base, stream.average_rate
        packets = []
        if not decode and _COUNT_BY_DECODING.isdisjoint((stream.codec_context.name, family)):
            packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.size and not p.is_discard]
    times = [pts for pts, _ in packets]
    if not times or None in times or len(set(times)) < len(times):
        with open_video(path) as (container, stream):
            times = [frame.pts for frame in container.decode(stream)]
        keys, caution = None, "its frames can only be counted by decoding them"
    else:
        keys = np.union1d(0, np.searchsorted(np.sort(times), [pts for pts, is_key in packets if is_key])).astype(int)
        caution = "" if family in _LISTS_FRAMES else f"the {family} container does not list its frames"
        times.sort()
        if _has_leading_frames(packets):
            caution = "frames shown before a keyframe come after it in the file (open GOPs)"
    if not times:
        raise RuntimeError(f"video: {path} holds no frame")
    pts = np.arange(len(times))
    if None in times or (np.diff(times) <= 0).any():
        if not rate:
            raise RuntimeError(f"video: {path} has neither usable timestamps nor a frame rate")
        seconds, start = pts / float(rate), 0.0
    else:
        pts = np.array(times)
        seconds, start = (pts - pts[0]) * float(base), pts[0] * float(base)
    if not rate and seconds[-1] == 0:
        raise RuntimeError(f"video: {path} has no frame rate and fewer than two timestamps")
    fps = float(rate) if rate else (len(seconds) - 1) / float(seconds[-1])
    return FrameIndex(pts, seconds, start, fps, keys, caution)


def _has_leading_frames(packets: list[tuple[int, bool]]) -> bool:
    key = packets[0][0]
    for pts, is_key in packets:
        if is_key:
            key = pts
        elif pts < key:
            return True
    return False
