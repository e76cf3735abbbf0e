"""Every bench runs at its smallest size, so that none rots, and the report reads what they write."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_check, harness, levels, op_checks
from pyvidx.bench import report

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("bench") / "out.json"
    command = [sys.executable, "-m", "pytest", "bench", "--device=cpu", "--smallest", "-q"]
    command.append(f"--benchmark-json={file}")
    alone = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_XDIST")}  # or nothing is measured
    run = subprocess.run(command, cwd=ROOT, env=alone, text=True, capture_output=True)
    assert run.returncode == 0, run.stdout[-4000:]
    return file


def test_every_bench_gives_its_numbers(results):
    ran = {b["fullname"].split("::")[0] for b in json.loads(results.read_text())["benchmarks"]}
    assert ran == {f"bench/{p.name}" for p in (ROOT / "bench").glob("bench_*.py")}
    for case in report.load(results):
        missing = {"shape", "dtype", "device", "threads", "bytes", "gbps", "copy_gbps", "floor_share", "vs_eager"} - {
            *case
        }
        assert not missing, f"{case['op']} lacks {missing}"
        assert case["ms"] > 0 and case["bytes"] > 0


@pytest.fixture
def fake_gpu(monkeypatch):
    """The harness on a device "cuda" that computes on the CPU; calls of a graph's replay are counted."""
    replays, cpu_timer, cpu_copy = [], harness.Timer("cpu"), harness.copy_of
    monkeypatch.setattr(harness, "Timer", lambda device: cpu_timer)
    monkeypatch.setattr(harness, "copy_of", lambda moved, device, footprint=0: cpu_copy(moved, "cpu", footprint))
    monkeypatch.setattr(harness, "device_name", lambda device: "fake")
    monkeypatch.setattr(harness, "record", lambda run: (run(), lambda: replays.append(run())))
    return replays


def one_case(**options) -> harness.Case:
    x = torch.ones(1000)
    return harness.Case("op", {"n": 1000}, x.dtype, lambda: x + 1, lambda: x.add(1), bytes=8000, **options)


def test_graph_time_beside_the_launched_one(fake_gpu):
    info = harness.compare(one_case(), "cuda", 0.0)
    assert len(fake_gpu) >= info["rounds"] == 5 and info["graph_ms"] > 0
    assert info["graph_share"] == pytest.approx(info["copy_ms"] / info["graph_ms"])
    plain = harness.compare(one_case(), "cpu", 0.0)
    fixed = harness.compare(one_case(graph=False), "cuda", 0.0)
    for other in (plain, fixed):
        assert not {"graph_ms", "graph_share", "graph_error"} & {*other} and other["ms"] > 0
    text = report.table([info | {"threads": 1}, plain])
    assert "graph ms" in text and f"{info['graph_ms']:.3f}" in text and text.splitlines()[-2].endswith("-")
    assert "graph" not in report.table([plain]), "a column that nothing fills"


def test_a_contender_that_fails_costs_the_others_nothing(fake_gpu, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(harness, "record", refuse)
    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.warns(UserWarning, match="no compile to compare with"):
        info = harness.compare(one_case(), "cuda", 0.0, with_compile=True)
    assert "stream is capturing" in info["graph_error"] and "stream is capturing" in info["compile_error"]
    assert info["compile_ms"] is None and "graph_ms" not in info and info["vs_eager"] > 0


def test_every_op_is_benched_in_the_dtype_of_a_v100():
    """By name: what gpu_check takes to a GPU in float16."""
    halves = {
        op for op, names in gpu_check.CASES.items() if any("float16]" in n and "bfloat16" not in n for n in names)
    }
    ops = {p.stem.removeprefix("bench_") for p in (ROOT / "bench").glob("bench_*.py")} & {
        p.stem for p in (ROOT / "csrc/include/pyvidx").glob("*.h")
    }
    assert len(ops) >= 11 and ops <= halves


def test_preprocess_against_the_processors():
    pytest.importorskip("transformers")
    from bench import preprocess

    row = preprocess.measure("360p", 1, 0)
    assert row["rounds"] == 5 and row["levels_off"]["pil"] < 1e-3 and row["cpu_ratio"]["pil"] > 1


def test_report(results, tmp_path):
    picture = tmp_path / "plot.png"
    command = [sys.executable, "-m", "pyvidx.bench", "report", str(results), "--plot", str(picture)]
    text = subprocess.check_output(command, cwd=ROOT, text=True)
    assert "token_gather" in text and "vs eager" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_levels_of_a_cpu_stand_side_by_side():
    if platform.machine() != "x86_64":
        pytest.skip("the levels are those of x86-64")
    columns = {level: (ROOT, level) for level in levels.here()[:1]}
    row = next(levels.measured(columns, ["token_gather"], seconds=0))
    assert row["op"] == "token_gather" and row["at"].keys() == columns.keys()
    assert all(at.keys() == set(levels.KEPT) and min(at.values()) > 0 for at in row["at"].values())


def test_levels_are_medians_over_starts_beside_what_is_kept():
    def row(op, **shares):
        return {
            "op": op,
            "shape": {},
            "dtype": "float32",
            "at": {c: dict.fromkeys(levels.KEPT, s) for c, s in shares.items()},
        }

    middle = levels.median([row("x", v2=1, v3=5), row("x", v2=3, v3=4), row("x", v2=2, v3=9)])
    assert middle == row("x", v2=2, v3=5)
    earlier = [row("y", v2=7, before=8), row("x", v2=0, v3=0, before=6)]
    assert levels.kept([middle, row("z", v2=1)], earlier) == [
        earlier[0], row("x", v2=2, v3=5, before=6), row("z", v2=1)
    ]  # fmt: skip


def test_levels_of_other_cases_do_not_stand_side_by_side(monkeypatch):
    ended = []

    class Other(op_checks.Worker):
        def __init__(self, file, checkout, arguments, **environment):
            self.level = environment["PYVIDX_ISA"]

        def ask(self, line):
            pass

        def answer(self, word):
            return json.dumps({"op": "x", "shape": {"level": self.level}, "dtype": "float32"})

        def end(self):
            ended.append(self.level)

    monkeypatch.setattr(op_checks, "Worker", Other)
    with pytest.raises(RuntimeError, match="levels: all processes must have the same cases"):
        next(levels.measured({"v2": (ROOT, "v2"), "v3": (ROOT, "v3")}, ["token_gather"], seconds=0))
    assert ended == ["v2", "v3"]


def test_a_worker_that_ended_is_named(tmp_path):
    (tmp_path / "quick.py").write_text("print('CASES 1')")
    worker = op_checks.Worker(str(tmp_path / "quick.py"), tmp_path, [])
    assert worker.answer("CASES ") == "1\n"
    worker.process.wait()
    worker.ask("0")
    with pytest.raises(RuntimeError, match=r"quick\.py.* ended before it said TIME"):
        worker.answer("TIME")
    worker.end()
