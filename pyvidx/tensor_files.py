"""Safetensors files of any origin: every way in which one cannot be read is one error that names it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

FLOATING = ("F64", "F32", "F16", "BF16")  # dtypes of weights, as safetensors calls them


@contextmanager
def opened(path: str | Path, what: str) -> Iterator[safe_open]:
    """The open file, whose header safetensors has checked: every tensor is inside the file and no two overlap.

    Args:
        what: who reads, for the errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, cannot be read, or is no whole safetensors file.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{what}: {path} must be a file, it is a folder")
    if not path.is_file():
        raise FileNotFoundError(f"{what}: there is no file {path}")
    try:
        with path.open("rb") as raw:  # safetensors takes no name that is not UTF-8; the system has another for it
            file = safe_open(path if _is_utf8(path) else f"/proc/self/fd/{raw.fileno()}", "pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{what}: {path} is no safetensors file, or is damaged or truncated ({error})") from error
    with file:
        yield file


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def note(file: safe_open, path: str | Path, key: str) -> dict[str, Any] | None:
    """The JSON object under `key` of the header; None: there is none.

    Raises:
        ValueError: it is no JSON object.
    """
    text = (file.metadata() or {}).get(key)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: the header of {path} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{key}: the header of {path} must be a JSON object, got {type(found).__name__}")
    return found
