"""Embeddings as .npz: arrays, with the paths as one and the note as another, `about`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyvidx.corpus.encode import Encoded
from pyvidx.corpus.stores.arrays import ARRAYS, from_arrays, names_of, to_arrays
from pyvidx.corpus.stores.registry import Layout, register, require
from pyvidx.files import whole


@register("npz")
class Npz:
    suffix = ".npz"
    dtypes = (torch.float32, torch.float16)

    def check(self) -> None:
        pass

    def write(self, path: Path, rows: Sequence[Encoded], layout: Layout, about: dict[str, Any]) -> None:
        arrays, note = to_arrays(rows, layout, about)
        with whole(path) as part:
            np.savez(part, paths=note["paths"], about=json.dumps(note), **{k: v.numpy() for k, v in arrays.items()})

    def read(self, path: Path) -> tuple[list[Encoded], dict[str, Any]]:
        with np.load(path, allow_pickle=False) as file:
            note = _note(file, path)
            return from_arrays({k: torch.from_numpy(file[k]) for k in ARRAYS if k in file}, note)

    def names(self, path: Path) -> list[tuple[str, bool]]:
        with np.load(path, allow_pickle=False) as file:
            return names_of(_note(file, path))


def _note(file: Any, path: Path) -> dict[str, Any]:
    # `write` does not compress, so what claims to be larger than its file is no file of it.
    packed = [i for i in file.zip.infolist() if i.compress_type or i.file_size > path.stat().st_size]
    require(not packed, "a compressed file")
    require({"about", "seconds"} <= set(file), ", ".join(file))
    return json.loads(str(file["about"]))
