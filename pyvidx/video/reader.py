"""The public doors `read` and `stream`, and the choice of a reader behind them."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator

import numpy as np
import torch

from . import decord_reader, pyav_reader, sampling, torchcodec_reader
from .clip import Clip
from .index import FrameIndex, scan

# Of the files in a folder, those that are videos.
SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv", ".3gp")

_DECODE = {"decord": decord_reader.decode, "pyav": pyav_reader.decode, "torchcodec": torchcodec_reader.decode}
_ITERATE = {"pyav": pyav_reader.iterate, "torchcodec": torchcodec_reader.iterate}


def read(
    path: str | os.PathLike[str],
    frames: int | None = None,
    sampler: str | sampling.Rule = "uniform",
    reader: str = "auto",
    *,
    start: float | None = None,
    end: float | None = None,
    generator: torch.Generator | None = None,
) -> Clip:
    """Read some frames of a video, chosen by a named rule.

    The file is scanned once for the times of its frames, then only what the rule chose is decoded. Nothing stays open.

    Args:
        path: a video file.
        frames: frames wanted; for the rules by frame rate, the most to take. None: the rule's own, 8 or its cap.
        sampler: a name of `sampling.names()`, or a function of (num_frames, wanted, fps, generator) giving indices.
        reader: "auto" is decord, and PyAV with a warning where decord is absent or cannot decode the file.
            "decord", "pyav" or "torchcodec" takes that one or fails.
        start, end: choose among the frames with start <= seconds < end. Seconds count from the first shown frame.
        generator: the random state of the training rules; it is advanced.

    Returns:
        Clip with T = the number of indices the rule gives, usually `frames`; indices count from the start of the file.
        Pixels do not depend on the reader for 8-bit video, except 4:2:0 of odd height: there, and for 10 bits, each
        reader's own FFmpeg interpolates the color planes a little differently.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an argument is out of range, or [start, end) holds no frame.
        RuntimeError: no reader could decode the file; the text says which failed and why.
    """
    path = _existing("read", path)
    if reader != "auto" and reader not in _DECODE:
        raise ValueError(f"read: reader must be 'auto' or one of {sorted(_DECODE)}, got {reader!r}")
    state = generator.get_state() if generator is not None else None
    for by_decoding in (False, True):
        index = scan(path, decode=by_decoding)
        if state is not None:
            generator.set_state(state)
        first, last = index.between(start, end)
        chosen = first + sampling.sample(sampler, last - first, frames, index.fps, generator)
        wanted, order = torch.unique(chosen, return_inverse=True)
        try:
            pixels = torch.from_numpy(np.ascontiguousarray(_decode(path, index, wanted.tolist(), reader)))
        except pyav_reader.FrameLost:
            # The packets promised a frame that the decoder skips (a stream cut in the middle): count what it shows.
            if by_decoding:
                raise
            continue
        break
    in_order = torch.equal(order, torch.arange(len(wanted)))
    return Clip(
        frames=pixels if in_order else pixels[order],
        seconds=torch.from_numpy(index.seconds)[chosen],
        indices=chosen,
        fps=index.fps,
        path=path,
    )


def stream(
    path: str | os.PathLike[str],
    *,
    chunk: int = 16,
    stride: int = 1,
    fps: float | None = None,
    reader: str = "auto",
) -> Iterator[Clip]:
    """Go through a whole video in order, holding one chunk of frames at a time.

    Args:
        path: a video file.
        chunk: frames per Clip; the last one may be shorter.
        stride: keep every stride-th frame.
        fps: keep the first frame at or after each multiple of 1 / fps seconds, which follows a variable frame rate.
            A video slower than `fps` gives each frame once.
        reader: "auto" is PyAV; or "pyav", "torchcodec". decord cannot stream in bounded memory.

    Yields:
        Clip of up to `chunk` frames, with fresh memory.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: as `read`; before the first Clip, except for damage further on.
    """
    path = _existing("stream", path)
    reader = "pyav" if reader == "auto" else reader
    if reader not in _ITERATE:
        raise ValueError(f"stream: reader must be 'auto' or one of {sorted(_ITERATE)}, got {reader!r}")
    if chunk < 1 or stride < 1 or (fps is not None and (fps <= 0 or stride != 1)):
        raise ValueError(
            f"stream: chunk and stride must be >= 1 and fps > 0, and fps or stride be given, not both; "
            f"got chunk={chunk}, stride={stride}, fps={fps}"
        )
    return _chunks(path, reader, chunk, stride, fps)


def _chunks(path: str, reader: str, chunk: int, stride: int, fps: float | None) -> Iterator[Clip]:
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

    held: list[tuple[int, float, float, np.ndarray]] = []
    empty = True
    for item in _ITERATE[reader](path, keep):
        empty = False
        held.append(item)
        if len(held) == chunk:
            yield _clip(path, held)
            held = []
    if held:
        yield _clip(path, held)
    if empty:
        raise RuntimeError(f"video: {path} holds no frame")


def _clip(path: str, held: list[tuple[int, float, float, np.ndarray]]) -> Clip:
    numbers, seconds, fps, images = zip(*held, strict=True)
    if len({image.shape for image in images}) > 1:
        raise RuntimeError(f"video: {path} changes its frame size between frames {numbers[0]} and {numbers[-1]}")
    return Clip(
        frames=torch.from_numpy(np.stack(images)),
        seconds=torch.tensor(seconds, dtype=torch.float64),
        indices=torch.tensor(numbers, dtype=torch.int64),
        fps=fps[0],
        path=path,
    )


def _existing(op: str, path: str | os.PathLike[str]) -> str:
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{op}: no such file: {path}")
    return path


def _decode(path: str, index: FrameIndex, wanted: list[int], reader: str) -> np.ndarray:
    if reader == "pyav":
        return pyav_reader.decode(path, index, wanted)
    name = "decord" if reader == "auto" else reader
    try:
        if name == "decord" and importlib.util.find_spec("decord") is None:
            raise RuntimeError("it is not installed")
        return _DECODE[name](path, index, wanted)
    except Exception as error:  # decord's own error class cannot be named without importing decord
        reason = f"{name}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        if reader != "auto":
            raise RuntimeError(f"read: {path} cannot be read by {reason}") from error
    warnings.warn(f"read: {path}: {reason}; reading it with PyAV instead", stacklevel=3)
    try:
        return pyav_reader.decode(path, index, wanted)
    except pyav_reader.FrameLost:
        raise
    except RuntimeError as error:
        raise RuntimeError(f"read: {path} cannot be read by {reason}; nor by pyav: {error}") from error
