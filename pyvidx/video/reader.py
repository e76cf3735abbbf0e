"""The public doors `read` and `stream`, and the choice of a reader behind them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import torch

from . import decord_reader, folder, followed, pyav_reader, sampling, torchcodec_reader
from .arguments import integer, number
from .clip import Clip, Damage
from .ffmpeg import complaints, listening
from .folder import FrameFolder
from .index import FrameIndex, count_frames, scan
from .shown import Suspect
from .source import Source, source_of

Video = str | os.PathLike[str] | bytes | BinaryIO

READERS = ("decord", "pyav", "torchcodec")
_OTHERS = {"decord": decord_reader.decode, "torchcodec": torchcodec_reader.decode}


def read(
    source: Video,
    frames: int | None = None,
    sampler: str | sampling.Rule = "uniform",
    reader: str = "auto",
    *,
    start: float | None = None,
    end: float | None = None,
    generator: torch.Generator | None = None,
    strict: bool = False,
    fps: float | None = None,
    max_bytes: int = 8 << 30,
    playlists: bool = False,
) -> Clip:
    """Read some frames of a video, chosen by a named rule.

    The file is scanned once for the times of its frames, then only what the rule chose is decoded. Nothing stays open.
    A file in which that meets damage is counted by decoding all of it: its frames are those that decode, skipping the
    packets that do not, as players show them; Clip.damaged says what was lost, and a warning does. Damage in packets
    that were not needed is not met; `strict` looks for it.

    Args:
        source: a video file by its path, its bytes, or a seekable binary file object; or a folder of JPEG, PNG, BMP or
            WebP frames of one size, in the order of the numbers in their names.
        frames: frames wanted; for the rules by frame rate, the most to take. None: the rule's own, 8 or its cap.
        sampler: a name of `sampling.names()`, or a function of (num_frames, wanted, fps, generator) giving indices.
        reader: "auto" is PyAV. "decord" (files by path, without damage, in which it counts frames rightly) or
            "torchcodec" takes that one or fails.
        start, end: choose among the frames with start <= seconds < end. Seconds count from the first shown frame.
        generator: the random state of the training rules; it is advanced.
        strict: decode all of the video, and raise at any damage.
        fps: frames per second of a folder of frames, which cannot do without; not for anything else.
        max_bytes: memory that the frames may take.
        playlists: open playlists (.m3u8, .mpd, ffconcat) and the files on this machine that they name, too.

    Returns:
        Clip with T = the number of indices the rule gives, usually `frames`; indices count from the start of the file.
        Pixels do not depend on the reader for 8-bit video, except 4:2:0 that is of odd height or interlaced: there, and
        for 10 bits, each reader's own FFmpeg interpolates the color planes a little differently.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an argument is out of range, or [start, end) holds no frame, or the frames exceed max_bytes.
        RuntimeError: no frame can be decoded, or the chosen reader fails, or `strict` found damage; the text says why.
    """
    if reader != "auto" and reader not in READERS:
        raise ValueError(f"read: reader must be 'auto' or one of {list(READERS)}, got {reader!r}")
    frames = None if frames is None else integer("read", "frames", frames, at_least=1)
    start = None if start is None else number("read", "start", start)
    end = None if end is None else number("read", "end", end)
    room = integer("read", "max_bytes", max_bytes)
    video = _source("read", source, fps, playlists)
    state = generator.get_state() if generator is not None else None
    for careful in (False, True):
        try:
            with _suspicious(video, careful):
                index = _index(video, careful, strict)
                if state is not None:
                    generator.set_state(state)
                first, last = index.between(start, end)
                chosen = first + sampling.sample(sampler, last - first, frames, index.fps, generator)
                wanted, order = torch.unique(chosen, return_inverse=True)
                pixels = torch.from_numpy(np.ascontiguousarray(_decode(video, index, wanted.tolist(), reader, room)))
            break
        except Suspect as sign:
            if careful:
                raise RuntimeError(f"read: {video.name} cannot be read: {sign}") from sign
    if index.damaged:
        warnings.warn(f"read: {video.name} is {index.damaged}", stacklevel=2)
    in_order = torch.equal(order, torch.arange(len(wanted)))
    return Clip(
        frames=pixels if in_order else pixels[order],
        seconds=torch.from_numpy(index.seconds)[chosen],
        indices=chosen,
        fps=index.fps,
        path=video.name,
        damaged=index.damaged,
    )


def stream(
    source: Video,
    *,
    chunk: int = 16,
    stride: int = 1,
    fps: float | None = None,
    reader: str = "auto",
    strict: bool = False,
    playlists: bool = False,
) -> Iterator[Clip]:
    """Go through a whole video in order, holding one chunk of frames at a time.

    Damage is skipped and told as in `read`, except what a decoder with threads writes to FFmpeg's log only; of that,
    read(..., strict=True) tells.

    Args:
        source: as in `read`.
        chunk: frames per Clip; the last one may be shorter.
        stride: keep every stride-th frame.
        fps: keep the first frame at or after each multiple of 1 / fps seconds, which follows a variable frame rate.
            A video slower than `fps` gives each frame once. Of a folder of frames, it is their own rate.
        reader: "auto" is PyAV; or "pyav", "torchcodec". decord cannot stream in bounded memory.
        strict: raise at the first damage instead of going on after it.
        playlists: as in `read`.

    Yields:
        Clip of up to `chunk` frames, with fresh memory. Its `damaged` is what was met so far.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: as `read`; before the first Clip, except for damage further on.
    """
    reader = "pyav" if reader == "auto" else reader
    if reader not in ("pyav", "torchcodec"):
        raise ValueError(f"stream: reader must be 'auto', 'pyav' or 'torchcodec', got {reader!r}")
    chunk, stride = integer("stream", "chunk", chunk, at_least=1), integer("stream", "stride", stride, at_least=1)
    fps = None if fps is None else number("stream", "fps", fps, above=0)
    is_folder = isinstance(source, (str, os.PathLike)) and os.path.isdir(source)
    video = _source("stream", source, fps if is_folder else None, playlists)
    if is_folder:
        fps = None
    if fps is not None and stride != 1:
        raise ValueError(f"stream: fps or stride must be given, not both; got fps={fps}, stride={stride}")
    return _chunks(video, reader, chunk, stride, fps, strict)


def follow(
    source: str | os.PathLike[str] | BinaryIO, *, chunk: int = 4, fps: float | None = None, idle: float = 10.0
) -> Iterator[Clip]:
    """`stream` of a video that is still being written, frames as they come: what a recorder or a camera sends.

        ffmpeg -i rtsp://... -f mpegts - | python watch.py        # follow("-")

    Args:
        source: "-" (standard input), a pipe, a file that grows, or a binary file object. Its container must be one
            that plays from its start: MPEG-TS, Matroska, WebM, FLV, fragmented MP4.
        chunk: frames per Clip; it comes when the frame after it does.
        fps: as in `stream`.
        idle: seconds that a file may stay as it is before that is taken for its end.

    Yields:
        Clip, as `stream` does. Damage is skipped and told.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: as `stream`.
    """
    chunk = integer("follow", "chunk", chunk, at_least=1)
    fps = None if fps is None else number("follow", "fps", fps, above=0)
    return _chunks(
        followed.followed("follow", source, number("follow", "idle", idle, at_least=0)), "pyav", chunk, 1, fps, False
    )


def _chunks(
    video: Source | FrameFolder, reader: str, chunk: int, stride: int, fps: float | None, strict: bool
) -> Iterator[Clip]:
    tick = 0

    def keep(number: int, seconds: float) -> bool:
        nonlocal tick
        if fps is None:
            return number % stride == 0
        # Times are multiples of a time base, so a frame meant for this tick may lie a rounding error before it.
        if seconds * fps < tick - 1e-6:
            return False
        tick = int(seconds * fps + 1e-6) + 1
        return True

    held: list[pyav_reader.Item] = []
    empty, told = True, False
    for item, damage in _iterate(video, reader, keep):
        if damage and strict and damage.frame is not None:
            raise RuntimeError(f"stream: {video.name} is {damage}")
        # A full chunk waits for what comes next: the end may tell that the file was cut.
        if held and (item is None or len(held) == chunk):
            if damage and not told:
                warnings.warn(f"stream: {video.name} is {damage}", stacklevel=2)
                told = True
            empty = False
            yield _clip(video.name, held, damage)
            held = []
        if item is not None:
            held.append(item)
    if empty:
        raise RuntimeError(f"video: {video.name} holds no frame that can be decoded")


def _iterate(
    video: Source | FrameFolder, reader: str, keep: Callable[[int, float], bool]
) -> Iterator[tuple[pyav_reader.Item | None, Damage]]:
    if isinstance(video, FrameFolder):
        return folder.iterate(video, keep)
    if isinstance(video, followed.Followed):
        return followed.iterate(video, keep)
    if reader == "pyav":
        return pyav_reader.iterate(video, keep)
    return torchcodec_reader.iterate(_path(video, reader), keep)


def _clip(name: str, held: list[pyav_reader.Item], damage: Damage) -> Clip:
    numbers, seconds, fps, images = zip(*held, strict=True)
    if len({image.shape for image in images}) > 1:
        raise RuntimeError(f"video: {name} changes its frame size between frames {numbers[0]} and {numbers[-1]}")
    return Clip(
        frames=torch.from_numpy(np.stack(images)),
        seconds=torch.tensor(seconds, dtype=torch.float64),
        indices=torch.tensor(numbers, dtype=torch.int64),
        fps=fps[0],
        path=name,
        damaged=damage,
    )


def _source(op: str, source: Video, fps: float | None, playlists: bool) -> Source | FrameFolder:
    fps = None if fps is None else number(op, "fps", fps, above=0)
    if isinstance(source, (str, os.PathLike)) and os.path.isdir(source):
        return folder.folder_of(op, os.fsdecode(source), fps)
    if fps is not None:
        raise ValueError(f"{op}: fps is for a folder of frames; a video states its own, got fps={fps}")
    return source_of(op, source, playlists)


@contextmanager
def _suspicious(video: Source | FrameFolder, careful: bool) -> Iterator[None]:
    """Raises Suspect after the block if FFmpeg logged an error anywhere: of another file, perhaps; care will tell."""
    if careful or isinstance(video, FrameFolder):
        yield
        return
    with listening([]):
        before = complaints()
        yield
        if complaints() != before:
            raise Suspect("FFmpeg logs an error")


def _index(video: Source | FrameFolder, careful: bool, strict: bool) -> FrameIndex:
    if isinstance(video, FrameFolder):
        return video.index
    if careful:
        index = count_frames(video, careful=True)
        if strict and index.damaged:
            raise RuntimeError(f"read: {video.name} is {index.damaged}")
        return index
    index = scan(video)
    if strict:
        count_frames(video, careful=False)
    return index


def _decode(video: Source | FrameFolder, index: FrameIndex, wanted: list[int], reader: str, room: int) -> np.ndarray:
    if isinstance(video, FrameFolder):
        return folder.decode(video, wanted, room)
    if reader in ("auto", "pyav"):
        return pyav_reader.decode(video, index, wanted, room)
    path = _path(video, reader)
    try:
        return _OTHERS[reader](path, index, wanted, room)
    except ValueError:
        raise
    except Exception as error:  # decord's own error class cannot be named without importing decord
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, ImportError):
            reason = f"it is not installed ({reason})"
        raise RuntimeError(f"read: {video.name} cannot be read by {reader}: {reason}") from error


def _path(video: Source, reader: str) -> str:
    if video.path is None:
        raise ValueError(f"read: {reader} reads files by path only, got {video.name}; use reader='pyav'")
    return video.path
