"""Engines by name: where a corpus is decoded and encoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from pyvidx.corpus.encode import Encoded, Timing
from pyvidx.corpus.registry import Registry
from pyvidx.preprocess import Preset


@dataclass(frozen=True)
class Job:
    """What is done to every video; the fields are arguments of encode_videos."""

    frames: int = 8
    sampler: str = "uniform"
    reader: str = "auto"
    preset: str | Preset = "clip"
    start: float | None = None
    end: float | None = None
    outputs: Sequence[str] | None = None
    dtype: torch.dtype = torch.float32
    batch: int = 1


class Engine(Protocol):
    """A new one is a class with @register in a file of its own, imported in engines/__init__.py."""

    def check(self) -> None:
        """Raise RuntimeError if a package is missing."""

    def run(self, paths: Sequence[str], model: nn.Module, job: Job, workers: int, timing: Timing) -> Iterator[Encoded]:
        """A result per path, in any order. workers: processes that decode, on this machine."""


ENGINES = Registry("corpus: engine")
register, named = ENGINES.register, ENGINES.named
