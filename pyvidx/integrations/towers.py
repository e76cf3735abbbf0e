"""A BTAdapter from a file of any kind: of BTAdapter.save, or as its authors publish it."""

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pyvidx.integrations.checkpoints import load_official
from pyvidx.models import BTAdapter

COMPAT = ("official", "paper")


def load_tower(path: str | os.PathLike[str], compat: str | None = None, **sizes) -> BTAdapter:
    """The model of a file or folder, in eval mode.

    Args:
        path: .safetensors file or folder that BTAdapter.save wrote; anything else is read by load_official.
        compat: in place of what was saved, or of load_official's default.
        sizes: of load_official: what published weights do not tell.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it holds no such model, or sizes are given for one that tells its own.
    """
    path = Path(path)
    saved = path / "model.safetensors" if path.is_dir() else path
    if saved.suffix == ".safetensors" and saved.is_file() and _by_pyvidx(saved):
        if sizes:
            raise ValueError(f"load_tower: {path} tells its own sizes, got {', '.join(sizes)}")
        return BTAdapter.from_pretrained(path, compat=compat)
    chosen = sizes if compat is None else {"compat": compat, **sizes}
    return load_official(path, **chosen)[0]


def _by_pyvidx(path: Path) -> bool:
    """Whether its header says so, or it is for from_pretrained to say why it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return "pyvidx" in (file.metadata() or {})
    except (OSError, SafetensorError, ValueError):
        return True
