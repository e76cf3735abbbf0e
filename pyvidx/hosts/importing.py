"""Imports of host libraries (transformers, open_clip), whose failures become one line that says what to install."""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch

# For from_pretrained: nothing is downloaded, and no code runs that a folder brings.
LOCAL = {"local_files_only": True, "trust_remote_code": False}


@contextmanager
def importing(what: str, library: str, install: str = "pyvidx[hosts]") -> Iterator[None]:
    """Around an import, and what is loaded with it: transformers imports its parts when they are used.

        with importing("tokenizer", "open_clip"):
            from open_clip.tokenizer import SimpleTokenizer

    Args:
        what: who needs it. library: the package. install: what brings it.

    Raises:
        RuntimeError: it is not installed, or a torchvision for another torch stops it.
    """
    try:
        yield
    except (ImportError, RuntimeError, AttributeError) as error:
        said = " ".join(_said(error))
        if "torchvision" in said and "No module named 'torchvision" not in said:
            why = torchvision_misfit() or (
                f"torchvision {_version('torchvision')} says that it fits torch {torch.__version__}, and does not: "
                "pip install --force-reinstall torch torchvision"
            )
            raise RuntimeError(f"{what}: {library} cannot be imported: {why}") from error
        if not isinstance(error, ImportError):
            raise
        raise RuntimeError(f"{what} needs {library} ({error}): pip install '{install}'") from error


def torchvision_misfit() -> str | None:
    """Why the installed torchvision cannot work beside this torch, and what to do; None if it can or there is none.

    Nothing is imported: its own files say which torch it was built for. Beside another one its import ends with
    "operator torchvision::nms does not exist", and that of transformers' processors and of open_clip with it.
    """
    try:
        have, wants = version("torchvision"), requires("torchvision") or []
    except PackageNotFoundError:
        return None
    spec = importlib.util.find_spec("torchvision")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    said = re.search(r"\+cu(\d+)(\d)\b", file.read_text()) if file and file.exists() else None
    cuda, release = said and f"{said[1]}.{said[2]}", torch.__version__.split("+")[0]
    pinned = next((m[1] for w in wants if (m := re.match(r"torch ?\(?==([\d.]+)", w))), None)
    if pinned is not None and pinned != release:
        why = f"needs torch {pinned}, and this is {torch.__version__}"
    elif cuda is not None and cuda.split(".")[0] != (torch.version.cuda or "none").split(".")[0]:
        why = f"is a build for CUDA {cuda}, and torch {torch.__version__} one for {torch.version.cuda or 'CPUs'}"
    else:
        return None
    channel = "cpu" if torch.version.cuda is None else f"cu{torch.version.cuda.replace('.', '')}"
    return (
        f"torchvision {have} {why}: pip install --force-reinstall --no-deps torchvision --index-url "
        f"https://download.pytorch.org/whl/{channel}, or install torch and torchvision together from one index"
    )


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
