"""Encoded videos to files and back: .safetensors, .npz or .parquet."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from pyvidx.corpus.encode import Encoded
from pyvidx.files import printable, whole, write_tensors
from pyvidx.models import Encoding
from pyvidx.tensor_files import note as header
from pyvidx.tensor_files import opened
from pyvidx.video import Damage

FORMATS = (".safetensors", ".npz", ".parquet")


def check_format(path: str | os.PathLike[str]) -> None:
    """Raise before any work is done if files of this suffix cannot be written.

    Raises:
        ValueError: the suffix is none of FORMATS.
        RuntimeError: it is .parquet, and pyarrow is not installed.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"embeddings: the output must end in {', '.join(FORMATS)}, got {printable(path.name)}")
    if path.suffix == ".parquet":
        _pyarrow()


def save(path: str | os.PathLike[str], results: Sequence[Encoded], about: dict) -> None:
    """Write what was encoded, whole or not at all; files that failed are named with their error.

    Names come back from `load` as they were, also those that are not UTF-8 (os.fsencode gives their bytes), and as
    often as they were given.

    Args:
        path: .safetensors and .npz hold `pooled` [n, E] and `tokens` [n, 1+P, C] (float32, what was asked for),
            `seconds` [n, T] (float64, NaN after the last frame of a shorter video); in safetensors the metadata entry
            "pyvidx" is JSON with `paths`, `failed` (paths), `errors` (by path), `damaged` (what is wrong with a file
            that was encoded, by its place in `paths`) and `about`; in npz these are the arrays `paths` and `about`.
            .parquet has one row per file: path, error, damaged, pooled, tokens (flat), tokens_shape, seconds. Bytes of
            a path that are not UTF-8 are shown as \\\\udcNN there; the metadata entry "pyvidx_paths" has such names.
        results: of encode_videos.
        about: what was run (model, sampler, ...), kept in the file.

    Raises:
        ValueError: the suffix is unknown, or an embedding is not finite.
        OSError: it cannot be written; what was there before still is.
    """
    path = Path(path)
    check_format(path)
    for r in results:
        values = () if r.encoding is None else (r.encoding.pooled, r.encoding.tokens)
        if not all(x is None or bool(x.isfinite().all()) for x in values):
            raise ValueError(f"embeddings: what is saved must be finite, got NaN or Inf of {printable(r.path)}")
    if path.suffix == ".parquet":
        _save_parquet(path, results, about)
        return
    done, failed = [r for r in results if r.error is None], [r for r in results if r.error is not None]
    arrays = _stacked(done)
    note = {
        "paths": [os.fsdecode(r.path) for r in done],
        "failed": [os.fsdecode(r.path) for r in failed],
        "errors": {os.fsdecode(r.path): r.error for r in failed},
        "damaged": {i: asdict(r.damaged) for i, r in enumerate(done) if r.damaged},
        "about": about,
    }
    if path.suffix == ".npz":
        import numpy as np

        with whole(path) as part:
            np.savez(part, paths=note["paths"], about=json.dumps(note), **{k: v.numpy() for k, v in arrays.items()})
    else:
        write_tensors(path, arrays, {"pyvidx": json.dumps(note)})


def load(path: str | os.PathLike[str]) -> tuple[list[Encoded], dict]:
    """What `save` wrote: the results, those that failed last, and `about`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the suffix is unknown, `save` did not write it, or it is damaged; what is in it is checked.
    """
    path = Path(path)
    check_format(path)
    if not path.is_file():
        raise FileNotFoundError(f"embeddings: there is no {printable(path)}")
    try:
        done, failed, about = _READERS[path.suffix](path)
        _require(isinstance(about, dict), f"about {about!r}")
        _check(done)
    except Exception as error:  # whatever a damaged file makes its reader raise
        kind = "" if isinstance(error, _Got) else f"{type(error).__name__}: "
        got = printable(f"{kind}{error}"[:500])
        raise ValueError(f"embeddings: {printable(path)} must be written by pyvidx encode, got {got}") from error
    return done + failed, about


class _Got(ValueError):
    """What stands in a file in place of what `save` writes."""


def _require(holds: bool, got: str) -> None:
    if not holds:
        raise _Got(got)


def _check(done: Sequence[Encoded]) -> None:
    """Raise _Got unless these could be what a model gave."""
    for r in done:
        _require(r.seconds.dim() == 1 and bool(r.seconds.isfinite().all()), f"seconds of {r.path!r} {r.seconds}")
        for name, dim in (("pooled", 2), ("tokens", 3)):
            value, first = getattr(r.encoding, name), getattr(done[0].encoding, name)
            _require((value is None) == (first is None), f"{name} of some videos alone")
            if value is not None:
                fits = value.dim() == dim and value.shape == first.shape and value.is_floating_point()
                _require(fits, f"{name} of {r.path!r} {value.dtype} {tuple(value.shape)}")
                _require(bool(value.isfinite().all()), f"{name} of {r.path!r} that is NaN or Inf")


