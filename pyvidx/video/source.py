"""What can be read: a file by its name, bytes, a file object; and how FFmpeg is let at it.

FFmpeg by itself follows whatever a file says: playlists name other files and addresses, a file named "12:30.mp4" is
taken for a protocol, "%03d.jpg" for a pattern. Here a name is a name, nothing is opened but that file, and only
containers that hold their own data are looked into, unless playlists are asked for.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from .ffmpeg import import_av, listening

# Containers and raw streams that hold their own data, by FFmpeg's names. Left out: concat, hls, dash, image2, sdp,
# rtsp, lavfi, imf, mlv, vobsub and others, which open what they name.
FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,apng,mxf,gxf,nut,dv,ivf,rm,wtv,swf,yuv4mpegpipe,"
    "h264,hevc,vvc,av1,obu,m4v,mpegvideo,mjpeg,h261,h263,vc1,vc1test,dirac,cavsvideo,amv,nsv,dhav,wav,mp3,flac,aac"
)
PLAYLISTS = "hls,dash,concat"

# The largest picture that is decoded: 8192 x 4320 with its padding. A header may claim what no memory can hold.
MAX_PIXELS = 36_000_000


class Opened(NamedTuple):
    """A PyAV container, its best video stream, and what FFmpeg found wrong on the way there, "" if nothing."""

    container: Any
    stream: Any
    complaint: str


@dataclass(frozen=True)
class Source:
    """One video that can be opened again and again.

    Args:
        name: for messages and Clip.path.
        path: the file, or None.
        data: its bytes, or a seekable binary file object, if there is no path.
        playlists: open playlists, and the files on this machine that they name.
    """

    name: str
    path: str | None = None
    data: bytes | BinaryIO | None = None
    playlists: bool = False

    @contextmanager
    def raw(self) -> Iterator[BinaryIO]:
        """The bytes as a file object at its start; one that was given is sent back to where it was."""
        if self.path is not None:
            with open(self.path, "rb") as file:
                yield file
        elif isinstance(self.data, bytes):
            yield io.BytesIO(self.data)
        else:
            before = self.data.tell()
            self.data.seek(0)
            try:
                yield self.data
            finally:
                self.data.seek(before)

    @contextmanager
    def video(self) -> Iterator[Opened]:
        """The video, closed at the end of the block.

        Raises:
            RuntimeError: it is no video, or a playlist, or holds no video stream, or one that PyAV has no decoder for,
                or pictures too large, or PyAV stumbles while the block reads it.
        """
        av = import_av()
        heard: list[tuple[str, str]] = []
        try:
            with self._target() as target:
                with listening(heard):
                    container = self._open(av, target)
                with container:
                    stream = container.streams.best("video")
                    if stream is None:
                        raise RuntimeError(f"video: {self.name} holds no video stream")
                    self._check(container, stream)
                    sound = {s.codec_context.name for s in container.streams if s.codec_context and s.type != "video"}
                    try:
                        yield Opened(container, stream, next((what for who, what in heard if who not in sound), ""))
                    finally:
                        # Waits for its threads without Python's lock, which one of them may want to log an error;
                        # to free it does not.
                        stream.codec_context.flush_buffers()
        except av.FFmpegError as error:
            raise RuntimeError(
                f"video: {self.name} cannot be decoded by PyAV: {error.strerror}; it is damaged, or no video in a "
                "container that holds its own data (playlists are followed only with playlists=True)"
            ) from error

    def _open(self, av: Any, target: Any) -> Any:
        formats = f"{FORMATS},{PLAYLISTS}" if self.playlists else FORMATS
        # Titles are in any encoding. PyAV 19 reads them all, and does not have this argument any more.
        titles = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
        return av.open(
            target,
            container_options={"format_whitelist": formats, "protocol_whitelist": "file"},
            options={"max_pixels": str(MAX_PIXELS)},  # also for the decoders that FFmpeg looks into the file with
            buffer_size=1 << 18,
            **titles,
        )

    @contextmanager
    def _target(self) -> Iterator[Any]:
        if self.path is not None:
            yield f"file:{self.path}"
        else:
            with self.raw() as file:
                yield _Bytes(file)

    def size(self) -> int:
        """In bytes."""
        with self.raw() as file:
            return file.seek(0, os.SEEK_END)

    def _check(self, container: Any, stream: Any) -> None:
        codec = stream.codec_context
        if codec is None:
            raise RuntimeError(
                f"video: {self.name} cannot be decoded: PyAV has no decoder for its codec, which the file says is "
                + _codec_of(self, container, stream)
            )
        if codec.width * codec.height > MAX_PIXELS:
            raise RuntimeError(
                f"video: {self.name} has pictures of {codec.width} x {codec.height}; "
                f"at most {MAX_PIXELS} pixels are read"
            )
        self._check_size(stream.frames)

    def _check_size(self, frames: int) -> None:
        if not self.playlists and frames > (size := self.size()):
            raise RuntimeError(f"video: {self.name} claims {frames} frames in {size} bytes; its header is damaged")


class _Bytes:
    """A file object as PyAV may use it: it copies what `read` returns without looking at the length."""

    def __init__(self, file: BinaryIO):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        data = bytes(self.file.read(size))
        if len(data) > size:
            raise ValueError(f"video: read({size}) of a file object must give at most {size} bytes, got {len(data)}")
        return data


def source_of(op: str, source: Any, playlists: bool = False) -> Source:
    """What a reader was given, as a Source.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a URL, something that is no regular file, or a file object that is not binary or not seekable.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return Source("<bytes>", data=bytes(source), playlists=playlists)
    if hasattr(source, "read"):
        return Source(_name_of(source), data=_checked(op, source), playlists=playlists)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"{op}: the video must be a path, bytes, a binary file object or a folder of frames, "
            f"got {type(source).__name__}"
        )
    path = os.fsdecode(source)
    if not os.path.exists(path):
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path):
            raise ValueError(
                f"{op}: pyvidx opens no network connection: download the file and give its path, or give its bytes; "
                f"got {path}"
            )
        raise FileNotFoundError(f"{op}: no such file: {path}")
    if not os.path.isfile(path):
        raise ValueError(f"{op}: the video must be a regular file, got {path}")
    return Source(path, path=path, playlists=playlists)


