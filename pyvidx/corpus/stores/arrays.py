"""Rows as a few arrays and a note in JSON: what safetensors and npz hold.

`pooled` [n, E]; `tokens` [n, N, C], or where videos differ in N, [sum of N, C] with `tokens_rows` [n] int64; `seconds`
[n, T] float64, NaN after the last frame of a shorter video. The note has `paths`, `failed` (paths), `errors` (by path),
`damaged` (what is wrong with a file that was encoded, by its place in `paths`) and `about`.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from pyvidx.corpus.encode import Encoded
from pyvidx.corpus.stores.registry import NAMES, Layout, name_of, require
from pyvidx.temporal.encoding import Encoding
from pyvidx.video import Damage

ARRAYS = (*NAMES, "tokens_rows", "seconds")


def to_arrays(
    rows: Sequence[Encoded], layout: Layout, about: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arrays and the note."""
    done, failed = [r for r in rows if r.error is None], [r for r in rows if r.error is not None]
    arrays, there = {}, layout.widths if done else {}
    if "pooled" in there:
        arrays["pooled"] = torch.cat([r.encoding["pooled"].to(layout.dtype) for r in done])
    if "tokens" in there:
        tokens = [r.encoding["tokens"].to(layout.dtype) for r in done]
        counts = [x.shape[1] for x in tokens]
        if len(set(counts)) == 1:
            arrays["tokens"] = torch.cat(tokens)
        else:
            arrays |= {"tokens": torch.cat([x[0] for x in tokens]), "tokens_rows": torch.tensor(counts)}
    seconds = torch.full((len(done), max((len(r.seconds) for r in done), default=0)), torch.nan, dtype=torch.float64)
    for row, r in zip(seconds, done):
        row[: len(r.seconds)] = r.seconds
    note = {
        "paths": [os.fsdecode(r.path) for r in done],
        "failed": [os.fsdecode(r.path) for r in failed],
        "errors": {os.fsdecode(r.path): r.error for r in failed},
        "damaged": {i: asdict(r.damaged) for i, r in enumerate(done) if r.damaged},
        "about": about,
    }
    return arrays | {"seconds": seconds}, note


def from_arrays(arrays: dict[str, Tensor], note: dict[str, Any]) -> tuple[list[Encoded], dict[str, Any]]:
    """The rows, those that failed last, and `about`."""
    names, seconds, counts = note["paths"], arrays["seconds"], arrays.pop("tokens_rows", None)
    if counts is not None:
        tokens = arrays["tokens"]
        fits = tokens.dim() == 2 and counts.dim() == 1 and counts.dtype == torch.int64 and bool((counts >= 0).all())
        require(fits and int(counts.sum()) == len(tokens), f"tokens {tuple(tokens.shape)} of {counts}")
        arrays["tokens"] = tokens.split(counts.tolist())
    wrong = {k: len(x) for k, x in arrays.items() if len(x) != len(names)}
    require(not wrong, f"{len(names)} paths beside {wrong}")
    require(seconds.dim() == 2 and seconds.dtype == torch.float64, f"seconds {seconds.dtype} {tuple(seconds.shape)}")
    done = []
    for i, name in enumerate(names):
        frames = int(seconds[i].isnan().logical_not().sum())  # NaN before the last frame is found by the reader's check
        tokens, pooled = (arrays[k][i][None] if k in arrays else None for k in ("tokens", "pooled"))
        damaged = Damage(**note.get("damaged", {}).get(str(i), {}))
        encoding = Encoding(tokens, pooled, seconds[i, None, :frames])
        done.append(Encoded(name_of(name), encoding, seconds[i, :frames], damaged=damaged))
    failed = [Encoded(name_of(name), error=str(note["errors"][name])) for name in _failed(note)]
    return done + failed, note["about"]


def names_of(note: dict[str, Any]) -> list[tuple[str, bool]]:
    return [(name_of(n), False) for n in note["paths"]] + [(name_of(n), True) for n in _failed(note)]


def _failed(note: dict[str, Any]) -> list[Any]:
    return note.get("failed", note["errors"])
