"""Vector files, the runners that compute what they hold, and the comparison.

A runner is a function of (file, run, variant, check) registered for a file-name pattern; it computes every output of
that run and hands each to `check`. What it may leave out it declares.
"""

import fnmatch
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(os.environ.get("PYVIDX_GOLDEN") or Path(__file__).parent / "data")
TOLERANCE = 2e-5  # relative to max(1, largest value); float32 against float64 of the same code is below 5e-6


@dataclass(frozen=True)
class VectorFile:
    path: Path

    @property
    def name(self) -> str:
        return str(self.path.relative_to(FOLDER))

    @cached_property
    def meta(self) -> dict:
        if self.path.suffix == ".json":
            return json.loads(self.path.read_text())
        with safe_open(self.path, "pt") as file:
            header = file.metadata() or {}
        beside = self.path.with_suffix(".json")
        text = next((header[key] for key in ("case", "json", "meta") if key in header), None)
        return json.loads(text or (beside.read_text() if beside.exists() else "{}"))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return {} if self.path.suffix == ".json" else load_file(self.path)

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}


@dataclass(frozen=True)
class Runner:
    pattern: str
    run: Callable
    runs: Callable[[VectorFile], list[str]]
    variants: tuple[str, ...]
    may_lack: tuple[str, ...]  # patterns of outputs that it does not compute
    inputs: tuple[str, ...] | None  # patterns of what is no output; None: outputs are called out.* or grad*

    def outputs(self, name: str, run: str) -> bool:
        """Whether a tensor of this name is an output of the run."""
        if self.inputs is not None:
            return name.startswith(f"{run}." if run else "") and not matches(name, self.inputs)
        prefixes = [f"out.{run}.", f"grad.{run}."] if run else ["out."]
        return name.startswith(tuple(prefixes)) or (bool(run) and fnmatch.fnmatchcase(name, f"grad_of.*.{run}.*"))


RUNNERS: list[Runner] = []


def matches(name: str, patterns) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def runner(pattern: str, *, variants=("",), runs=lambda file: list(file.meta["runs"]), may_lack=(), inputs=None):
    """Register a runner for files whose name (without folder and ending) matches the pattern."""

    def register(function):
        RUNNERS.append(Runner(pattern, function, runs, tuple(variants), tuple(may_lack), inputs))
        return function

    return register


def runner_of(file: VectorFile) -> Runner | None:
    return next((r for r in RUNNERS if fnmatch.fnmatchcase(file.path.stem, r.pattern)), None)


def files() -> list[VectorFile]:
    """Every vector file; a .json counts where no .safetensors of its name holds the same."""
    paths = [p for p in sorted(FOLDER.rglob("*")) if p.suffix in (".safetensors", ".json")]
    return [VectorFile(p) for p in paths if p.suffix != ".json" or p.with_suffix(".safetensors") not in paths]


@dataclass
class Check:
    """Compares named outputs and remembers which were compared."""

    wanted: dict[str, Tensor]
    seen: set[str] = field(default_factory=set)

    def __call__(self, name: str, got: Tensor, tolerance: float = TOLERANCE, part: tuple[slice, ...] = ()) -> None:
        """got is within tolerance * max(1, largest) of the vector, if the file has one of this name.

        part: got is this part of the vector; the rest is not computed.
        """
        if name not in self.wanted:
            return
        self.seen.add(name)
        want = self.wanted[name][part]
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, expected {tuple(want.shape)}"
        if not want.numel():
            return
        error = (got.detach().double() - want.double()).abs().max().item()
        allowed = tolerance * max(1.0, want.abs().max().item())
        assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"

    def equal(self, name: str, got: Tensor, part: tuple[slice, ...] = ()) -> None:
        """Both are the same in this part; the rest is not compared."""
        if name in self.wanted:
            self.seen.add(name)
            want = self.wanted[name][part]
            assert torch.equal(got[part].to(want.dtype), want), f"{name} differs"

    def excuse(self, name: str) -> None:
        """This output says nothing; not compared."""
        self.seen.add(name)
