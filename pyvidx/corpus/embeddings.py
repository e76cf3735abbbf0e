"""Encoded videos to one file and back, in the format of its suffix; a folder of any size is pyvidx.corpus.folder's."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyvidx.corpus import stores
from pyvidx.corpus.encode import Encoded
from pyvidx.corpus.folder import is_corpus, manifest, parts
from pyvidx.corpus.stores.registry import NAMES, Layout, NotOurs, check_dtype, require
from pyvidx.files import printable

FORMATS = stores.suffixes()


def check_format(path: str | os.PathLike[str]) -> None:
    """Raise before any work is done if files of this suffix cannot be written.

    Raises:
        ValueError: the suffix is none of FORMATS.
        RuntimeError: a package for it is not installed.
    """
    stores.of_suffix(Path(path))


def save(path: str | os.PathLike[str], results: Sequence[Encoded], about: dict[str, Any]) -> None:
    """Write what was encoded, whole or not at all; files that failed are named with their error.

    Names come back from `load` as they were, also those that are not UTF-8 (os.fsencode gives their bytes), and as
    often as they were given.

    Args:
        path: .safetensors and .npz hold arrays (pyvidx.corpus.stores.arrays), .parquet one row per file
            (pyvidx.corpus.stores.parquet).
        results: of encode_videos.
        about: what was run (model, sampler, ...), kept in the file.

    Raises:
        ValueError: the suffix is unknown, it cannot hold the dtype, or an embedding is not finite
            or not as wide as the others. All get the dtype of the first.
        OSError: it cannot be written; what was there before still is.
    """
    path = Path(path)
    store, layout = stores.of_suffix(path), Layout.of(results)
    check_dtype(store, layout.dtype)
    for row in results:
        layout.check(row)
    store.write(path, results, layout, about)


def load(path: str | os.PathLike[str], outputs: Iterable[str] = NAMES) -> tuple[list[Encoded], dict[str, Any]]:
    """What `save` wrote, or a folder of `pyvidx encode`, all of it in memory: the results and `about`.

    Args:
        outputs: "pooled", "tokens" or both, of what is there; what is not asked for takes no memory.

    Returns:
        Of a file those that failed come last, of a folder last in each part; tensors have the dtype they are kept in.

    Raises:
        FileNotFoundError: there is no such file, or the folder holds no corpus.
        ValueError: the suffix is unknown, `save` did not write it, or it is damaged; what is in it is checked.
    """
    path, outputs = Path(path), _names(outputs)
    if is_corpus(path):
        return list(iterate(path, outputs)), manifest(path).described()
    if path.is_dir():
        manifest(path)  # raises: it has none
    if not path.exists():
        raise FileNotFoundError(f"embeddings: there is no {printable(path)}")
    store = stores.of_suffix(path)
    rows, about = _checked(path, store.read)
    return [only(row, outputs) for row in rows], about


def iterate(path: str | os.PathLike[str], outputs: Iterable[str] = NAMES) -> Iterator[Encoded]:
    """The rows of `load` one by one: of a folder, one part is in memory at a time.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    path, outputs = Path(path), _names(outputs)
    if not is_corpus(path):
        yield from load(path, outputs)[0]
        return
    store = manifest(path).store
    for part in parts(path):
        for row in _checked(part, store.read)[0]:
            yield only(row, outputs)


class Embeddings(NamedTuple):
    """A corpus in memory.

    Attributes:
        paths: of the videos that were encoded.
        pooled: [n, E] of these, or None.
        tokens: [n, N, C], a list of [N, C] where N differs, or None.
        seconds: [T] float64 of each.
        errors: why the others failed, by path.
        about: what was run.
    """

    paths: list[str]
    pooled: Tensor | None
    tokens: Tensor | list[Tensor] | None
    seconds: list[Tensor]
    errors: dict[str, str]
    about: dict[str, Any]


def read(path: str | os.PathLike[str], outputs: Iterable[str] = NAMES) -> Embeddings:
    """A folder of `pyvidx encode`, or a file, as arrays.

    Args:
        outputs: as in `load`.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    if is_corpus(path):
        rows, about = iterate(path, outputs), manifest(path).described()
    else:
        rows, about = load(path, outputs)
    errors, paths, seconds = {}, [], []
    arrays: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    for row in rows:
        if row.error is not None:
            errors[row.path] = row.error
            continue
        paths.append(row.path)
        seconds.append(row.seconds.clone())
        for name in {*row.encoding} & {*NAMES}:
            arrays[name].append(row.encoding[name][0].clone())  # else one row of a part would keep all of it
    return Embeddings(paths, _stacked(arrays["pooled"]), _stacked(arrays["tokens"]), seconds, errors, about)


def _names(outputs: Iterable[str]) -> set[str]:
    names = set(outputs)
    if isinstance(outputs, str) or not names <= set(NAMES):
        raise ValueError(f"embeddings: outputs must be a list, of {' and '.join(NAMES)}, got {outputs!r}")
    return names


def only(row: Encoded, outputs: Iterable[str]) -> Encoded:
    """A row without the outputs that are not asked for."""
    left_out = set(NAMES) - set(outputs)
    if row.encoding is None or not left_out:
        return row
    return replace(row, encoding=replace(row.encoding, **dict.fromkeys(left_out)))


def _stacked(found: list[Tensor]) -> Tensor | list[Tensor] | None:
    if not found:
        return None
    return torch.stack(found) if len({x.shape for x in found}) == 1 else found


def _checked(
    path: Path, reader: Callable[[Path], tuple[list[Encoded], dict[str, Any]]]
) -> tuple[list[Encoded], dict[str, Any]]:
    try:
        rows, about = reader(path)
        require(isinstance(about, dict), f"about {about!r}")
        _check([r for r in rows if r.error is None])
    except Exception as error:  # whatever a damaged file makes its reader raise
        kind = "" if isinstance(error, NotOurs) else f"{type(error).__name__}: "
        got = printable(f"{kind}{error}"[:500])
        raise ValueError(f"embeddings: {printable(path)} must be written by pyvidx encode, got {got}") from error
    return rows, about


def _check(done: Sequence[Encoded]) -> None:
    """Raise NotOurs unless these could be what a model gave."""
    for r in done:
        require(r.seconds.dim() == 1 and bool(r.seconds.isfinite().all()), f"seconds of {r.path!r} {r.seconds}")
        for name, dim in (("pooled", 2), ("tokens", 3)):
            value, first = getattr(r.encoding, name), getattr(done[0].encoding, name)
            require((value is None) == (first is None), f"{name} of some videos alone")
            if value is not None:
                fits = value.dim() == dim and value.shape[-1] == first.shape[-1] and value.is_floating_point()
                require(fits, f"{name} of {r.path!r} {value.dtype} {tuple(value.shape)}")
                require(bool(value.isfinite().all()), f"{name} of {r.path!r} that is NaN or Inf")
