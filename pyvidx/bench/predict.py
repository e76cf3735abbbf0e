"""Predicted times of the CUDA kernels, from their SASS and the launches of the bench cases; see docs/predictions.md."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from pyvidx.bench import cubin, model
from pyvidx.bench.cases import PAPERS, Asked
from pyvidx.data.tables import read_json

ROOT = cubin.ROOT
SIMULATED = Path(__file__).with_name("v100_simulated.json")
RESULTS = ROOT / "bench/results"
COLUMNS = ("op", "shape", "dtype", "GPU", "us", "of copy", "limit", "registers", "warps", "rounds", "per 16 B")
LEFT = 3


def chosen(patterns: Iterable[str], cases: Iterable[Asked] = PAPERS) -> list[Asked]:
    """The cases of which any pattern is a part: "temporal_attention", "st_pool T=8", ...; all without a pattern.

    Raises:
        ValueError: there is none.
    """
    found = [c for c in cases if not patterns or any(all(word in name_of(c) for word in p.split()) for p in patterns)]
    if not found:
        raise ValueError(
            f"predict: no case has {' or '.join(patterns)} in its name; they are {'; '.join(map(name_of, cases))}"
        )
    return found


def name_of(asked: Asked) -> str:
    kind = asked.function.removesuffix("case").strip("_")
    told = " ".join(f"{k}={v}" for k, v in asked.arguments.items())
    return " ".join(filter(None, (asked.module.removeprefix("bench_"), kind, told)))


def traced(cases: list[Asked], archs: list[int], *, samples: int = 3, seen: Callable[[str], None] | None = None):
    """What the launches of the cases do, from their SASS.

    Args:
        samples: blocks of a launch that are run.
        seen: called with the name of each case that is done.

    Raises:
        FileNotFoundError: this is no checkout.
        RuntimeError: a tool is missing, a kernel does not compile, or its SASS is not understood.
    """
    cubin.check_tools()
    library = emulator()
    latency = {str(gpu.arch): gpu.latency for gpu in model.gpus()}
    given = {"cases": [dataclasses.asdict(c) for c in cases], "archs": archs, "latency": latency, "samples": samples}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "pyvidx.bench.traces", library], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    traces = []
    process.stdin.write(json.dumps(given))
    process.stdin.close()
    for asked, line in zip(cases, process.stdout):
        found = json.loads(line)
        if "error" in found:
            process.kill()
            raise RuntimeError(f"{name_of(asked)}: {found['error'].removeprefix('RuntimeError: ')}")
        traces.append({"case": dataclasses.asdict(asked), **found["result"]})
        if seen is not None:
            seen(name_of(asked))
    if process.wait() != 0 or len(traces) < len(cases):
        raise RuntimeError("predict: the process that traces has ended early; what it said is above")
    return traces


def environment() -> dict[str, str]:
    """Of this process, with this checkout first; the CPU's own kernels set cases up."""
    env = {k: v for k, v in os.environ.items() if k != "PYVIDX_OPS_LIBRARY" and not k.startswith("PYVIDX_EMU_")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return {
        **env,
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def emulator() -> str:
    """The library of tests/cuda_emu that lists launches, built if it is not there or the sources are newer."""
    command = [sys.executable, "-m", "tests.cuda_emu.build", "plain"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=environment())
    if done.returncode != 0:
        raise RuntimeError(f"predict: the emulator does not build: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def rows(traces: list[dict], gpus: list[model.Gpu]) -> list[dict]:
    """One prediction for each case and GPU, but for the cases that are here for the simulator alone."""
    about, aside = ("op", "shape", "dtype"), [dataclasses.asdict(asked) for asked in simulated_cases()]
    return [
        {**{k: t[k] for k in about}, **model.predicted(gpu, t)}
        for t in traces
        for gpu in gpus
        if str(gpu.arch) in t["archs"] and t["case"] not in aside
    ]


def cells(row: dict) -> tuple[str, ...]:
    shape = " ".join(v if isinstance(v, str) else f"{k}{v}" for k, v in row["shape"].items())
    return (row["op"], shape, row["dtype"], row["gpu"], f"{row['us']:.1f}", f"{row['share']:.2f}", row["limit"],
            str(row["registers"]), str(row["warps"]), str(row["rounds"]), f"{row['per_16_bytes']:.1f}")  # fmt: skip


def table(lines: list[tuple[str, ...]], columns: tuple[str, ...] = COLUMNS, left: int = LEFT) -> str:
    """Aligned for a terminal."""
    lines = [columns, *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    shown = (
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )
    return "\n".join(shown)


def load(path: Path) -> list[dict]:
    """The traces that `predict --json` wrote.

    Raises:
        ValueError: the file holds none.
    """
    data = read_json(path, dict)
    traces = data.get("traces")
    if not isinstance(traces, list) or not all(isinstance(t, dict) and {"op", "case", "archs"} <= {*t} for t in traces):
        raise ValueError(f"predict: {path} must be what --json wrote, got no traces")
    return traces


# ---- against what is known ----


def simulated() -> tuple[str, model.Gpu, list[dict]]:
    """What the figures are, the GPU they are of, and the cases with their "us" and "share"."""
    data = json.loads(SIMULATED.read_text())
    change = dict(data["gpu"])
    whole = next(g for g in model.gpus() if g.name == change.pop("of"))
    return data["about"], dataclasses.replace(whole, **change), data["cases"]


def simulated_cases() -> list[Asked]:
    names = [field.name for field in dataclasses.fields(Asked)]
    return [Asked(**{k: case[k] for k in names if k in case}) for case in simulated()[2]]


def against_simulation(traces: list[dict]) -> list[dict]:
    """Predicted and simulated share of copy of the cases of v100_simulated.json that are among the traces."""
    _, gpu, cases = simulated()
    found = []
    for case, asked in zip(cases, map(dataclasses.asdict, simulated_cases())):
        trace = next((t for t in traces if t["case"] == asked and "70" in t["archs"]), None)
        if trace is not None:
            here = dataclasses.replace(gpu, sms=case.get("sms", gpu.sms))
            row = model.predicted(here, trace)
            found.append({**{k: trace[k] for k in ("op", "shape", "dtype")}, **row, "known_us": case["us"],
                          "known_share": case["share"]})  # fmt: skip
    return found


def measurements(folder: Path = RESULTS) -> list[dict]:
    """The cases of every result of bench/gpu_check.py in a folder, each with its GPU's name in gpus.json.

    Raises:
        ValueError: such a file holds cases that are none.
    """
    names, found = [gpu.name for gpu in model.gpus()], []
    for path in sorted(folder.glob("*.json")):
        data = read_json(path)
        if not isinstance(data, dict) or not isinstance(data.get("gpu"), str) or "cases" not in data:
            continue
        gpu = next((name for name in names if name in data["gpu"].upper()), None)
        if gpu is None:  # the emulator, or a GPU that is not predicted
            continue
        for case in data["cases"]:
            if not {"op", "shape", "dtype", "ms", "copy_ms"} <= {*case}:
                raise ValueError(
                    f"predict: {path} must hold cases with op, shape, dtype, ms and copy_ms, got {sorted(case)}"
                )
            found.append({**case, "gpu": gpu, "file": path.name})
    return found


def against_measurements(traces: list[dict], measured: list[dict]) -> list[dict]:
    """Predicted time and share of copy beside what was measured, where both are of one case and GPU."""
    by_name = {gpu.name: gpu for gpu in model.gpus()}
    found = []
    for trace in traces:
        for m in measured:
            gpu = by_name[m["gpu"]]
            if all(trace[k] == m[k] for k in ("op", "shape", "dtype")) and str(gpu.arch) in trace["archs"]:
                row = model.predicted(gpu, trace)
                found.append({**{k: trace[k] for k in ("op", "shape", "dtype")}, **row, "known_us": m["ms"] * 1e3,
                              "known_share": m["copy_ms"] / m["ms"]})  # fmt: skip
    return found


def compared(found: list[dict]) -> list[tuple[str, ...]]:
    """Cells of predicted against known; the error is that of the share of copy."""
    return [
        (*cells(r)[:4], f"{r['us']:.1f}", f"{r['known_us']:.1f}", f"{r['share']:.2f}", f"{r['known_share']:.2f}",
         f"{r['share'] / r['known_share'] - 1:+.0%}", r["limit"])
        for r in found
    ]  # fmt: skip


def text(traces: list[dict], gpus: list[model.Gpu]) -> str:
    """All tables, for a terminal."""
    blocks = ["predicted, not measured:", table([cells(r) for r in rows(traces, gpus)]), NOTE]
    if known := against_simulation(traces):
        blocks += ["", simulated()[0], table(compared(known), COMPARED)]
    if known := against_measurements(traces, measurements()):
        blocks += ["", "against measurements of bench/results:", table(compared(known), COMPARED)]
    return "\n".join(blocks)


def markdown(traces: list[dict], gpus: list[model.Gpu]) -> str:
    """The tables of docs/predictions.md: a row for each case, a column for each GPU."""
    names = [gpu.name for gpu in gpus]
    lines = ["| op | shape | dtype | " + " | ".join(names) + " |", "| --- | --- | --- |" + " --- |" * len(names)]
    for trace in traces:
        mine = rows([trace], gpus)
        shown = [f"{r['us']:.1f} us, {r['share']:.2f}, {r['limit']}" for r in mine]
        if mine:
            lines.append("| " + " | ".join([*cells(mine[0])[:LEFT], *shown]) + " |")
    tables = ["\n".join(lines)]
    for title, known in (
        ("Against the simulator", against_simulation(traces)),
        ("Against measurements", against_measurements(traces, measurements())),
    ):
        if known:
            head = "| " + " | ".join(COMPARED) + " |\n|" + " --- |" * len(COMPARED)
            tables.append(f"{title}:\n\n{head}\n" + "\n".join("| " + " | ".join(c) + " |" for c in compared(known)))
    return "\n\n".join(tables)


MARKS = ("<!-- pyvidx bench predict -->", "<!-- end -->")


def filled(page: str, tables: str) -> str:
    """A page with the tables between its marks.

    Raises:
        ValueError: it has no marks.
    """
    before, start, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not start or not end:
        raise ValueError(f"predict: the page must have the lines {MARKS[0]} and {MARKS[1]}, got a page without")
    return f"{before}{start}\n{tables}\n{end}{after}"


ABOUT = "predicted, not measured: what the launches of the bench cases do, by their SASS; pyvidx bench predict --read"
NOTE = (
    "us: all launches of the case; of copy: a copy of the same bytes / ours; limit, registers, warps (on a "
    "multiprocessor) and rounds (how often a warp waits for memory): of the longest launch; per 16 B: instructions of "
    "a lane per 16 bytes moved"
)
COMPARED = ("op", "shape", "dtype", "GPU", "us", "known us", "of copy", "known", "error", "limit")
