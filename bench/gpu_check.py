"""make gpu-check: everything that needs an NVIDIA GPU, in one command and under 8 minutes, without a network.

Uses the python3 that has torch. Builds in place, runs the test suite on CUDA and the op tests under compute-sanitizer,
runs the benches, and writes bench/results/<gpu>-<date>.json: what passed, how long it took, and every measured case.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SANITIZED_OPS = (
    "not compiled and not registration and not gradcheck"  # what launches kernels, without torch's own tools
)
NOT_HERE = ("test_cuda_emu", "test_cuda_check", "test_cuda_link", "test_cmake")  # they stand in for a GPU, or need none
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


def step(name: str, command: list[str], timeout: float, **environment: str) -> dict:
    """Run one command; its output goes to the screen and its end into the result."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    try:
        run = subprocess.run(command, cwd=ROOT, env=os.environ | environment, timeout=timeout, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        code, output = run.returncode, run.stdout
    except subprocess.TimeoutExpired as error:
        code, output = 124, (error.stdout or b"").decode(errors="replace")
    print(output[-6000:], flush=True)
    return {"name": name, "passed": code == 0, "code": code, "seconds": round(time.monotonic() - start, 1),
            "tail": output[-2000:]}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.3, help="time per bench case")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: needs an NVIDIA GPU that torch can use, got none", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name()
    python, env = sys.executable, {"PYTHONPATH": str(ROOT)}
    benches = ROOT / "bench/out/gpu.json"
    benches.parent.mkdir(parents=True, exist_ok=True)
    steps = [step("build", [python, "setup.py", "-q", "build_ext", "--inplace"], 240, PYVIDX_CUDA="1")]
    if steps[0]["passed"]:
        pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        steps.append(step("info", [python, "-m", "pyvidx.info", "--json"], 60, **env))
        here = [*pytest, "tests", "-m", "not slow", *(f"--ignore=tests/{name}.py" for name in NOT_HERE)]
        steps.append(step("tests", here, 240, **env))
        if (sanitizer := shutil.which("compute-sanitizer") or _beside_nvcc()) is not None:
            for tool in SANITIZERS:
                command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *pytest]
                chosen = f"cuda and (forward or backward) and {SANITIZED_OPS}"
                steps.append(step(tool, [*command, "tests/ops", "-k", chosen, "-m", "not slow"], 90, **env))
        else:
            steps.append({"name": "compute-sanitizer", "passed": False, "code": 127, "seconds": 0, "tail": "not found"})
        bench = [*pytest, "bench", "--device", "cuda", "--seconds", str(options.seconds), f"--benchmark-json={benches}"]
        steps.append(step("bench", bench, 240, **env))
    result = {
        "gpu": gpu,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True, capture_output=True).stdout.strip(),
        "steps": steps,
        "cases": [b["extra_info"] for b in json.loads(benches.read_text())["benchmarks"]] if benches.exists() else [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{re.sub('[^a-z0-9]+', '-', gpu.lower())}-{result['date']}.json"
    file.write_text(json.dumps(result, indent=1))
    print(f"\nwrote {file}")
    for s in steps:
        print(f"{'passed' if s['passed'] else 'FAILED':7} {s['seconds']:7.1f} s  {s['name']}")
    return 0 if all(s["passed"] for s in steps) else 1


def _beside_nvcc() -> str | None:
    path = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/compute-sanitizer"
    return str(path) if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
