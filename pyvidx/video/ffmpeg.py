"""FFmpeg through PyAV, and its log: for much of the damage that it meets, the only sign that it gives."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_listeners = 0
_before: tuple[Any, ...] = (None, True)


def _forget() -> None:
    """In a forked process nobody listens, whoever did at that moment."""
    global _lock, _listeners
    if _listeners:
        _lock, _listeners = threading.Lock(), 0
        import_av().logging.set_level(_before[0])


os.register_at_fork(after_in_child=_forget)


def import_av() -> Any:
    """PyAV, or an error that says what to install."""
    try:
        import av
    except ImportError as error:
        raise RuntimeError("video: reading and writing files needs PyAV: pip install 'pyvidx[video]'") from error
    return av


def complaints() -> int:
    """Errors that FFmpeg has logged so far in all threads, those of decoders too, while somebody listened."""
    return import_av().logging.get_last_error()[0]


@contextmanager
def listening(heard: list[tuple[str, str]]) -> Iterator[None]:
    """Add to `heard` (who, what) of each error that FFmpeg logs in this thread.

    FFmpeg has one log for the process. It is switched on only while somebody listens, and what other threads cause then
    is dropped: their errors are not this file's. A thread of a decoder takes Python's lock to log; so a decoder with
    threads must be flushed before it is freed, or the two wait for each other (see Source.video).
    """
    global _listeners, _before
    logging = import_av().logging
    with _lock:
        if not _listeners:
            _before = logging.get_level(), logging.get_skip_repeated()
            logging.set_skip_repeated(False)
            logging.set_level(logging.ERROR)
        _listeners += 1
    try:
        with logging.Capture(local=False), logging.Capture() as lines:
            yield
    finally:
        with _lock:
            _listeners -= 1
            if not _listeners:
                logging.set_level(_before[0])
                logging.set_skip_repeated(_before[1])
        heard += [(who, what.strip()) for severity, who, what in lines if severity <= logging.ERROR]
