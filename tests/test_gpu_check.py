"""bench/gpu_check.py without a GPU: its steps run, its deadline holds, and what it knows is always on the disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_check
from tests.cuda_emu import build

ROOT = Path(__file__).parents[1]
NOT_THERE = (
    "av",
    "decord",
    "open_clip",
    "transformers",
    "tqdm",
    "matplotlib",
    "pyarrow",
    "PIL",
    "skvideo",
    "torchvision",
)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.skipif(build.native.cuda_headers() is None, reason="no CUDA headers in CUDA_HOME or /usr/local/cuda")
def test_emulated(tmp_path):
    """Every step, where only what the docstring names is installed, and git is not."""
    blocker = tmp_path / "path/sitecustomize.py"
    blocker.parent.mkdir()
    blocker.write_text(f"import sys\nsys.modules.update(dict.fromkeys({NOT_THERE!r}))\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("g++", "ninja", "c++filt", "sh", "cc", "as", "ld", "setarch", "openssl"):
        if (found := gpu_check.shutil.which(name)) is not None:
            (tools / name).symlink_to(found)
    env = os.environ | {"PYTHONPATH": str(blocker.parent), "PATH": str(tools)}
    command = [
        sys.executable,
        "bench/gpu_check.py",
        "--emulate",
        "--seconds=0",
        "--minutes=20",
        f"--out={tmp_path}/out",
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    (file,) = (tmp_path / "out").glob("emulated-*.json")
    result = json.loads(file.read_text())
    assert [s["name"] for s in result["steps"]] == [s.name for s in gpu_check.gpu_steps(file, 0.0)]
    assert all(s["passed"] for s in result["steps"]) and result["commit"] is None
    assert len(result["cases"]) == 3 and all(case["ms"] > 0 for case in result["cases"])
    assert result["cases"][2]["compile_ms"] > 0


@pytest.mark.parametrize(
    "torch_version, cuda, gpu, archs, nvcc, wanted",
    [
        ("2.10.0+cu128", "12.8", (7, 0), "sm_70 sm_75 sm_90 sm_120", "70 90", None),
        ("2.13.0+cu126", "12.6", (7, 0), "sm_50 sm_60 sm_70", "70 90", None),
        ("2.11.0+cu130", "13.0", (7, 0), "sm_75 sm_80 compute_120", "70 90", "none for this GPU, sm_70: see docs"),
        (
            "2.10.0+cu128",
            "12.8",
            (7, 0),
            "sm_70 sm_75",
            "75 90 100",
            "cannot compile for this GPU, sm_70; set CUDA_HOME",
        ),
        ("2.10.0+cu128", "12.8", (8, 9), "sm_80 sm_86", "89", None),
        ("2.11.0+cu130", "13.0", (9, 0), "sm_90a", "90", None),
        ("2.11.0+cu130", "13.0", (12, 1), "sm_90 compute_120", "121", None),
        ("2.10.0+cu128", "12.8", (7, 0), "sm_70", None, "needs nvcc in CUDA_HOME"),
        ("2.9.1+cu128", "12.8", (9, 0), "sm_90", "90", "needs torch 2.10 or newer with CUDA, got 2.9.1"),
        ("2.13.0+cpu", None, (9, 0), "", "90", "needs torch 2.10 or newer with CUDA, got 2.13.0+cpu"),
        ("2.10.0+cu128", "12.8", None, "sm_70", "70", "got none"),
    ],
)
def test_where_nothing_can_run_it_says_why(torch_version, cuda, gpu, archs, nvcc, wanted, monkeypatch):
    monkeypatch.setattr(gpu_check.native_build, "installed_nvcc", lambda: nvcc)
    monkeypatch.setattr(gpu_check.native_build, "known_archs", lambda nvcc: set(nvcc.split()))
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for name, value in {
        "is_available": gpu is not None,
        "get_device_capability": gpu,
        "get_arch_list": archs.split(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    why = gpu_check.why_not()
    assert (why is None) if wanted is None else wanted in why, why


def test_the_cases_exist():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *gpu_check.case_names()], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert 25 <= len(gpu_check.case_names()) <= 40


def test_a_step_out_of_time_is_killed_with_all_it_started(tmp_path):
    child = "import time, pathlib; time.sleep(3); pathlib.Path('late').touch()"
    start_child = f"subprocess.Popen([sys.executable, '-c', {child!r}], cwd={str(tmp_path)!r})"
    code = f"import subprocess, sys, time; print('begun', flush=True); {start_child}; time.sleep(60)"
    start = time.monotonic()
    result = gpu_check.run(gpu_check.Step("slow", python(code), 1), 1.5)
    assert time.monotonic() - start < 30
    assert not result["passed"] and result["code"] == 124 and "begun" in result["tail"]
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_what_is_known_is_written_after_every_step(tmp_path):
    file, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    look = f"import json; print(len(json.load(open({str(file)!r}))['steps']))"
    steps = [
        gpu_check.Step("build", python(f"open({str(lines)!r}, 'w').write('{{\"ms\": 1}}\\n{{\"ms\"')"), 30),
        gpu_check.Step("look", python(look), 30),
        gpu_check.Step("missing", ["/nowhere/compute-sanitizer"], 30),
        gpu_check.Step("bad", python("raise SystemExit(3)"), 30),
    ]
    assert not gpu_check.run_all(steps, 5, file, lines, {"gpu": "none"})
    result = json.loads(file.read_text())
    assert [s["passed"] for s in result["steps"]] == [True, True, False, False]
    assert result["steps"][1]["tail"] == "1\n" and "not run" in result["steps"][2]["tail"]
    assert result["cases"] == [{"ms": 1}], "the line that a kill has cut is left out"


def test_more_minutes_are_more_for_every_step(tmp_path):
    step = gpu_check.Step("build", python("import time; time.sleep(2)"), 1)
    assert not gpu_check.run_all([step], 9, tmp_path / "a.json", tmp_path / "a.jsonl", {})
    assert gpu_check.run_all([step], 270, tmp_path / "a.json", tmp_path / "a.jsonl", {})


def test_steps_after_the_deadline_or_a_failed_build_are_named(tmp_path):
    file, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    slow = [gpu_check.Step(name, python("import time; time.sleep(60)"), 100) for name in ("build", "b")]
    assert not gpu_check.run_all(slow, 1.5 / 60, file, lines, {})
    first, second = json.loads(file.read_text())["steps"]
    assert first["code"] == 124 and second["code"] is None and second["tail"].startswith("not run")


def test_a_terminated_check_leaves_nothing_running(tmp_path):
    """SIGTERM, as of a batch system: the running step ends as well."""
    command = [sys.executable, "bench/gpu_check.py", "--emulate", f"--out={tmp_path}"]
    check = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in check.stdout:
        if line.startswith("== build"):
            break
    check.send_signal(signal.SIGTERM)
    assert check.wait(timeout=60) == 143
