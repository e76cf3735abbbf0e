"""make gpu-check: everything that needs an NVIDIA GPU, in one command and a fixed time, without a network.

    python3 bench/gpu_check.py [--minutes 9] [--out FOLDER] [--seconds 0.3] [--emulate]

In this order: build for the GPU that is here, the op tests on it, some 35 benches, launched and as CUDA graphs, against
plain torch, the same against torch.compile, our kernels under compute-sanitizer's memcheck and racecheck. Whatever has
not ended when the time is up is killed with all it started. FOLDER (bench/results) gets <gpu>-<date>.json, written anew
after every step, and <gpu>-<date>.jsonl, one line for each case as soon as it is measured. The exit status is 0 if all
steps passed, 1 if one did not, 2 where nothing can run. A slower machine takes more minutes: steps get their share.

Needs Python 3.10 or newer, torch 2.10 or newer with CUDA, nvcc of the same major version (CUDA_HOME, /usr/local/cuda or
PATH), and from PyPI: numpy, safetensors, setuptools, ninja, pybind11, pytest, pytest-benchmark, pytest-timeout,
hypothesis; with pytest-xdist the tests run side by side. git is not needed. Where compute-sanitizer is missing, its
steps fail and say so.

On a V100 (sm_70), which CUDA 13 no longer knows: docs/contributing.md, "gpu-check on a V100".

--emulate: no GPU; every step's code, in a small size. The kernels run in the emulator of tests/cuda_emu, its sanitizers
stand in for compute-sanitizer, and the benches run on the CPU.
"""

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "cmake")]

import native_build  # noqa: E402

from pyvidx.files import write_json  # noqa: E402

MINUTES = 9

# What launches kernels, without torch's own tools around it.
SANITIZED = "(forward or backward or merge or steps) and not compiled and not registration and not gradcheck"

# At the papers' sizes: CLIP-L/14 (BT-Adapter) and a full bank of 20 frames (MA-LMM).
CASES = {
    "temporal_attention": [
        *(f"temporal_attention[l14-{size}-float16]" for size in ("1-8", "1-16", "1-64", "8-8")),
        *(f"temporal_attention[l14-{size}-float32]" for size in ("1-8", "1-64")),
        *(f"temporal_attention_backward[l14-{size}-float16]" for size in ("8-8", "1-64")),
    ],
    "gated_fusion": [
        *(f"gate[norm-l14-{size}-float16]" for size in ("1-8", "8-8")),
        *("gate[plain-l14-1-8-float32]", "first[norm-l14-float16]", "backward[l14-whole-float16]"),
    ],
    "residual_norm": ["residual_norm[forward-space-l14-float16]", "residual_norm[backward-space-l14-float16]"],
    "quick_gelu": ["quick_gelu[forward-l14-float16]", "quick_gelu[backward-l14-float16]"],
    "token_gather": [f"token_gather[l14-{size}-float16]" for size in ("1-8", "8-8")],
    "st_pool": ["st_pool[l14-1-8-float16]", "st_pool[l14-1-100-float16]"],
    "resize_normalize": [f"resize_normalize[{size}-8-float16]" for size in ("360p", "1080p")],
    "temporal_scale": [f"temporal_scale{pass_}[l14-8-8-float16]" for pass_ in ("", "_backward")],
    "memory_merge": ["memory_merge_[6-20-float32]", "memory_merge_[6-20-float16]", "memory_merge[float16]"],
    "memory_scan": ["memory_scan_[20-float32]", "memory_scan_[20-float16]", "memory_replay_[20-float16]"],
    "bank_attention": [
        *(f"bank_attention[{path}-20-float16]" for path in ("slots", "table")),
        *("bank_attention[slots-20-float32]", "bank_attention_backward[table-20-float16]"),
        "self_attention[8-257-forward-float16]",
    ],
    "encoder": ["encoder[clip-l-14-1-8]"],
    "malmm": ["malmm[stream-M20-float32]", "malmm[clip-M20-float32]"],
}


