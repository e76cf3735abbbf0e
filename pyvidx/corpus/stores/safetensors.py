"""Embeddings as .safetensors: arrays, with the note in the header's entry "pyvidx"."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pyvidx.corpus.encode import Encoded
from pyvidx.corpus.stores.arrays import ARRAYS, from_arrays, names_of, to_arrays
from pyvidx.corpus.stores.registry import Layout, register, require
from pyvidx.files import write_tensors
from pyvidx.tensor_files import note as header
from pyvidx.tensor_files import opened


@register("safetensors")
class Safetensors:
    suffix = ".safetensors"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)

    def check(self) -> None:
        pass

    def write(self, path: Path, rows: Sequence[Encoded], layout: Layout, about: dict[str, Any]) -> None:
        arrays, note = to_arrays(rows, layout, about)
        write_tensors(path, arrays, {"pyvidx": json.dumps(note)})

    def read(self, path: Path) -> tuple[list[Encoded], dict[str, Any]]:
        with opened(path, "embeddings") as file:
            note = _note(file, path)
            return from_arrays({k: file.get_tensor(k) for k in file.keys() if k in ARRAYS}, note)

    def names(self, path: Path) -> list[tuple[str, bool]]:
        with opened(path, "embeddings") as file:
            return names_of(_note(file, path))


def _note(file: Any, path: Path) -> dict[str, Any]:
    note = header(file, path, "pyvidx") or {}
    require("paths" in note, ", ".join(file.keys()))
    return note
