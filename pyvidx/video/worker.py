"""The process that decodes for `pyvidx.video.pool`, and how the two talk.

A message is its length, then a pickle, and may bring one open file. Frames go through memory that both have mapped: a
file without a name, so that no kill can leave it behind and no size of /dev/shm limits it. The parent copies them out,
and the next clip is written to the same place: pages that are new to both cost several times the two copies.
"""

from __future__ import annotations

import mmap
import os
import pickle
import socket
import struct
import tempfile
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import fields
from typing import Any, BinaryIO, NamedTuple

import torch

from .reader import read

_LENGTH = struct.Struct("<Q")
BEGAN = "began"
# Bytes that each worker keeps for its next clip.
KEPT = 256 << 20


class Request(NamedTuple):
    """A read to do.

    Attributes:
        source: path; None: the bytes in the file that comes with the message.
        folder: that a relative path starts from; None if it is gone.
        options: pickled keyword arguments of `read`, apart from the generator.
        state: of the generator, or None.
    """

    source: str | bytes | None
    folder: str | None
    options: bytes
    state: torch.Tensor | None


class Reply(NamedTuple):
    """What became of it. The frames are in the memory of which the last file that came is.

    Attributes:
        clip: fields of Clip, with the shape of its frames in place of them; None if it failed.
        error: what `read` raised, or None.
        warned: category and text of its warnings.
        state: of the generator after reading.
        seconds: that reading took.
    """

    clip: dict[str, Any] | None
    error: Exception | None
    warned: list[tuple[type[Warning], str]]
    state: torch.Tensor | None
    seconds: float


def nameless_file() -> BinaryIO:
    """An empty file in memory, or where the system has none such, on disk; gone when nobody has it open."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("pyvidx"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def fill(file: BinaryIO, content: memoryview) -> None:
    """Write all of it, however much the system takes at once."""
    while content:
        content = content[file.write(content) :]


def mapped(file: BinaryIO, count: int) -> mmap.mmap:
    # At once: faults page by page cost more.
    return mmap.mmap(file.fileno(), count, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))


def send(connection: socket.socket, message: Any, file: BinaryIO | None = None) -> None:
    data = pickle.dumps(message)
    socket.send_fds(connection, [_LENGTH.pack(len(data))], [] if file is None else [file.fileno()])
    connection.sendall(data)


def receive(connection: socket.socket) -> tuple[Any, BinaryIO | None]:
    """The next message and the file that it brought.

    Raises:
        EOFError, ConnectionError: the other side is gone.
        TimeoutError: of the connection.
    """
    cloexec = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
    length, handles, *_ = socket.recv_fds(connection, _LENGTH.size, 1, cloexec)
    file = open(handles[0], "r+b", buffering=0) if handles else None
    try:
        length += _bytes(connection, _LENGTH.size - len(length))
        return pickle.loads(_bytes(connection, *_LENGTH.unpack(length))), file
    except BaseException:
        if file is not None:
            file.close()
        raise


def _bytes(connection: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    rest = memoryview(data)
    while rest:
        got = connection.recv_into(rest)
        if not got:
            raise EOFError("the other side is gone")
        rest = rest[got:]
    return bytes(data)


def main(handle: int, parent: int, memory: int) -> None:
    """Answer requests until the parent is gone.

    Args:
        handle: of the connection.
        parent: process id.
        memory: bytes that decoding may take; 0: no bound.
    """
    connection = socket.socket(fileno=handle)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # where memory runs out, the file that takes it should end, not the run
    with suppress(ImportError):
        import av  # noqa: F401  # now, while the parent is busy with its own start
    if memory:
        _bound(memory)
    room = None
    with suppress(EOFError, ConnectionError):
        while True:
            request, content = receive(connection)
            # What decoders print is kept for the case that this file is their last.
            os.ftruncate(2, 0)
            os.lseek(2, 0, os.SEEK_SET)
            send(connection, BEGAN)
            reply, pixels = _answer(request, content)
            file = None
            if pixels is not None and (room is None or len(room) < len(pixels)):
                file = nameless_file()
                file.truncate(len(pixels))
                room = mapped(file, len(pixels))
            if pixels is not None:
                room[: len(pixels)] = pixels
            send(connection, reply, file)
            if file is not None:
                file.close()
            if room is not None and len(room) > KEPT:
                room = None
            del reply, pixels


def _end_with(parent: int) -> None:
    # Not PR_SET_PDEATHSIG: it fires when the thread ends that started this process. Nor the end of the connection
    # alone: while a file is decoded nobody listens, and processes that the parent forked hold it open.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _bound(memory: int) -> None:
    import resource

    with open("/proc/self/status") as file:
        used = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + memory, used + memory))


def _answer(request: Request, content: BinaryIO | None) -> tuple[Reply, memoryview | None]:
    began = time.perf_counter()
    clip = error = pixels = generator = None
    with warnings.catch_warnings(record=True) as caught:
        for kind in (UserWarning, RuntimeWarning):  # what libraries say of their own insides is not about the file
            warnings.simplefilter("always", kind)
        try:
            if request.folder is not None:
                with suppress(OSError):  # an absolute path needs none
                    os.chdir(request.folder)
            if request.state is not None:
                generator = torch.Generator()
                generator.set_state(request.state)
            source = request.source
            if content is not None:
                with content:
                    content.seek(0)
                    source = content.read()
            found = read(source, **_options(request.options), generator=generator)
            clip = {field.name: getattr(found, field.name) for field in fields(found)}
            clip |= {"frames": tuple(found.frames.shape)}
            clip |= {name: clip[name].numpy() for name in ("seconds", "indices")}  # which pickles 50 times as fast
            pixels = memoryview(found.frames.contiguous().numpy()).cast("B")
        except Exception as raised:  # all of them are the parent's to judge
            error, clip, pixels = _portable(raised, request), None, None
    state = None if generator is None else generator.get_state()
    warned = [(w.category, str(w.message)) for w in caught]
    return Reply(clip, error, warned, state, time.perf_counter() - began), pixels


def _options(pickled: bytes) -> dict[str, Any]:
    try:
        return pickle.loads(pickled)
    except (AttributeError, ImportError) as error:
        raise ValueError(
            "Decoders: a sampler must be a name, or a function of a module that another process can import; "
            f"one of the script that is run is not: {error}"
        ) from error


def _portable(error: Exception, request: Request) -> Exception:
    """The error, or where it cannot be carried to another process, one that says the same."""
    if isinstance(error, MemoryError):
        return RuntimeError(f"read: {request.source or '<bytes>'} needs more memory than there is: {error}")
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return copy
    except Exception:  # whatever another library's constructor makes of the wrong arguments
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")