def _checked(op: str, file: Any) -> BinaryIO:
    if isinstance(file, io.TextIOBase) or not isinstance(file.read(0), (bytes, bytearray, memoryview)):
        raise ValueError(f"{op}: a file object must give bytes; open the file with 'rb'")
    seekable = getattr(file, "seekable", lambda: hasattr(file, "seek") and hasattr(file, "tell"))
    if not seekable():
        raise ValueError(f"{op}: a file object must be seekable; read it into bytes first")
    return file


def _name_of(file: Any) -> str:
    name = getattr(file, "name", None)
    return os.fsdecode(name) if isinstance(name, (str, bytes)) else f"<{type(file).__name__}>"


def _codec_of(source: Source, container: Any, stream: Any) -> str:
    """The name of a codec that PyAV has no object for, or the four letters that stand for it in an MP4."""
    av = import_av()
    before = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)  # FFmpeg tells it to its log only
    try:
        text = container.dumps_format()
    finally:
        av.logging.set_level(before)
    found = re.search(rf"Stream #\d+:{stream.index}\b.*?Video: ([^,\n]+)", text)
    if found and found.group(1) != "none":
        return found.group(1)
    with source.raw() as file:
        head = file.read(1 << 20)
        file.seek(max(0, source.size() - (1 << 20)))
        head += file.read()
    letters = re.search(rb"hdlr.{8}vide.*?stsd.{12}(.{4})", head, re.DOTALL)
    return repr(letters.group(1).decode("latin-1")) if letters else "of unknown name"
