"""Training runs killed at random moments and resumed: the same bits; tests/fuzz/kills.py says how."""

import json
import subprocess
import sys

import pytest

FEW = ["--kills", "3", "--runs", "pretraining from stored features"]


@pytest.mark.parametrize("options", [FEW, pytest.param(["--kills", "50"], marks=pytest.mark.slow)], ids=["few", "many"])
def test_killed_runs_go_on_to_the_same_bits(tmp_path, options):
    pytest.importorskip("av", reason="reading video needs PyAV: pip install 'pyvidx[video]'")
    pytest.importorskip("transformers", reason="pip install 'pyvidx[hosts]'")
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    # A process of its own, for it forks.
    command = [sys.executable, "-m", "tests.fuzz.kills", "--seed", "1", "--out", str(tmp_path / "kills.json"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "kills.json").read_text())["kills"] == int(options[1])
