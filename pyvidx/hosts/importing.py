"""Imports of host libraries (transformers, open_clip), whose failures become one line that says what to install."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch

# For from_pretrained: nothing is downloaded, and no code runs that a folder brings.
LOCAL = {"local_files_only": True, "trust_remote_code": False}


@contextmanager
def importing(what: str, library: str, extra: str = "hosts") -> Iterator[None]:
    """Around an import.

        with importing("tokenizer", "open_clip"):
            from open_clip.tokenizer import SimpleTokenizer

    Args:
        what: who needs it. library: the package. extra: of pyvidx, which brings it.

    Raises:
        RuntimeError: it is not installed, or a torchvision for another torch stops it.
    """
    try:
        yield
    except (ImportError, RuntimeError, AttributeError) as error:
        said = " ".join(_said(error))
        if "torchvision" in said and "No module named 'torchvision" not in said:
            channel = "cpu" if torch.version.cuda is None else f"cu{torch.version.cuda.replace('.', '')}"
            raise RuntimeError(
                f"{what}: {library} cannot be imported, as torchvision {_version('torchvision')} was built for another "
                f"torch than this one, {torch.__version__}: pip install --force-reinstall --no-deps torchvision "
                f"--index-url https://download.pytorch.org/whl/{channel}"
            ) from error
        if not isinstance(error, ImportError):
            raise
        raise RuntimeError(f"{what} needs {library} ({error}): pip install 'pyvidx[{extra}]'") from error


def _said(error: BaseException | None) -> list[str]:
    """The messages of an error and of those behind it."""
    found = []
    while error is not None and len(found) < 20:
        found.append(str(error))
        error = error.__cause__ or error.__context__
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(of unknown version)"
