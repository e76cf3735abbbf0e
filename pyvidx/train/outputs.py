"""What a run writes: whole or not at all, with one type of error whatever writes it."""

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
