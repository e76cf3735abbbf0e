"""Files that appear whole or not at all, and errors about an output before any work is done for it."""

import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a command takes Ctrl-C from its first moment on, and torch's import lasts seconds
    from torch import Tensor


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to in place of `path`; at the end of the block it takes that name, with its bytes on the disk.

    An error, a full disk or a kill leaves what was at `path` before, if anything. The path given has the suffix of
    `path` and lies in its folder, which is made if need be. A link is followed; what is no plain file (/dev/stdout) is
    written to as it is.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_parts(path)
    part = _part(path)
    try:
        part.touch(exist_ok=False)
        mode = (path if path.exists() else part).stat().st_mode & 0o777
        part.chmod(mode)
        yield part
        part.chmod(mode)  # safetensors puts a file of mode 0600 in its place
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text, whole or not at all. What cannot be UTF-8 (a file name of other bytes) keeps its bytes."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape")
    return Path(path)


def write_json(path: str | os.PathLike[str], value: Any, **options: Any) -> Path:
    """Write JSON text, whole or not at all. options: of json.dumps."""
    return write_text(path, json.dumps(value, **options) + "\n")


def write_tensors(path: str | os.PathLike[str], tensors: "Mapping[str, Tensor]", about: Mapping[str, str]) -> Path:
    """Write a .safetensors file with `about` in its header, whole or not at all.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole(path) as part:
        try:
            save_file(dict(tensors), part, {"format": "pt", **about})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
    return Path(path)


def printable(text: str | bytes | os.PathLike[str]) -> str:
    """A name or message in one line that any stream can print: control characters and bytes that are not UTF-8 are
    escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in os.fsdecode(text))


def check_output(path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Raise before any work is done if `path` cannot be written.

    Raises:
        FileExistsError: there is such a file, and it must not be overwritten.
        OSError: `path` is a folder, or its folder cannot be made or written to.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(f"output: {path} must be a file, got a folder")
    if path.is_file() and not overwrite:
        raise FileExistsError(f"output: {path} exists; give another name, or --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = _part(path)  # so that the next writer removes what a kill leaves here, too
        part.touch(exist_ok=False)
        part.unlink()
    except OSError as error:
        raise type(error)(f"output: {path.parent} cannot be written to: {error}") from error


def _prefix(path: Path) -> str:
    """What the names of this host's parts of a file begin with; a name may have 255 bytes."""
    return f".{os.fsdecode(os.fsencode(path.stem)[:100])}.{socket.gethostname()[:32]}."


def _part(path: Path) -> Path:
    return path.with_name(f"{_prefix(path)}{os.getpid()}.{secrets.token_hex(4)}.part{path.suffix}")


def _remove_left_parts(path: Path) -> None:
    """What writers that were killed left: a checkpoint's part is as large as the checkpoint."""
    prefix, suffix = _prefix(path), f".part{path.suffix}"
    for name in os.listdir(path.parent):
        if name.startswith(prefix) and name.endswith(suffix):
            pid = name[len(prefix) :].split(".")[0]
            if pid.isdigit() and not _alive(int(pid)):
                (path.parent / name).unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk once its folder is."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
