"""Predicted times of the CUDA kernels, from their SASS and the launches of the bench cases; see docs/predictions.md."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from pyvidx.bench import cubin, known, model
from pyvidx.bench.cases import PAPERS, Asked
from pyvidx.data.tables import read_json

ROOT = cubin.ROOT
SAMPLES = 3  # blocks of a launch that are run
ABOUT = "predicted, not measured: what the launches of the bench cases do, by their SASS; pyvidx bench predict --read"


def chosen(patterns: Iterable[str], cases: Iterable[Asked] = PAPERS) -> list[Asked]:
    """The cases that have all words of any pattern in their name: "temporal_attention", "st_pool T=8", ...; all without
    a pattern.

    Raises:
        ValueError: there is none.
    """
    found = [c for c in cases if not patterns or any({*p.split()} <= {*name_of(c).split()} for p in patterns)]
    if not found:
        raise ValueError(
            f"predict: no case has {' or '.join(patterns)} in its name; they are {'; '.join(map(name_of, cases))}"
        )
    return found


def name_of(asked: Asked) -> str:
    kind = asked.function.removesuffix("case").strip("_")
    told = " ".join(f"{k}={v}" for k, v in asked.arguments.items())
    return " ".join(filter(None, (asked.module.removeprefix("bench_"), kind, told)))


def traced(
    cases: list[Asked], archs: list[int], *, samples: int = SAMPLES, seen: Callable[[str], None] | None = None
) -> tuple[list[dict], list[str]]:
    """What the launches of the cases do, from their SASS, and of cases for which that is not known the reason: a kernel
    does not compile, or its SASS is not understood.

    Args:
        samples: blocks of a launch that are run.
        seen: called with the name of each case that is done.

    Raises:
        FileNotFoundError: this is no checkout.
        RuntimeError: a tool is missing, or the process that traces has died.
    """
    cubin.check_tools()
    library = emulator()
    given = {"cases": [dataclasses.asdict(c) for c in cases], "archs": archs, "samples": samples}
    traces, errors = [], []
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "pyvidx.bench.traces", library], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(),
    ) as process:  # fmt: skip
        process.stdin.write(json.dumps(given))
        process.stdin.close()
        for asked, line in zip(cases, process.stdout):
            found = json.loads(line)
            if "error" in found:
                errors.append(f"{name_of(asked)}: {found['error']}")
            else:
                traces.append({"case": dataclasses.asdict(asked), **found["result"]})
            if seen is not None:
                seen(name_of(asked))
    if process.returncode != 0 or len(traces) + len(errors) < len(cases):
        raise RuntimeError("predict: the process that traces has ended early; what it said is above")
    return traces, errors


def environment() -> dict[str, str]:
    """Of this process, with this checkout first; the CPU's own kernels set cases up."""
    env = {k: v for k, v in os.environ.items() if k != "PYVIDX_OPS_LIBRARY" and not k.startswith("PYVIDX_EMU_")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return {**env, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def emulator() -> str:
    """The library of tests/cuda_emu that lists launches, built if it is not there or the sources are newer."""
    command = [sys.executable, "-m", "tests.cuda_emu.build", "plain"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=environment())
    if done.returncode != 0:
        raise RuntimeError(f"predict: the emulator does not build: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def rows(traces: list[dict], gpus: list[model.Gpu]) -> list[dict]:
    """One prediction for each case and GPU, but for the cases that are here for the simulator alone."""
    about, aside = ("op", "shape", "dtype"), [dataclasses.asdict(asked) for asked in known.simulated_cases()]
    return [
        {**{k: t[k] for k in about}, **model.predicted(gpu, t)}
        for t in traces
        for gpu in gpus
        if str(gpu.arch) in t["archs"] and t["case"] not in aside
    ]


def load(path: Path, patterns: Iterable[str] = ()) -> list[dict]:
    """The traces that `predict --json` wrote, of the chosen cases.

    Raises:
        OSError: it cannot be opened.
        ValueError: the file holds none.
    """
    traces = read_json(path, dict).get("traces")
    try:
        cases = [Asked(**t["case"]) for t in traces]
        whole = all({"op", "shape", "dtype", "bytes", "archs"} <= {*t} for t in traces)
    except (TypeError, KeyError):
        whole = False
    if not whole:
        raise ValueError(f"predict: {path} must be what --json wrote, got no traces")
    kept = chosen(patterns, cases)
    return [t for t, asked in zip(traces, cases) if asked in kept]
