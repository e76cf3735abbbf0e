"""Run pytest with pyvidx's CUDA kernels in the emulator.

    python -m tests.cuda_emu.run [--variant plain|asan|tsan] [--order forward|reverse|random[:seed]] [pytest arguments]

A sanitizer must be loaded before Python itself, so the tests always run in a process of their own. Its reports go to
files, which are printed at the end, and fail the run.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.cuda_emu import build

ROOT = Path(__file__).resolve().parents[2]

OPTIONS = {
    "asan": {
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:log_path={log}",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    "tsan": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:report_signal_unsafe=0:exitcode=66:log_path={log}"},
    "plain": {},
}
PRELOAD = {"asan": ["libasan.so", "libubsan.so"], "tsan": ["libtsan.so"], "plain": []}


@dataclass
class Result:
    returncode: int
    output: str
    reports: str  # what the sanitizers wrote to files; UndefinedBehaviorSanitizer writes to the output


def run_process(variant: str, command: list[str], environment: dict[str, str], timeout: float = 3600) -> Result:
    """Run a command under the sanitizer of a variant."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        for name, value in OPTIONS[variant].items():
            env[name] = value.format(log=f"{folder}/report")
        if PRELOAD[variant]:
            env["LD_PRELOAD"] = " ".join(_library(name) for name in PRELOAD[variant])
        if variant == "tsan" and shutil.which("setarch"):
            # ThreadSanitizer's shadow memory does not fit newer kernels' address space randomization.
            if subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode == 0:
                command = ["setarch", "-R", *command]
        done = subprocess.run(
            command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
        )
        reports = "".join(p.read_text() for p in sorted(Path(folder).iterdir()))
    return Result(done.returncode, done.stdout, reports)


def _library(name: str) -> str:
    return subprocess.check_output([os.environ.get("CXX", "g++"), f"-print-file-name={name}"], text=True).strip()


def run_tests(variant: str, order: str, arguments: list[str], environment: dict[str, str] | None = None) -> Result:
    """Run pytest in a process whose torch.ops.pyvidx.* are the emulated CUDA kernels."""
    env = {"PYVIDX_OPS_LIBRARY": str(build.ops_library(variant)), "PYVIDX_EMU_ORDER": order, "PYVIDX_STRICT": "1"}
    env["CUDA_VISIBLE_DEVICES"] = ""  # this library has no kernels for a real GPU
    # Not captured: a sanitizer that ends the process would take what pytest has captured with it.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--capture=no", *arguments]
    return run_process(variant, command, {**env, **(environment or {})})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=list(PRELOAD), default="plain")
    parser.add_argument("--order", default="forward", help="forward, reverse, random or random:<seed>")
    options, arguments = parser.parse_known_args()
    result = run_tests(options.variant, options.order, arguments or ["tests/ops"])
    print(result.output)
    if result.reports:
        print(result.reports)
    return result.returncode or bool(result.reports)


if __name__ == "__main__":
    sys.exit(main())
