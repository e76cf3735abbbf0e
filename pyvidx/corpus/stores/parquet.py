"""Embeddings as .parquet: one row per file, failed ones included.

Columns: path, error, damaged (JSON), seconds (list), pooled (list of E), tokens (list of fixed_size_list[C]),
tokens_shape ([N, C], for readers that hand out nested lists flat). A failed file has null in these lists; so they are
not of fixed size themselves, since Arrow up to 25 cannot read a null in a column of such.
Bytes of a path that are not UTF-8 are shown as \\\\udcNN; the metadata entry "pyvidx_paths" has such names.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyvidx.corpus.encode import Encoded
from pyvidx.corpus.stores.registry import Layout, name_of, register, require
from pyvidx.files import whole
from pyvidx.temporal.encoding import Encoding
from pyvidx.video import Damage

# Bytes of embeddings in a row group: what a reader that goes through them group by group holds.
_GROUP = 16 << 20


@register("parquet")
class Parquet:
    suffix = ".parquet"
    dtypes = (torch.float32, torch.float16)

    def check(self) -> None:
        _pyarrow()

    def write(self, path: Path, rows: Sequence[Encoded], layout: Layout, about: dict[str, Any]) -> None:
        pa, parquet = _pyarrow()
        names = [os.fsdecode(r.path) for r in rows]
        shown = [_utf8(name) for name in names]
        columns = {
            "path": pa.array(shown, pa.string()),
            "error": pa.array([None if r.error is None else _utf8(r.error) for r in rows], pa.string()),
            "damaged": pa.array([json.dumps(asdict(r.damaged)) if r.damaged else None for r in rows], pa.string()),
            "seconds": _lists(pa, [r.seconds for r in rows], torch.float64),
        }
        for name, width in layout.widths.items():
            values = [None if r.encoding is None else r.encoding[name][0] for r in rows]
            columns[name] = _lists(pa, values, layout.dtype, width if name == "tokens" else None)
            if name == "tokens":
                shapes = [None if x is None else torch.tensor(x.shape) for x in values]
                columns["tokens_shape"] = _lists(pa, shapes, torch.int32)
        noted = {i: name for i, name in enumerate(names) if name != shown[i]}
        table = pa.table(columns, metadata={"pyvidx": json.dumps(about), "pyvidx_paths": json.dumps(noted)})
        group = max(1, min(len(rows), _GROUP * len(rows) // max(1, table.nbytes)))
        with whole(path) as part, part.open("wb") as file:  # pyarrow takes no name that is not UTF-8
            parquet.write_table(table, file, row_group_size=group, use_dictionary=False)

    def read(self, path: Path) -> tuple[list[Encoded], dict[str, Any]]:
        with path.open("rb") as file:
            table = _pyarrow()[1].read_table(file)
        about = _about(table)
        pooled, tokens, seconds = (_values(table, name) for name in ("pooled", "tokens", "seconds"))
        damages = table["damaged"].to_pylist() if "damaged" in table.column_names else [None] * len(table)
        found = []
        for (name, error), damaged, p, t, s in zip(_rows(table), damages, pooled, tokens, seconds):
            if error is not None:
                found.append(Encoded(name, error=error))
                continue
            encoding = Encoding(None if t is None else t[None], None if p is None else p[None], s[None])
            found.append(Encoded(name, encoding, s, damaged=Damage(**json.loads(damaged or "{}"))))
        return sorted(found, key=lambda r: r.error is not None), about

    def names(self, path: Path) -> list[tuple[str, bool]]:
        with path.open("rb") as file:
            table = _pyarrow()[1].read_table(file, columns=["path", "error"])
        _about(table)
        return [(name, error is not None) for name, error in _rows(table)]


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _about(table: Any) -> dict[str, Any]:
    head = table.schema.metadata or {}
    require(b"pyvidx" in head, ", ".join(table.column_names))
    return json.loads(head[b"pyvidx"])


def _rows(table: Any) -> Iterator[tuple[str, str | None]]:
    names = json.loads(table.schema.metadata.get(b"pyvidx_paths", b"{}"))
    for i, (shown, error) in enumerate(zip(table["path"].to_pylist(), table["error"].to_pylist())):
        yield name_of(names.get(str(i), shown)), error


def _lists(pa: Any, values: Sequence[Tensor | None], dtype: torch.dtype, width: int | None = None) -> Any:
    """Lists of numbers, of values [n] or None; with a width, of fixed_size_list[width], of values [n, width]."""
    there = [x.to(dtype) for x in values if x is not None]
    flat = pa.array((torch.cat(there).flatten() if there else torch.empty(0, dtype=dtype)).numpy())
    flat = flat if width is None else pa.FixedSizeListArray.from_arrays(flat, width)
    ends = np.cumsum([0, *(0 if x is None else len(x) for x in values)])
    null = pa.array([x is None for x in values], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat, mask=null)


def _values(table: Any, name: str) -> list[Tensor | None]:
    """A column's rows as tensors: [E], [N, C] or [T]."""
    if name not in table.column_names:
        return [None] * len(table)
    column = table[name].combine_chunks()
    there = column.is_valid().to_pylist()
    rows = column.drop_null()
    if hasattr(rows.type, "list_size"):
        found = torch.from_numpy(rows.flatten().to_numpy().copy()).view(len(rows), rows.type.list_size)
    else:
        counts, flat = np.diff(rows.offsets.to_numpy()), rows.flatten()
        width = getattr(flat.type, "list_size", None)
        flat = flat if width is None else flat.flatten()
        found = torch.from_numpy(flat.to_numpy().copy())
        found = (found if width is None else found.view(-1, width)).split(counts.tolist())
    found = iter(found)
    return [next(found) if x else None for x in there]


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise RuntimeError("embeddings: .parquet needs pyarrow: pip install 'pyvidx[corpus]'") from error
    return pyarrow, pyarrow.parquet
