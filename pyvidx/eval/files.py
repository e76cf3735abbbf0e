"""Video files by the names that annotations give them, and files that grow by a line per sample."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from pyvidx.data import tables
from pyvidx.eval.annotations.sample import need
from pyvidx.tensor_files import opened
from pyvidx.video.find import SUFFIXES, find_videos


def json_lines(path: str | Path, names: Sequence[str]) -> list[dict]:
    """The objects of a .jsonl file, each with `names`. A line that a kill cut off, wherever, is left out."""
    rows = tables.json_objects(path, lambda line, why: None)
    return [need(row, names, f"{path}, line {n}") for n, row in rows]


def read_tensors(
    path: str | Path,
    dims: Mapping[str, int],
    optional: Mapping[str, int] = {},  # noqa: B006
) -> dict[str, Tensor]:
    """The tensors of a .safetensors file that has these names, each with its number of dimensions; all are finite.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole safetensors file, or does not hold them so.
    """
    with opened(path, "eval") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}
    if not set(dims) <= set(found):
        raise ValueError(f"eval: {path} must hold {' and '.join(dims)}, got {', '.join(sorted(found))}")
    for name, dim in {**dims, **optional}.items():
        x = found.get(name)
        if x is not None and (x.dim() != dim or not x.numel() or not x.isfinite().all()):
            raise ValueError(f"eval: {name} in {path} must have {dim} dimensions and be finite, got {tuple(x.shape)}")
    return found


def digest(value) -> str:
    """16 letters that tell one JSON value from another."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def open_to_append(path: Path):
    """The file, made with its folder if need be, on a line of its own after what a kill cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    if file.tell() and not path.read_bytes().endswith(b"\n"):
        file.write("\n")
    return file


class Named:
    """Paths of videos, found by the end of the path, with or without suffix: "a/b.mp4" is b, b.mp4, b.avi and a/b."""

    def __init__(self, paths: Iterable[str]):
        self.paths: dict[str, list[str]] = {}
        for path in dict.fromkeys(paths):  # one that was encoded twice is one file
            self.paths.setdefault(_bare(path).rsplit("/", 1)[-1], []).append(path)

    @classmethod
    def under(cls, root: str | Path) -> "Named":
        """The video files of a folder and its folders."""
        return cls(map(str, find_videos(root)[0]))

    def find(self, name: str) -> str | None:
        """The path, None if there is none; ValueError if there are several."""
        bare = _bare(name)
        last = bare.rsplit("/", 1)[-1]
        found = [p for p in self.paths.get(last, ()) if ("/" + _bare(p)).endswith("/" + bare)]
        if len(found) > 1:
            raise ValueError(f"eval: the video {name} must be one file, got {', '.join(found[:3])}")
        return found[0] if found else None


def _bare(path: str) -> str:
    """Without the suffix of a video. LSMDC's names hold dots, so no other is taken off."""
    path = Path(path).as_posix()
    dot = path.rfind(".")
    return path[:dot] if dot > 0 and path[dot:].lower() in SUFFIXES else path
