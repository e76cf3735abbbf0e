"""Every bench runs at its smallest size, so that none rots, and the report reads what they write."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
