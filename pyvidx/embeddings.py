"""Encoded videos to files and back: .safetensors, .npz or .parquet."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pyvidx.encode import Encoded
from pyvidx.models import Encoding

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


def load(path: Path) -> tuple[list[Encoded], dict]:
    """What `save` wrote: the results, those that failed last, and `about`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the suffix is unknown, or `save` did not write it.
    """
    check_format(path)
    if not path.exists():
        raise FileNotFoundError(f"embeddings: there is no {path}")
    if path.suffix == ".parquet":
        return _load_parquet(path)
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path) as file:
            if not {"about", "seconds"} <= set(file):
                raise ValueError(f"embeddings: {path} must be written by pyvidx encode, got {', '.join(file)}")
            note = json.loads(str(file["about"]))
            arrays = {k: torch.from_numpy(file[k]) for k in ("pooled", "tokens", "seconds") if k in file}
    else:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            note = json.loads((file.metadata() or {}).get("pyvidx", "{}"))
            if "paths" not in note:
                raise ValueError(f"embeddings: {path} must be written by pyvidx encode, got {', '.join(file.keys())}")
            arrays = {k: file.get_tensor(k) for k in file.keys()}
    done = []
    for i, name in enumerate(note["paths"]):
        seconds = arrays["seconds"][i]
        seconds = seconds[~seconds.isnan()]
        tokens, pooled = (arrays[k][i : i + 1] if k in arrays else None for k in ("tokens", "pooled"))
        done.append(Encoded(name, Encoding(tokens, pooled, seconds[None]), seconds))
    return done + [Encoded(name, error=why) for name, why in note["errors"].items()], note["about"]


def _load_parquet(path: Path) -> tuple[list[Encoded], dict]:
    _, parquet = _pyarrow()
    table = parquet.read_table(path)
    about = json.loads((table.schema.metadata or {}).get(b"pyvidx", b"null"))
    if about is None:
        raise ValueError(f"embeddings: {path} must be written by pyvidx encode, got {', '.join(table.column_names)}")
    done, failed = [], []
    for row in table.to_pylist():
        if row["error"] is not None:
            failed.append(Encoded(row["path"], error=row["error"]))
            continue
        pooled = None if row["pooled"] is None else torch.tensor([row["pooled"]])
        tokens = None if row["tokens"] is None else torch.tensor(row["tokens"]).view(1, *row["tokens_shape"])
        seconds = torch.tensor(row["seconds"], dtype=torch.float64)
        done.append(Encoded(row["path"], Encoding(tokens, pooled, seconds[None]), seconds))
    return done + failed, about


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
