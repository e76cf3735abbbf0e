"""A corpus: a folder that embeddings of any number of videos go to as they come, and that a killed run goes on with.

    _pyvidx.json               what was run: store, options, widths of the rows
    part-000000.parquet        rows, in files that appear whole or not at all

Rows are keyed by path. A kill costs the rows that no part has yet: their videos are encoded again, and nothing is there
twice. Names begin as Parquet's readers leave them out, so that e.g. pandas.read_parquet(FOLDER) reads all parts.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pyvidx.corpus import stores
from pyvidx.corpus.encode import Encoded
from pyvidx.corpus.stores.registry import NAMES, Layout, Store, check_dtype
from pyvidx.files import check_output, printable, write_json
from pyvidx.models import VideoEncoder
from pyvidx.models.files import digest

MANIFEST = "_pyvidx.json"
_PART = re.compile(r"part-(\d+)\.\w+")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Manifest:
    """What the rows of a corpus have in common.

    Args:
        format: of the folder, 1.
        kind: name of the store.
        widths: last dimension of "pooled" and "tokens", those that are there.
        dtype: that both are kept in, by name.
        options: what the embeddings depend on, by name; another run must have the same.
        notes: what they do not.
    """

    kind: str
    widths: dict[str, int]
    dtype: str = "float32"
    options: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    format: int = 1

    @property
    def store(self) -> Store:
        return stores.named(self.kind)

    @property
    def layout(self) -> Layout:
        return Layout({name: self.widths[name] for name in NAMES if name in self.widths}, DTYPES[self.dtype])

    def described(self) -> dict[str, str]:
        """What is said beside the rows in every file: options that results depend on, and notes."""
        return {**self.options, **self.notes}


def is_corpus(folder: str | os.PathLike[str]) -> bool:
    return (Path(folder) / MANIFEST).is_file()


def manifest(folder: str | os.PathLike[str]) -> Manifest:
    """What `folder` was made with.

    Raises:
        FileNotFoundError: it is no corpus.
        ValueError: its manifest is damaged.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"corpus: {printable(folder)} must be a folder of pyvidx encode, it has no {MANIFEST}")
    try:
        found = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        if found.format != 1 or found.kind not in stores.STORES or found.dtype not in DTYPES:
            raise ValueError(f"format {found.format}, store {found.kind}, dtype {found.dtype}")
        if not all(isinstance(values, dict) for values in (found.widths, found.options, found.notes)):
            raise ValueError("no objects in it")
        if not all(name in NAMES and type(width) is int for name, width in found.widths.items()):
            raise ValueError(f"widths {found.widths}")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"corpus: {printable(path)} must be a manifest of this version, got {error}") from error
    return found


def parts(folder: str | os.PathLike[str]) -> list[Path]:
    """The files with rows, in the order they were written."""
    found = {path: _PART.fullmatch(path.name) for path in Path(folder).iterdir()}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(found[path][1]))


