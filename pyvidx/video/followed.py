"""A video that is still being written: standard input, a pipe, or a file that grows."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from .clip import Damage
from .pyav_reader import Item, rgb
from .shown import Shown
from .source import Source

PAUSE = 0.05  # seconds between two looks at a file that has not grown


@dataclass(frozen=True)
class Followed(Source):
    """What is read once, from its start, as it comes. `data`: a file object with `read`, if there is no path.

    Args:
        idle: seconds that a file may stay as it is before that is taken for its end.
    """

    idle: float = 10.0

    @contextmanager
    def _target(self) -> Iterator[_Follower]:
        if self.path is None:
            yield _Follower(self.data, 0.0)
            return
        with open(self.path, "rb", buffering=0) as file:
            yield _Follower(file, self.idle if os.path.isfile(self.path) else 0.0)

    @contextmanager
    def raw(self) -> Iterator[BinaryIO]:
        """Nothing: what was read is gone, so no structure is checked."""
        yield io.BytesIO()

    def _check_size(self, frames: int) -> None:
        """A header cannot know how long the stream gets."""


class _Follower:
    """What PyAV reads from: no `seek`, so it does not look back or ahead."""

    def __init__(self, file: BinaryIO, idle: float):
        self.take = getattr(file, "read1", file.read)  # what is there, where `read` waits for all that was asked for
        self.idle, self.ended = idle, False

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, as soon as there are some; none at the end, which FFmpeg asks for more than once."""
        until = time.monotonic() + self.idle
        while not self.ended:
            data = self.take(size) or b""  # None: nothing yet, of what does not block
            if isinstance(data, str):
                raise ValueError("follow: a file object must give bytes, got str; open the file with 'rb'")
            if data:
                return bytes(data)
            self.ended = time.monotonic() >= until
            time.sleep(0 if self.ended else PAUSE)
        return b""


def followed(op: str, source: str | os.PathLike[str] | BinaryIO, idle: float) -> Followed:
    """What to follow: "-" (standard input), a path, or a binary file object that is read from where it stands.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, a file object that is not binary, or none of these.
    """
    if source == "-":
        return Followed("<stdin>", data=sys.stdin.buffer, idle=idle)
    if hasattr(source, "read"):
        if isinstance(source, io.TextIOBase):
            raise ValueError(f"{op}: a file object must give bytes; open the file with 'rb'")
        return Followed(f"<{type(source).__name__}>", data=source, idle=idle)
    if not isinstance(source, (str, bytes, os.PathLike)):
        raise ValueError(f"{op}: what is followed must be a path, '-' or a file object, got {type(source).__name__}")
    path = os.fsdecode(source)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{op}: no such file: {path}")
    if os.path.isdir(path):
        raise ValueError(f"{op}: what is followed must be a file or a pipe, got the folder {path}")
    return Followed(path, path=path, idle=idle)


def iterate(source: Followed, keep: Callable[[int, float], bool]) -> Iterator[tuple[Item | None, Damage]]:
    """As pyav_reader.iterate, in one go: what is damaged is skipped, as nobody can go back."""
    with source.video() as opened:
        fps = float(opened.stream.average_rate or 0)
        shown = Shown(source, opened, True)
        for number, seconds, frame in shown:
            if keep(number, seconds):
                yield (number, seconds, fps, rgb(source, frame)), shown.damage
    yield None, shown.damage
