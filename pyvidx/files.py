"""Files that appear whole or not at all, and errors about an output before any work is done for it."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to in place of `path`; at the end of the block it takes that name, with its bytes on the disk.

    An error, a full disk or a kill leaves what was at `path` before, if anything. The path given has the same suffix
    and folder as `path`; the folder is made if need be.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem[:64]}.", suffix=f".part{path.suffix}", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text, whole or not at all. What cannot be UTF-8 (a file name of other bytes) keeps its bytes."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape")
    return Path(path)


def write_json(path: str | os.PathLike[str], value, **options) -> Path:
    """Write JSON text, whole or not at all."""
    return write_text(path, json.dumps(value, **options) + "\n")


def check_output(path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Raise before any work is done if `path` cannot be written.

    Raises:
        FileExistsError: it exists and must not be overwritten.
        OSError: its folder cannot be made or written to, or `path` is itself a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"output: {path} must be a file, it is a folder")
    if path.exists() and not overwrite:
        raise FileExistsError(f"output: {path} exists; give another name, or --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".{path.stem[:64]}.", dir=path.parent):
            pass
    except OSError as error:
        raise type(error)(f"output: {path.parent} cannot be written to: {error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk once its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
