"""What a run writes: whole or not at all, with one type of error whatever writes it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pyvidx.files import whole


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A path to write to in place of `path`, see pyvidx.files.whole.

    Raises:
        OSError: it could not be written; what was there before still is.
    """
    try:
        with whole(path) as part:
            yield part
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        raise OSError(f"train: {path} could not be written, and is as it was before: {error}") from error


def sweep(folder: Path, age: float = 0.0) -> None:
    """Remove what safetensors leaves when it is killed: it writes to .tmpXXXXXX beside the file that it is to write.

    Args:
        folder: that nobody else writes to, or
        age: seconds without a change, after which nobody does any more.
    """
    for left in folder.glob(".tmp??????"):
        if left.is_file() and time.time() - left.stat().st_mtime >= age:
            left.unlink(missing_ok=True)