def case_names() -> list[str]:
    """As pytest is given them."""
    return [f"bench/bench_{op}.py::test_{name}" for op, names in CASES.items() for name in names]


@dataclass
class Step:
    """One command. limit: its share of the nine minutes, in seconds, and in proportion of more; what earlier steps left
    over does not add to it."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)


def run(step: Step, seconds: float) -> dict:
    """Run a step for at most so long, its output to the screen as it comes; what the result file says about it."""
    print(f"\n== {step.name}, at most {seconds:.0f} s: {' '.join(step.command)}", flush=True)
    start = time.monotonic()
    tail: deque[str] = deque(maxlen=60)
    # A session of its own, whose group holds all that the command starts, as pytest's workers and the sanitized child.
    process = subprocess.Popen(
        step.command, cwd=ROOT, env=os.environ | step.environment, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip

    def show() -> None:
        for line in process.stdout:
            print(line, end="", flush=True)
            tail.append(line)

    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        code = 124
        print(f"\n== {step.name}: out of time", flush=True)
    finally:
        kill_group(process)
    reader.join(timeout=5)
    return {"name": step.name, "passed": code == 0, "code": code, "seconds": round(time.monotonic() - start, 1),
            "tail": "".join(tail)[-4000:]}  # fmt: skip


def kill_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # all of it has ended
        pass
    process.wait()


def gpu_steps(lines: Path, seconds: float) -> list[Step]:
    """On the GPU of this machine."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests = ["tests/ops", "tests/test_cuda_streams.py"]
    side_by_side = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    bench = [*pytest, "--device", "cuda", "--seconds", str(seconds), f"--lines={lines}", *case_names()]
    sanitizer = shutil.which("compute-sanitizer") or str(cuda_home() / "bin/compute-sanitizer")
    # Only kernels of our namespace: torch's would take the time, and may be reported for what torch knows of.
    checks = [sanitizer, "--kernel-name", "kns=pyvidx", "--error-exitcode", "9", "--target-processes", "all", "--tool"]
    sample = [*pytest, "tests/ops", "-k", f"cuda and {SANITIZED}", "-m", "not slow", "--sample=4"]
    return [
        Step("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 200, {"PYVIDX_CUDA": "1"}),
        Step("info", [sys.executable, "-m", "pyvidx", "info", "--json"], 40),
        Step("tests", [*pytest, *tests, "-k", "cuda", "-m", "not slow", *side_by_side], 180),
        Step("bench", [*bench, "--no-compile"], 120),
        Step("bench against torch.compile", bench, 150),
        Step("memcheck", [*checks, "memcheck", *sample], 90),
        Step("racecheck", [*checks, "racecheck", *sample], 90),
    ]  # fmt: skip


def emulated_steps(lines: Path, seconds: float) -> list[Step]:
    """The same without a GPU, and little of it."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    emulator = [
        sys.executable,
        "-m",
        "tests.cuda_emu.run",
        "--sample=1",
        "-k",
        f"cpu and {SANITIZED}",
        "-m",
        "not slow",
    ]
    bench = [*pytest, "--device", "cpu", "--seconds", str(seconds), f"--lines={lines}"]
    few = [name for name in case_names() if "st_pool[l14-1-8-" in name or "token_gather[l14-1-8-" in name]
    return [
        Step("build", [sys.executable, "-m", "tests.cuda_emu.build", "plain", "asan", "tsan"], 600),
        Step("info", [sys.executable, "-m", "pyvidx", "info", "--json"], 60),
        Step("tests", [*emulator, "tests/ops"], 120),
        Step("bench", [*bench, *few, "--no-compile"], 60),
        Step("bench against torch.compile", [*bench, few[0]], 200),
        Step("memcheck", [*emulator, "--variant", "asan", "tests/ops/test_st_pool.py"], 200),
        Step("racecheck", [*emulator, "--variant", "tsan", "tests/ops/test_st_pool.py"], 200),
    ]


def run_all(steps: list[Step], minutes: float, file: Path, lines: Path, head: dict) -> bool:
    """Run the steps one after the other; what is known is in `file` after each. Did all of them pass?"""
    stop = time.monotonic() + 60 * minutes
    done = []
    for step in steps:
        left = stop - time.monotonic()
        if done and not done[0]["passed"]:
            done.append(skipped(step, "the build failed"))
        elif left < 1:
            done.append(skipped(step, "out of time"))
        else:
            try:
                done.append(run(step, min(step.limit * max(1, minutes / MINUTES), left)))
            except OSError as error:
                done.append(skipped(step, str(error)))
        write_json(file, {**head, "steps": done, "cases": cases_of(lines)}, indent=1)
    print(f"\nwrote {file}")
    for s in done:
        print(f"{'passed' if s['passed'] else 'FAILED':7} {s['seconds']:7.1f} s  {s['name']}")
    return all(s["passed"] for s in done)


def skipped(step: Step, why: str) -> dict:
    print(f"\n== {step.name}: not run: {why}", flush=True)
    return {"name": step.name, "passed": False, "code": None, "seconds": 0.0, "tail": f"not run: {why}"}


def cases_of(lines: Path) -> list[dict]:
    """What the benches have appended; a line that a kill has cut is left out."""
    cases = []
    for line in lines.read_text().splitlines() if lines.exists() else []:
        try:
            cases.append(json.loads(line))
        except json.JSONDecodeError:
            pass
    return cases


def why_not() -> str | None:
    """Why no kernel can run here; None: it can."""
    import torch

    if torch.version.cuda is None or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return f"needs torch 2.10 or newer with CUDA, got {torch.__version__}"
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU that torch can use, got none (does nvidia-smi see one?)"
    major, minor = torch.cuda.get_device_capability()
    arch, archs = f"{major}{minor}", torch.cuda.get_arch_list()
    v100 = ": see docs/contributing.md, gpu-check on a V100" if arch == "70" else ""
    if not any(runs_on(code, major, minor) for code in archs):
        return f"torch {torch.__version__} has code for {' '.join(archs)}, none for this GPU, sm_{arch}{v100}"
    nvcc = native_build.installed_nvcc()
    if nvcc is None:
        return "needs nvcc in CUDA_HOME, /usr/local/cuda or PATH, got none"
    if arch not in native_build.known_archs(nvcc):
        return f"{nvcc} cannot compile for this GPU, sm_{arch}; set CUDA_HOME to a CUDA that can{v100}"
    return None


def runs_on(code: str, major: int, minor: int) -> bool:
    """sm_86, compute_90: machine code runs on later GPUs of the same generation, PTX on all later ones."""
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)", code)
    if found is None:  # sm_90a: on that GPU alone
        return code.startswith(f"sm_{major}{minor}")
    of = int(found[2]), int(found[3])
    return of <= (major, minor) and (found[1] == "compute" or of[0] == major)


def cuda_home() -> Path:
    return Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


def commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything together")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=0.3, help="time per bench case, all contenders together")
    parser.add_argument("--emulate", action="store_true", help="without a GPU, in a small size")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running step is killed too
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    refused = None if options.emulate else why_not()
    if refused is not None:
        print(f"gpu-check: {refused} (--emulate does without a GPU)", file=sys.stderr)
        return 2
    import torch

    gpu = "emulated" if options.emulate else torch.cuda.get_device_name()
    head = {"gpu": gpu, "date": datetime.date.today().isoformat(), "torch": torch.__version__,
            "cuda": torch.version.cuda, "python": sys.version.split()[0], "commit": commit()}  # fmt: skip
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    name = f"{re.sub('[^a-z0-9]+', '-', gpu.lower())}-{head['date']}"
    lines = out / f"{name}.jsonl"
    lines.unlink(missing_ok=True)
    steps = (emulated_steps if options.emulate else gpu_steps)(lines, options.seconds)
    return 0 if run_all(steps, options.minutes, out / f"{name}.json", lines, head) else 1


if __name__ == "__main__":
    sys.exit(main())
