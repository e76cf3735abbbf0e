"""Encoded videos to files: .safetensors, .npz or .parquet."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pyvidx.encode import Encoded

FORMATS = (".safetensors", ".npz", ".parquet")


def check_format(path: Path) -> None:
    """Raise before any work is done if `path` cannot be written."""
    if path.suffix not in FORMATS:
        raise ValueError(f"embeddings: the output must end in {', '.join(FORMATS)}, got {path.name}")
    if path.suffix == ".parquet":
        _pyarrow()


def save(path: Path, results: Sequence[Encoded], about: dict) -> None:
    """Write what was encoded; files that failed are named with their error.

    Args:
        path: .safetensors and .npz hold `pooled` [n, E] and `tokens` [n, 1+P, C] (float32, what was asked for),
            `seconds` [n, T] (float64, NaN after the last frame of a shorter video); in safetensors the metadata entry
            "pyvidx" is JSON with `paths`, `errors` and `about`; in npz these are the arrays `paths` and `about`.
            .parquet has one row per file: path, error, pooled, tokens (flat), tokens_shape, seconds.
        results: of encode_videos.
        about: what was run (model, sampler, ...), kept in the file.
    """
    check_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        _save_parquet(path, results, about)
        return
    done = [r for r in results if r.encoding is not None]
    arrays = _stacked(done)
    note = {"paths": [r.path for r in done], "errors": {r.path: r.error for r in results if r.error}, "about": about}
    if path.suffix == ".npz":
        import numpy as np

        np.savez(path, paths=note["paths"], about=json.dumps(note), **{k: v.numpy() for k, v in arrays.items()})
    else:
        from safetensors.torch import save_file

        save_file(arrays, path, {"format": "pt", "pyvidx": json.dumps(note)})


def _stacked(done: Sequence[Encoded]) -> dict[str, Tensor]:
    arrays = {}
    for name in ("pooled", "tokens"):
        rows = [getattr(r.encoding, name) for r in done]
        if rows and rows[0] is not None:
            arrays[name] = torch.cat(rows).contiguous()
    longest = max((len(r.seconds) for r in done), default=0)
    seconds = torch.full((len(done), longest), float("nan"), dtype=torch.float64)
    for row, r in zip(seconds, done):
        row[: len(r.seconds)] = r.seconds
    return arrays | {"seconds": seconds}


def _save_parquet(path: Path, results: Sequence[Encoded], about: dict) -> None:
    pa, parquet = _pyarrow()

    def flat(r: Encoded, name: str):
        value = getattr(r.encoding, name, None)
        return None if value is None else value[0].flatten().tolist()

    def shape(r: Encoded):
        tokens = getattr(r.encoding, "tokens", None)
        return None if tokens is None else list(tokens.shape[1:])

    table = pa.table(
        {
            "path": pa.array([r.path for r in results], pa.string()),
            "error": pa.array([r.error for r in results], pa.string()),
            "pooled": pa.array([flat(r, "pooled") for r in results], pa.list_(pa.float32())),
            "tokens": pa.array([flat(r, "tokens") for r in results], pa.list_(pa.float32())),
            "tokens_shape": pa.array([shape(r) for r in results], pa.list_(pa.int32())),
            "seconds": pa.array(
                [None if r.seconds is None else r.seconds.tolist() for r in results], pa.list_(pa.float64())
            ),
        },
        metadata={"pyvidx": json.dumps(about)},
    )
    parquet.write_table(table, path)


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise RuntimeError("embeddings: .parquet needs pyarrow: pip install 'pyvidx[cli]'") from error
    return pyarrow, pyarrow.parquet
