"""Reading in other processes: a native decoder that dies or hangs is an error of one file, not the end of a run."""

from __future__ import annotations

import atexit
import functools
import os
import pickle
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from queue import SimpleQueue
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .clip import Clip
from .process import Lost, Worker
from .sampling import Rule
from .worker import Reply, Request, fill, nameless_file

Source = str | os.PathLike[str] | bytes


class Decoded(NamedTuple):
    """What became of a source: a clip or the error that `read` would have raised, and the seconds that it took."""

    source: Source
    clip: Clip | None
    error: Exception | None
    seconds: float


class Decoders:
    """Processes that read videos. Their frames come back through memory that both have mapped.

    The processes start at once and take some two seconds to import torch, which the caller may use otherwise. One that
    dies, or is ended for its `timeout`, is replaced. They end with `close`, and with the process that opened them.
    `read` may be called from threads: each call in progress has a process of its own, `workers` of them are kept.
    After a fork the new process gets workers of its own.

    Args:
        workers: processes.
        timeout: seconds that a file may take; None: no bound.
        memory: bytes that decoding a file may take, on Linux; None: no bound.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, workers: int = 1, *, timeout: float | None = 3600.0, memory: int | None = None):
        if workers < 1 or (timeout is not None and timeout <= 0) or (memory is not None and memory < 1):
            raise ValueError(
                f"Decoders: workers must be at least 1, timeout and memory above 0 or None, "
                f"got {workers}, {timeout} and {memory}"
            )
        if memory is not None and not sys.platform.startswith("linux"):
            raise ValueError(f"Decoders: memory must be None on {sys.platform}: only Linux can bound it")
        self.workers, self.timeout, self.memory = workers, timeout, memory
        self._idle: list[Worker] = []
        self._owner, self._closed = os.getpid(), False
        self.start(workers)

    def start(self, workers: int) -> None:
        """Keep at least so many processes from now on, and start those that are missing."""
        self.workers = max(self.workers, workers)
        self._leave_to_parent()
        with suppress(Lost):  # said by the read that needs it
            while len(self._idle) < workers:
                self._idle.append(Worker(self.memory))

    def close(self) -> None:
        """End the processes."""
        self._leave_to_parent()
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(
        self,
        source: Source,
        frames: int | None = None,
        sampler: str | Rule = "uniform",
        reader: str = "auto",
        *,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Clip:
        """`pyvidx.video.read` in a worker: the same clip, warnings, errors and state of the generator.

        Args:
            source: a path, or the bytes of a file.
            frames, reader: as in `pyvidx.video.read`.
            sampler: a name, or a function of a module that another process can import.
            generator: one of the CPU.
            options: further keywords of `pyvidx.video.read`.

        Raises:
            ValueError: a file object, a sampler that cannot be sent, or a generator of another device.
            RuntimeError: the decoder died or took too long; the text says how, with its last words.
            FileNotFoundError, ValueError, RuntimeError: as `pyvidx.video.read`.
        """
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"Decoders: generator must be on the CPU, got one on {generator.device}")
        state = None if generator is None else generator.get_state()
        options = _pickled(frames=frames, sampler=sampler, reader=reader, **options)
        reply, pixels = self._exchange(source, options, state, set())
        if generator is not None and reply.state is not None:
            generator.set_state(reply.state)
        return _clip(reply, pixels)

    def map(
        self,
        sources: Iterable[Source],
        frames: int | None = None,
        sampler: str | Rule = "uniform",
        reader: str = "auto",
        *,
        workers: int | None = None,
        ahead: int | None = None,
        ordered: bool = True,
        **options: Any,
    ) -> Iterator[Decoded]:
        """Read many sources, all workers at once; one that fails has its error and does not stop the rest.

        Args:
            sources: as in `read`.
            frames, sampler, reader, options: as in `read`, without a generator.
            workers: files to read at once; None: all workers.
            ahead: clips that are being read, or wait to be taken; None: twice the workers.
            ordered: give them in the order of the sources; False: as they come, so that none waits for a slow one.

        Yields:
            Decoded, one per source.

        Raises:
            ValueError: there is a generator, whose draws would follow no order, workers or ahead is below 1, or the
                sampler cannot be sent.
        """
        if "generator" in options:
            raise ValueError("Decoders: map must be called without a generator; draw with read, one after another")
        workers = self.workers if workers is None else workers
        ahead = 2 * workers if ahead is None else ahead
        if workers < 1 or ahead < 1:
            raise ValueError(f"Decoders: workers and ahead must be at least 1, got {workers} and {ahead}")
        pickled = _pickled(frames=frames, sampler=sampler, reader=reader, **options)
        return self._map(sources, pickled, workers, ahead, ordered)

    def _map(
        self, sources: Iterable[Source], options: bytes, workers: int, ahead: int, ordered: bool
    ) -> Iterator[Decoded]:
        jobs: SimpleQueue[tuple[Source, Future[Any]] | None] = SimpleQueue()
        done: SimpleQueue[tuple[Source, Future[Any]]] = SimpleQueue()
        busy: set[Worker] = set()
        order: deque[tuple[Source, Future[Any]]] = deque()

        def serve() -> None:
            while (job := jobs.get()) is not None:
                source, future = job
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(self._exchange(source, options, None, busy))
                    except BaseException as error:
                        future.set_exception(error)
                    if not ordered:
                        done.put(job)

        def take() -> Decoded:
            job = order[0] if ordered else done.get()
            order.remove(job)
            return _decoded(*job)

        # Daemons: an interrupted program does not wait at its exit for what is being decoded.
        threads = [threading.Thread(target=serve, daemon=True, name="pyvidx-read") for _ in range(workers)]
        for thread in threads:
            thread.start()
        try:
            for source in sources:
                order.append((source, Future()))
                jobs.put(order[-1])
                if len(order) >= ahead:
                    yield take()
            while order:
                yield take()
        finally:
            for _, future in order:
                future.cancel()
            for worker in list(busy):
                worker.process.kill()
            for _ in threads:
                jobs.put(None)

    def _exchange(
        self, source: Source, options: bytes, state: Tensor | None, busy: set[Worker]
    ) -> tuple[Reply, Tensor | None]:
        """A worker's reply and frames; its death is a reply as well. busy: has the worker in it meanwhile."""
        path, content = _content(source)
        request = Request(path, _folder(), options, state)
        starts = 0
        with content or nullcontext():
            while True:
                worker = answer = None
                try:
                    worker = self._take()
                    busy.add(worker)
                    answer = worker.ask(request, content, self.timeout)
                    return answer
                except Lost as lost:
                    starts += not lost.began
                    if lost.began or starts == 3:
                        return _failed(f"read: {path or '<bytes>'}: {lost.why}"), None
                finally:
                    busy.discard(worker)
                    if answer is not None:
                        self._give(worker)
                    elif worker is not None:
                        worker.close()

    def _take(self) -> Worker:
        if self._closed:
            raise RuntimeError("Decoders: it is closed; open another one")
        self._leave_to_parent()
        with suppress(IndexError):
            while True:
                worker = self._idle.pop()
                if worker.process.poll() is None:
                    return worker
                worker.close()  # ended by someone else
        return Worker(self.memory)

    def _give(self, worker: Worker) -> None:
        if self._closed or len(self._idle) >= self.workers:
            worker.close()
        else:
            self._idle.append(worker)

    def _leave_to_parent(self) -> None:
        """After a fork: the workers are the parent's."""
        if self._owner != os.getpid():
            self._owner, self._idle = os.getpid(), []