def _from_note(note: dict, arrays: dict[str, Tensor]) -> tuple[list[Encoded], list[Encoded], dict]:
    names, seconds = note["paths"], arrays["seconds"]
    wrong = {k: tuple(x.shape) for k, x in arrays.items() if len(x) != len(names)}
    _require(not wrong, f"{len(names)} paths beside {wrong}")
    _require(seconds.dim() == 2 and seconds.dtype == torch.float64, f"seconds {seconds.dtype} {tuple(seconds.shape)}")
    done = []
    for i, name in enumerate(names):
        frames = int(seconds[i].isnan().logical_not().sum())  # NaN before the last frame is found by _check
        tokens, pooled = (arrays[k][i : i + 1] if k in arrays else None for k in ("tokens", "pooled"))
        done.append(_encoded(name, tokens, pooled, seconds[i, :frames], note.get("damaged", {}).get(str(i))))
    failed = [Encoded(_name(name), error=str(note["errors"][name])) for name in note.get("failed", note["errors"])]
    return done, failed, note["about"]


def _encoded(name, tokens: Tensor | None, pooled: Tensor | None, seconds: Tensor, damaged: dict | None) -> Encoded:
    encoding = Encoding(tokens, pooled, seconds[None])
    return Encoded(_name(name), encoding, seconds, damaged=Damage(**(damaged or {})))


def _name(value) -> str:
    _require(isinstance(value, str), f"a path {value!r}")
    return value


def _load_npz(path: Path):
    import numpy as np

    with np.load(path, allow_pickle=False) as file:
        # `save` does not compress, so what claims to be larger than its file is no file of it.
        packed = [i for i in file.zip.infolist() if i.compress_type or i.file_size > path.stat().st_size]
        _require(not packed, "a compressed file")
        _require({"about", "seconds"} <= set(file), ", ".join(file))
        note = json.loads(str(file["about"]))
        arrays = {k: torch.from_numpy(file[k]) for k in ("pooled", "tokens", "seconds") if k in file}
    return _from_note(note, arrays)


def _load_safetensors(path: Path):
    with opened(path, "embeddings") as file:
        note = header(file, path, "pyvidx") or {}
        _require("paths" in note, ", ".join(file.keys()))
        arrays = {k: file.get_tensor(k) for k in file.keys() if k in ("pooled", "tokens", "seconds")}
    return _from_note(note, arrays)


def _load_parquet(path: Path):
    _, parquet = _pyarrow()
    with path.open("rb") as file:
        table = parquet.read_table(file)
    head = table.schema.metadata or {}
    _require(b"pyvidx" in head, ", ".join(table.column_names))
    names = {int(i): name for i, name in json.loads(head.get(b"pyvidx_paths", b"{}")).items()}
    done, failed = [], []
    for i, row in enumerate(table.to_pylist()):
        name = names.get(i, row["path"])
        if row["error"] is not None:
            failed.append(Encoded(_name(name), error=row["error"]))
            continue
        pooled = None if row["pooled"] is None else torch.tensor([row["pooled"]])
        tokens = None if row["tokens"] is None else torch.tensor(row["tokens"]).view(1, *row["tokens_shape"])
        damaged = json.loads(row.get("damaged") or "null")
        done.append(_encoded(name, tokens, pooled, torch.tensor(row["seconds"], dtype=torch.float64), damaged))
    return done, failed, json.loads(head[b"pyvidx"])


_READERS: dict[str, Callable[[Path], tuple[list[Encoded], list[Encoded], dict]]] = {
    ".safetensors": _load_safetensors,
    ".npz": _load_npz,
    ".parquet": _load_parquet,
}


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

    names = [os.fsdecode(r.path) for r in results]
    shown = [name.encode("utf-8", "backslashreplace").decode() for name in names]
    table = pa.table(
        {
            "path": pa.array(shown, pa.string()),
            "error": pa.array([None if r.error is None else printable(r.error) for r in results], pa.string()),
            "damaged": pa.array([json.dumps(asdict(r.damaged)) if r.damaged else None for r in results], pa.string()),
            "pooled": pa.array([flat(r, "pooled") for r in results], pa.list_(pa.float32())),
            "tokens": pa.array([flat(r, "tokens") for r in results], pa.list_(pa.float32())),
            "tokens_shape": pa.array([shape(r) for r in results], pa.list_(pa.int32())),
            "seconds": pa.array(
                [None if r.seconds is None else r.seconds.tolist() for r in results], pa.list_(pa.float64())
            ),
        },
        metadata={
            "pyvidx": json.dumps(about),
            "pyvidx_paths": json.dumps({i: name for i, name in enumerate(names) if name != shown[i]}),
        },
    )
    with whole(path) as part, part.open("wb") as file:  # pyarrow takes no name that is not UTF-8
        parquet.write_table(table, file)


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise RuntimeError("embeddings: .parquet needs pyarrow: pip install 'pyvidx[cli]'") from error
    return pyarrow, pyarrow.parquet