def check(
    folder: str | os.PathLike[str],
    kind: str,
    options: dict[str, str | None],
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Raise before any work is done if a run with these options cannot write there.

    Args:
        options: of the run, also some of them only; None: the corpus must have been made without.

    Raises:
        ValueError: the store is unknown, or, to be resumed, the corpus was made with other options.
        RuntimeError: a package of the store is missing.
        FileExistsError: there is something that is not to be resumed or replaced, or that is no corpus.
        OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    stores.named(kind)
    if folder.is_file():
        raise FileExistsError(
            f"corpus: {printable(folder)} must be a folder, or end in a format's suffix, it is a file"
        )
    if is_corpus(folder):
        if resume:
            _compare(folder, {"store": manifest(folder).kind, **manifest(folder).options}, {"store": kind, **options})
        elif not overwrite:
            raise FileExistsError(
                f"corpus: {printable(folder)} has one already; --resume goes on with it, --overwrite replaces it"
            )
    elif folder.is_dir() and any(not _left(name) for name in os.listdir(folder)):
        raise FileExistsError(f"corpus: {printable(folder)} must be a new or empty folder, or one of pyvidx encode")
    check_output(folder / MANIFEST)


def made_of(model: VideoEncoder) -> dict[str, str]:
    """Of a model, before it is folded, what embeddings depend on: options of a Manifest."""
    header = {"kind": model.kind, **model.header()}
    return {"encoder": json.dumps(header, sort_keys=True), "weights": digest(model.state_dict())}


class Corpus:
    """The folder while a run writes to it. As a context it is closed at the end, also by an error.

    Args:
        folder: made if need be.
        made: what the rows have in common; written at once in a new folder.
        resume: go on with what is there. It must be the same but for its notes, which stay.
        overwrite: replace what is there. With neither, there must be nothing.
        retry_errors: rows of videos that failed are taken out, so that these are not `done`.
        rows, size, seconds: a part is written with so many rows, bytes of embeddings, or after so many seconds.

    Attributes:
        done: paths that have a row. Of a million some 150 MB; the only thing here that grows with the corpus.
        failed: how many of the rows that were there say an error.

    Raises:
        ValueError, RuntimeError, OSError: as `check`; ValueError: the store cannot hold the dtype, or a part is
            damaged; BlockingIOError: another run is writing there.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        made: Manifest,
        *,
        resume: bool = False,
        overwrite: bool = False,
        retry_errors: bool = False,
        rows: int = 1000,
        size: int = 64 << 20,
        seconds: float = 300.0,
    ):
        self.folder = Path(folder)
        self.rows, self.size, self.seconds = rows, size, seconds
        check(folder, made.kind, made.options, resume=resume, overwrite=overwrite)
        check_dtype(made.store, made.layout.dtype)
        self._lock = _locked(self.folder)
        try:
            self._clear(everything=not resume)
            if not is_corpus(folder):
                write_json(self.folder / MANIFEST, asdict(made), indent=1)
            self.made = manifest(folder)
            _compare(self.folder, _all(self.made), dict.fromkeys(_all(self.made)) | _all(made))
            self._pending: list[Encoded] = []
            self._held, self._since = 0, time.monotonic()
            self._next = 1 + max((int(_PART.fullmatch(p.name)[1]) for p in parts(folder)), default=-1)
            self.failed = 0
            self.done = set(self._scan(retry_errors))
        except BaseException:
            os.close(self._lock)
            raise

    def add(self, row: Encoded) -> None:
        """Take a row; now and then that writes a part.

        Raises:
            ValueError: there is a row of that path, or its encoding is not what the manifest says, or not finite.
            OSError: the part cannot be written.
        """
        if row.path in self.done:
            raise ValueError(f"corpus: a path must be added once, got {printable(row.path)} twice")
        self.made.layout.check(row)
        self.done.add(row.path)
        self._pending.append(row)
        if row.encoding is not None:
            self._held += sum(x.nbytes for x in row.encoding.values())
        late = time.monotonic() - self._since > self.seconds
        if len(self._pending) >= self.rows or self._held >= self.size or late:
            self.flush()

    def flush(self) -> None:
        """Write what is held as a part."""
        if self._pending:
            store = self.made.store
            path = self.folder / f"part-{self._next:06d}{store.suffix}"
            store.write(path, self._pending, self.made.layout, self.made.described())
            self._next += 1
        self._pending, self._held, self._since = [], 0, time.monotonic()

    def close(self) -> None:
        """Write what is left, and let other processes write here."""
        try:
            self.flush()
        finally:
            os.close(self._lock)

    def __enter__(self) -> Corpus:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _scan(self, retry_errors: bool) -> Iterable[str]:
        store = self.made.store
        for path in parts(self.folder):
            try:
                names = store.names(path)
                if retry_errors and any(failed for _, failed in names):
                    kept = [row for row in store.read(path)[0] if row.error is None]
                    if kept:
                        store.write(path, kept, self.made.layout, self.made.described())
                    else:
                        path.unlink()
                    names = [(name, failed) for name, failed in names if not failed]
            except Exception as error:  # whatever a damaged file makes its reader raise
                if isinstance(error, OSError) and error.errno is not None:  # pyarrow has none for what it cannot parse
                    raise
                got = printable(str(error)[:200])
                raise ValueError(
                    f"corpus: {printable(path)} must be a part that pyvidx encode wrote, got {got}; take it away, and "
                    "--resume encodes its videos again"
                ) from error
            self.failed += sum(failed for _, failed in names)
            yield from (name for name, _ in names)

    def _clear(self, everything: bool) -> None:
        """Remove what killed runs left half written, with `everything` the corpus too: its manifest last."""
        for name in os.listdir(self.folder):
            if _left(name):
                (self.folder / name).unlink()
        if everything and is_corpus(self.folder):
            for path in parts(self.folder):
                path.unlink()
            (self.folder / MANIFEST).unlink()


def _all(made: Manifest) -> dict[str, Any]:
    return {"store": made.kind, "widths": made.widths, "dtype_out": made.dtype, **made.options}


def _compare(folder: Path, have: dict[str, Any], want: dict[str, Any]) -> None:
    differing = [name for name in want if have.get(name) != want[name]]
    if differing:
        said = ", ".join(f"{name} = {have.get(name)}, not {want[name]}" for name in differing)
        raise ValueError(
            f"corpus: {printable(folder)} must be of the same model and options to be resumed, it has {said}"
        )


def _left(name: str) -> bool:
    """A file that pyvidx.files was writing here."""
    return bool(re.fullmatch(r"\.(part-\d+|_pyvidx)\..*", name))


def _locked(folder: Path) -> int:
    """A descriptor of the folder that no other run has; it ends with its process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise BlockingIOError(f"corpus: another run is writing to {printable(folder)}") from error
    return handle
