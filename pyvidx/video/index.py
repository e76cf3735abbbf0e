"""Which frames a file shows, and when: found by reading packets, without decoding.

Every reader is held to this one index. It makes frame numbers and times equal in all of them, and tells where a reader
would give a wrong frame without noticing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .clip import Damage
from .ffmpeg import import_av
from .shown import UNANNOUNCED, Shown, Suspect
from .source import Source, source_of
from .structure import cut

# These store when a packet is decoded, not when its frame is shown.
_NO_SHOWN_TIMES = {"avi", "asf"}
# VP8 keeps reference frames that are never shown in packets of their own.
_COUNT_BY_DECODING = {"vp8", *_NO_SHOWN_TIMES}
# Containers that list their frames, by the first of FFmpeg's names for them.
_LISTS_FRAMES = {"mov", "matroska", "flv"}
# Codecs with one frame per packet, tried with all readers.
_COUNTED = {"h264", "hevc", "mpeg4", "mjpeg", "vp9"}


@dataclass(frozen=True)
class FrameIndex:
    """The shown frames of a video, in order of presentation.

    Args:
        pts: [N] int64, presentation time of each frame in units of the stream's time base; frame numbers if the
            stream has no usable timestamps.
        seconds: [N] float64, the same in seconds since frame 0.
        start: time of frame 0 on the clock of the container, in seconds.
        fps: average frames per second, as the container states it.
        keys: frame numbers where decoding can start, ascending; None if frames must be counted by decoding them all.
        caution: why frame n may not be the n-th one after seeking, for a reader that does not check; "" if it is.
        size: H and W, as the header states them.
        careful: the frames were counted, and must be decoded, in the way of a damaged file.
        damaged: what counting them found.
    """

    pts: np.ndarray
    seconds: np.ndarray
    start: float
    fps: float
    keys: np.ndarray | None
    caution: str
    size: tuple[int, int] = (0, 0)
    careful: bool = False
    damaged: Damage = Damage()

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


def scan(source: Any) -> FrameIndex:
    """List the shown frames of a video by its packets, or by decoding where packets do not tell.

    That is: no or repeated timestamps, AVI, ASF, VP8.

    Args:
        source: a Source, or what can become one.

    Raises:
        Suspect: something is wrong with the file.
        RuntimeError: it cannot be opened, or holds no video stream, or no frame.
    """
    av = import_av()
    source = source if isinstance(source, Source) else source_of("scan", source)
    with source.video() as (container, stream, complaint):
        family = container.format.name.split(",")[0]
        base, rate = stream.time_base, stream.average_rate
        codec, claimed, count, packets = stream.codec_context, stream.frames, 0, []
        by_decoding = not _COUNT_BY_DECODING.isdisjoint((codec.name, family))
        if not by_decoding:
            try:
                for packet in container.demux(stream):
                    if packet.is_corrupt:
                        raise Suspect("a packet is marked as damaged by its container")
                    count += packet.size > 0 or packet.dts is not None
                    if packet.size and not packet.is_discard:
                        packets.append((packet.pts, packet.is_keyframe))
            except av.FFmpegError as error:
                raise Suspect(f"reading stops: {error.strerror}") from error
            except IndexError as error:
                raise Suspect(UNANNOUNCED) from error
            if count < len(stream.index_entries):
                raise Suspect("packets are missing")
    if complaint:
        raise Suspect(complaint)
    with source.raw() as file:
        if reason := cut(file, family):
            raise Suspect(reason)
    times = [pts for pts, _ in packets]
    if not times or None in times or len(set(times)) < len(times):
        return count_frames(source, careful=False)
    keys = np.union1d(0, np.searchsorted(np.sort(times), [pts for pts, is_key in packets if is_key])).astype(int)
    caution = ""
    if family not in _LISTS_FRAMES:
        caution = f"the {family} container does not list its frames"
    elif codec.name not in _COUNTED:
        caution = f"it was never tried on {codec.name}"
    elif claimed > count:
        caution = f"the header claims {claimed} frames where there are {count}"
    elif _has_leading_frames(packets):
        caution = "frames shown before a keyframe come after it in the file (open GOPs)"
    pts = np.sort(np.array(times))
    seconds = (pts - pts[0]) * float(base)
    size = codec.height, codec.width
    return FrameIndex(pts, seconds, pts[0] * float(base), _rate(source, rate, seconds), keys, caution, size)


def count_frames(source: Source, careful: bool) -> FrameIndex:
    """List the shown frames by decoding them all, which is slow and always right.

    Raises:
        Suspect: something is wrong with the file, and `careful` is False.
        RuntimeError: it cannot be opened, or holds no video stream, or no frame.
    """
    times = stored_times(source)
    with source.video() as opened:
        shown = Shown(source, opened, careful, times)
        seconds = np.array([second for _, second, _ in shown], dtype=np.float64)
        rate = opened.stream.average_rate
    if not len(seconds):
        why = f": {shown.damage.reason}" if shown.damage else ""
        raise RuntimeError(f"video: {source.name} holds no frame that can be decoded{why}")
    return FrameIndex(
        np.arange(len(seconds)),
        seconds,
        0.0,
        _rate(source, rate, seconds),
        None,
        "its frames can only be counted by decoding them",
        careful=careful,
        damaged=shown.damage,
    )


def stored_times(source: Source) -> list[float] | None:
    """Seconds of the frames of an AVI or ASF file, in the order they are shown: those of its packets, ascending.

    None for other containers, whose frames carry their times.
    """
    with source.video() as (container, stream, _):
        if container.format.name not in _NO_SHOWN_TIMES:
            return None
        av = import_av()
        ticks = set()
        try:
            for packet in container.demux(stream):
                if packet.size and packet.dts is not None:
                    ticks.add(packet.dts)
        except (av.FFmpegError, IndexError):
            pass  # whoever decodes it will meet the same error
        first = min(ticks, default=0)
        return [(tick - first) * float(stream.time_base) for tick in sorted(ticks)]


def _rate(source: Source, rate: float | None, seconds: np.ndarray) -> float:
    if rate:
        return float(rate)
    if seconds[-1] == 0:
        raise RuntimeError(f"video: {source.name} has no frame rate and fewer than two timestamps")
    return (len(seconds) - 1) / float(seconds[-1])


def _has_leading_frames(packets: list[tuple[int, bool]]) -> bool:
    key = packets[0][0]
    for pts, is_key in packets:
        if is_key:
            key = pts
        elif pts < key:
            return True
    return False