@functools.cache
def _of(process: int) -> Decoders:
    decoders = Decoders()
    atexit.register(decoders.close)
    return decoders


def shared(workers: int = 1) -> Decoders:
    """The decoders of this process, with at least so many workers; made when first asked for, there until it ends.

    Called before weights are loaded, it lets the workers start meanwhile.
    """
    decoders = _of(os.getpid())
    decoders.start(workers)
    return decoders


def _content(source: Source) -> tuple[str | bytes | None, BinaryIO | None]:
    """The path, or the bytes in a file that can be sent."""
    if isinstance(source, bytes | bytearray | memoryview):
        file = nameless_file()
        fill(file, memoryview(source).cast("B"))
        return None, file
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"Decoders: a source must be a path or bytes, got {type(source).__name__}; of a file: its .read()"
        )
    return os.fspath(source), None


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _pickled(**options: Any) -> bytes:
    try:
        return pickle.dumps(options)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            "Decoders: a sampler must be a name, or a function of a module that another process can import, "
            f"got {options['sampler']!r}: {error}"
        ) from error


def _failed(why: str) -> Reply:
    return Reply(None, RuntimeError(why), [], None, 0.0)


def _clip(reply: Reply, pixels: Tensor | None) -> Clip:
    for category, text in reply.warned:
        warnings.warn(text, category, stacklevel=3)
    if reply.error is not None:
        raise reply.error
    arrays = {name: torch.from_numpy(reply.clip[name]) for name in ("seconds", "indices")}
    return Clip(**reply.clip | arrays | {"frames": pixels})


def _decoded(source: Source, future: Future[Any]) -> Decoded:
    seconds = 0.0
    try:
        reply, pixels = future.result()
        seconds = reply.seconds
        return Decoded(source, _clip(reply, pixels), None, seconds)
    except Exception as error:  # whatever a damaged file makes a decoder raise
        return Decoded(source, None, error, seconds)
