"""Stores by name: file formats for embeddings, each of which writes a part of a corpus and reads it back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from pyvidx.corpus.encode import Encoded
from pyvidx.corpus.registry import Registry
from pyvidx.files import printable

NAMES = ("pooled", "tokens")


@dataclass(frozen=True)
class Layout:
    """What the rows of all parts have in common, also of a part in which every video failed.

    Attributes:
        widths: of "pooled" and "tokens", those that are there: E and C.
        dtype: that both are written in, whatever dtype the rows have.
    """

    widths: dict[str, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, rows: Iterable[Encoded]) -> Layout:
        """That of the first row with an encoding; of none: nothing is there."""
        for row in rows:
            if row.encoding is not None:
                there = {name: row.encoding[name] for name in NAMES if name in row.encoding}
                dtype = next(iter(there.values())).dtype if there else torch.float32
                return cls({name: value.shape[-1] for name, value in there.items()}, dtype)
        return cls({}, torch.float32)

    def check(self, row: Encoded) -> None:
        """Raise ValueError unless a row could be what a model of this layout gave."""
        if row.encoding is None:
            return
        there = {name: row.encoding[name] for name in NAMES if name in row.encoding}
        widths = {name: value.shape[-1] for name, value in there.items()}
        if widths != self.widths:
            raise ValueError(f"embeddings: rows must have widths {self.widths}, got {widths} of {printable(row.path)}")
        if not all(bool(value.to(self.dtype).isfinite().all()) for value in there.values()):
            got = f"NaN or Inf of {printable(row.path)} in {self.dtype}"
            raise ValueError(f"embeddings: what is saved must be finite, got {got}")


class Store(Protocol):
    """A file format. A new one is a class with @register in a file of its own, imported in stores/__init__.py.

    Attributes:
        suffix: of its files, with the dot.
        dtypes: of embeddings that it can hold.
    """

    suffix: str
    dtypes: tuple[torch.dtype, ...]

    def check(self) -> None:
        """Raise RuntimeError if a package is missing."""

    def write(self, path: Path, rows: Sequence[Encoded], layout: Layout, about: dict[str, Any]) -> None:
        """Write a file, whole or not at all: rows of this layout, those that failed, and JSON values."""

    def read(self, path: Path) -> tuple[list[Encoded], dict[str, Any]]:
        """What `write` wrote, in any order; any exception where it did not write it."""

    def names(self, path: Path) -> list[tuple[str, bool]]:
        """Of every row its path and whether it failed, without reading embeddings."""


STORES = Registry("embeddings: store")
register, named = STORES.register, STORES.named


def suffixes() -> tuple[str, ...]:
    return tuple(store.suffix for store in STORES.values())


def of_suffix(path: Path) -> Store:
    """The store that writes files of this suffix; errors as in `named`."""
    for name, store in STORES.items():
        if store.suffix == path.suffix:
            return named(name)
    raise ValueError(f"embeddings: the output must end in {', '.join(suffixes())}, got {printable(path.name)}")


def check_dtype(store: Store, dtype: torch.dtype) -> None:
    """Raise ValueError if files of a store cannot hold embeddings of this dtype."""
    if dtype not in store.dtypes:
        either = " or ".join(map(str, store.dtypes)).replace("torch.", "")
        raise ValueError(f"embeddings: {store.suffix} must hold {either}, got {dtype}")


class NotOurs(ValueError):
    """What stands in a file in place of what a store writes."""


def require(holds: bool, got: str) -> None:
    if not holds:
        raise NotOurs(got)


def name_of(value: Any) -> str:
    require(isinstance(value, str), f"a path {value!r}")
    return value
