"""A worker process as its parent sees it."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from .worker import KEPT, Reply, Request, mapped, nameless_file, receive, send

# Seconds. Importing torch takes two; on a machine that swaps, many more.
_START = 300.0
_CODE = "import sys; sys.path[:] = sys.argv[4:]; from pyvidx.video.worker import main; main(*map(int, sys.argv[1:4]))"
_ROOT = str(Path(__file__).parents[2])


class Lost(Exception):
    """A worker ended without an answer. began: it had begun with the file, which is therefore to blame."""

    def __init__(self, began: bool, why: str):
        super().__init__(why)
        self.began, self.why = began, why


class Worker:
    """A process that answers one request at a time.

    Raises:
        Lost: the system has no process, memory or descriptor for it.
    """

    def __init__(self, memory: int | None):
        try:
            self._start(memory)
        except OSError as error:
            raise Lost(False, f"no decoding process can be started: {error}") from error

    def _start(self, memory: int | None) -> None:
        self.printed, self.room = nameless_file(), None
        self.connection, theirs = socket.socketpair()
        numbers = (theirs.fileno(), os.getpid(), memory or 0)
        # A copy of sys.path: the worker must find what this process finds, by the same names.
        command = [sys.executable, "-c", _CODE, *map(str, numbers), *(p for p in sys.path if isinstance(p, str)), _ROOT]
        try:
            # A session of its own: Ctrl-C is for the parent, which decides what becomes of its workers. subprocess and
            # not multiprocessing: that runs an unguarded script again, and a DataLoader's workers may not use it.
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self.printed, stderr=self.printed,
                pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
        finally:
            theirs.close()

    def ask(self, request: Request, content: BinaryIO | None, timeout: float | None) -> tuple[Reply, Tensor | None]:
        """The reply and its frames.

        Raises:
            Lost: there is none.
        """
        began = False
        try:
            self.connection.settimeout(_START)
            send(self.connection, request, content)
            receive(self.connection)
            began = True
            self.connection.settimeout(timeout)
            reply, file = receive(self.connection)
        except TimeoutError:
            late = f"it takes longer than {timeout} s" if began else f"no decoding process starts within {_START} s"
            raise Lost(began, late) from None
        except (EOFError, ConnectionError):
            which = "its decoding process ended" if began else "no decoding process starts: one ended"
            raise Lost(began, f"{which} {self._death()}") from None
        if reply.clip is None:
            return reply, None
        try:
            return reply, self._taken(file, reply.clip["frames"])
        except (OSError, RuntimeError) as error:
            raise Lost(True, f"its frames cannot be taken over: {error}") from error

    def _taken(self, file: BinaryIO | None, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        if file is not None:
            with file:
                self.room = mapped(file, os.fstat(file.fileno()).st_size)
        if self.room is None or len(self.room) < count:
            raise OSError("there are too many open files")  # the system drops what it cannot open
        # Not by torch, which would start threads for it beside those of the model.
        pixels = np.frombuffer(self.room, np.uint8, count).copy()
        if len(self.room) > KEPT:
            self.room = None
        return torch.from_numpy(pixels).view(shape)

    def close(self) -> None:
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):  # where it waits for a disk that is gone, not even that ends it
            self.process.wait(5)
        self.connection.close()
        self.printed.close()

    def _death(self) -> str:
        """How the process ended, with the last that it printed."""
        try:
            code = self.process.wait(30)
        except subprocess.TimeoutExpired:
            return "its connection"
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        if code == -signal.SIGKILL:
            how += ", most likely because memory ran out"
        self.printed.seek(max(0, os.fstat(self.printed.fileno()).st_size - 2000))
        lines = self.printed.read().decode(errors="replace").split("\n")
        last = "; ".join(line.strip() for line in lines[-4:] if line.strip())
        return f"{how}; its last words: {last}" if last else how
