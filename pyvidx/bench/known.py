"""Predictions beside what is known: a simulator's figures, and measured results of bench/results."""

import dataclasses
import json
import re
from pathlib import Path

from pyvidx.bench import cubin, model
from pyvidx.bench.cases import Asked
from pyvidx.data.tables import read_json

# Other GPUs, or parts of one, have these in their names beside a name of gpus.json.
OTHERS = re.compile(r"PCIE|NVL|MIG|40GB")
SIMULATED = Path(__file__).with_name("v100_simulated.json")
RESULTS = cubin.ROOT / "bench/results"


def simulated() -> tuple[str, model.Gpu, list[dict]]:
    """What the figures are, the GPU they are of, and the cases with their "us" and "share"."""
    data = json.loads(SIMULATED.read_text())
    change = dict(data["gpu"])
    of = change.pop("of")
    whole = next(g for g in model.gpus() if g.name == of)
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
        called = data["gpu"].upper()
        gpu = next((name for name in names if re.search(rf"\b{name}\b", called)), None)
        if gpu is None or OTHERS.search(called):  # the emulator, or a GPU that is not predicted
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
