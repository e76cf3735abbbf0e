"""The frames that a video shows, in order, and what went wrong on the way to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from .clip import Damage
from .ffmpeg import import_av, listening
from .source import Opened, Source
from .structure import cut

# Their decoders keep their errors to the log, whatever they are told.
_SAY_NOTHING = {
    "gif", "mjpeg", "wmv1", "wmv2", "msmpeg4", "msmpeg4v2", "msmpeg4v3", "h261", "h263", "flv", "rv10", "rv20",
}  # fmt: skip

# PyAV answers such a packet with an IndexError.
UNANNOUNCED = "a packet is of a stream that the header does not announce"


class Suspect(Exception):
    """A first sign of damage. In several threads an error is not told of the packet it belongs to: begin again."""


class Shown:
    """Iterates over (number, second, frame) of an open video, from where it stands.

    Args:
        source: what was opened.
        opened: as Source.video gives it.
        careful: decode in one thread, skip the packets that cannot be decoded and keep count of them in `damage`, as
            FFmpeg's own player does. Otherwise in several threads, and the first sign of damage raises Suspect: the
            decoder is told to refuse what it would conceal.
        times: seconds of the frames, for containers that do not store them.
    """

    def __init__(self, source: Source, opened: Opened, careful: bool, times: Sequence[float] | None = None):
        self.source, self.careful, self.times = source, careful, times
        self.container, self.stream, complaint = opened
        self.damage = Damage()
        self.number = 0
        self.listed = 0  # packets met
        self._promised = self._given = None  # presentation times: the latest of a packet, that of the newest frame
        self._first: int | None = None
        self._shift, self._second = 0.0, -1.0
        self._sign: int | None = None  # presentation time of the packet that gave the first sign
        codec = self.stream.codec_context
        self.listens = careful or codec.name in _SAY_NOTHING
        if self.listens:
            codec.thread_count = 1
        else:
            self.stream.thread_type = "AUTO"
            codec.options = {"err_detect": "explode"}
        if complaint:
            self._note(None, complaint)

    def __iter__(self) -> Iterator[tuple[int, float, Any]]:
        for frame in self.frames():
            second, self._given = self._time(frame), frame.pts
            self._place(frame.pts, second)
            yield self.number, second, frame
            self.number += 1
        if reason := self._short():
            self._note(None, reason, cut=True)
        if not self.careful and self._ends_early():
            raise Suspect("the last frames are missing")
        self._place(None, self._second + 1 / float(self.stream.average_rate or 1) if self.number else 0.0)

    def frames(self) -> Iterator[Any]:
        """The frames alone, in the order in which they are shown."""
        av = import_av()
        packets = self.container.demux(self.stream)
        while True:
            heard: list[tuple[str, str]] = []
            try:
                with listening(heard):
                    packet = next(packets, None)
            except av.FFmpegError as error:
                self._note(None, f"reading stops: {error.strerror}", cut=True)
                yield from self._decoded(None)
                return
            except IndexError:
                self._note(None, UNANNOUNCED, skipped=1)
                packets = self.container.demux(self.stream)  # from where it is
                continue
            if heard:
                self._note(None, heard[0][1])
            if packet is None:
                return
            self.listed += packet.size > 0 or packet.dts is not None  # the last one only empties the decoder
            if packet.size and packet.pts is not None and not packet.is_discard:
                self._promised = max(packet.pts, packet.pts if self._promised is None else self._promised)
            if packet.is_corrupt:
                self._note(packet.pts, "a packet is marked as damaged by its container")
            yield from self._decoded(packet)

    def _decoded(self, packet: Any) -> list[Any]:
        av = import_av()
        heard: list[tuple[str, str]] = []
        try:
            # In one thread only, what is heard is about this packet.
            with listening(heard) if self.listens else nullcontext():
                frames = self.stream.codec_context.decode(packet)
        except av.error.EOFError:  # told twice that the video ends
            return []
        except av.FFmpegError as error:
            self._note(packet and packet.pts, heard[0][1] if heard else error.strerror, skipped=1)
            return []
        concealed = sum(frame.is_corrupt for frame in frames)
        if concealed or heard:
            pts = next((frame.pts for frame in frames if frame.is_corrupt), packet and packet.pts)
            self._note(pts, heard[0][1] if heard else "the decoder made up a part of it", concealed=max(concealed, 1))
        return frames

    def _note(self, pts: int | None, reason: str, *, skipped: int = 0, concealed: int = 0, cut: bool = False) -> None:
        if not self.careful:
            raise Suspect(reason)
        if not self.damage:
            self._sign = pts
        old = self.damage
        self.damage = replace(
            old,
            skipped=old.skipped + skipped,
            concealed=old.concealed + concealed,
            cut=old.cut or cut,
            reason=old.reason or reason,
        )

    def _place(self, pts: int | None, second: float) -> None:
        """The first sign of damage gets the number of the first frame shown at or after it."""
        if self.damage and self.damage.frame is None and (None in (pts, self._sign) or pts >= self._sign):
            self.damage = replace(self.damage, frame=self.number, second=second)

    def _ends_early(self) -> bool:
        # An error that comes while the threads are emptied at the end takes the frames behind it along, untold. Less
        # than a frame is the second field of an interlaced one.
        if None in (self._promised, self._given) or not self.stream.average_rate:
            return False
        return (self._promised - self._given) * self.stream.time_base * self.stream.average_rate > 0.75

    def _short(self) -> str:
        promised = len(self.stream.index_entries)
        if promised > self.listed:
            return f"{promised} packets are listed, {self.listed} are there"
        with self.source.raw() as file:
            return cut(file, self.container.format.name.split(",")[0])

    def _time(self, frame: Any) -> float:
        """Seconds since the first frame; a clock that jumps back goes on where it was."""
        if self.times is not None:
            known = self.number < len(self.times)
            second = self.times[self.number] if known else self._second + self._step()
        elif frame.pts is None:
            second = self.number * self._step()
        else:
            self._first = frame.pts if self._first is None else self._first
            second = (frame.pts - self._first) * float(self.stream.time_base) + self._shift
        if second <= self._second:
            self._shift += self._second + self._step() - second
            second = self._second + self._step()
        self._second = second
        return second

    def _step(self) -> float:
        rate = self.stream.average_rate
        if not rate:
            raise RuntimeError(f"video: {self.source.name} has neither usable timestamps nor a frame rate")
        return 1 / float(rate)
