"""Does the library built here run on other versions of torch? python cmake/abi_check.py 2.10.0 2.11.0

Makes a virtual environment per version (several GB each: these are CUDA builds), loads pyvidx/_ops.abi3.so as it is,
and runs the op tests. Prints one line per version; exit code 1 if any fails.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["numpy", "safetensors", "pytest", "pytest-timeout", "pytest-benchmark", "hypothesis"]
PROBE = """
import torch, pyvidx.ops
from pyvidx.ops import _library as l
assert l.LOAD_ERROR is None, l.LOAD_ERROR
have = {d: sum(l.has_kernel(n, d) for n in l.REFERENCES) for d in ("cpu", "cuda")}
print(f"torch {torch.__version__}: of {len(l.REFERENCES)} ops {have['cpu']} have CPU and {have['cuda']} CUDA kernels")
"""


def check(version: str) -> bool:
    python = ROOT / "build/abi" / version / "bin/python"
    if not python.exists():
        subprocess.check_call([sys.executable, "-m", "venv", python.parents[1]])
        subprocess.check_call([python, "-m", "pip", "install", "-q", f"torch=={version}", *PACKAGES])
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    probe = subprocess.run([python, "-c", PROBE], cwd=ROOT, env=env, text=True, capture_output=True)
    tests = subprocess.run([python, "-m", "pytest", "tests/ops", "-q", "-p", "no:cacheprovider"], cwd=ROOT, env=env,
                           text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    counts = re.findall(r"\d+ (?:passed|failed|error|skipped)[^\n]*", tests.stdout)
    print(f"{probe.stdout.strip() or probe.stderr.strip()}; op tests: {counts[-1] if counts else tests.stdout[-500:]}")
    return probe.returncode == 0 and tests.returncode == 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(0 if all([check(version) for version in sys.argv[1:]]) else 1)
