"""The emulator of tests/cuda_emu: it finds planted bugs and reports nothing else, and the ops' own tests pass in it.

`pytest -m "not slow"` takes a sample of the op tests to the sanitizers; without it, all of them under every schedule.
"""

import ctypes
import json
import math
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_emu import build, run

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches fibers in x86-64 assembly"),
    pytest.mark.skipif(build.native.cuda_headers() is None, reason="no CUDA headers in CUDA_HOME or /usr/local/cuda"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ and its sanitizers"),
]

THREADS = 128
FAULTS = {  # the kernel's correct result, for every thread or per thread
    "out_of_bounds": 1,
    "static_shared_overflow": 1,
    "dynamic_shared_overflow": 1,
    "misaligned": [4 * i for i in range(THREADS)],
    "missing_syncthreads": [THREADS - 1 - i for i in range(THREADS)],
    "missing_syncwarp": [i ^ 1 for i in range(THREADS)],
    "block_sum": 128 * 128 + 8128 + 126 + 77,
    "missing_wait": [THREADS - 1 - i for i in range(THREADS)],
    "wait_for_too_few": [i ^ 32 for i in range(THREADS)],
    "missing_barrier_after_wait": [THREADS - 1 - i for i in range(THREADS)],
    "divergent_barrier": THREADS // 2,
    "partial_barrier": 1,
    "missing_lane": 32,
    "uninitialized_static": 1,
    "uninitialized_dynamic": 1,
    "too_many_threads": 1,
    "shared_memory_not_asked_for": 1,
    "more_shared_memory_than_there_is": -1,
    "launch_not_checked": 1,
    "other_stream": 1,
    "too_many_blocks": 1,
    "tile_sums": 0,
}
ORDERS = ["forward", "reverse", "random:3"]

# Called in a process of its own when a sanitizer has to be loaded first.
CALL = """
import ctypes, json, sys
library, bug, *names = sys.argv[1:]
for name in names:
    out, message = (ctypes.c_float * 128)(*[-1] * 128), ctypes.create_string_buffer(1000)
    failed = ctypes.CDLL(library).run_fault(name.encode(), int(bug), out, message, ctypes.c_size_t(1000))
    print(json.dumps([name, list(out), message.value.decode()]), flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def faults():
    """Built once, so that a compile error is one error."""
    for variant in build.VARIANTS:
        build.faults_library(variant)


def call(name: str, bug: bool) -> tuple[list[float], str]:
    """Outputs and error message of a kernel, in this process."""
    out, message = (ctypes.c_float * THREADS)(*[-1] * THREADS), ctypes.create_string_buffer(1000)
    library = ctypes.CDLL(str(build.faults_library("plain")))
    library.run_fault(name.encode(), int(bug), out, message, ctypes.c_size_t(1000))
    return list(out), message.value.decode()


def call_sanitized(variant: str, bug: bool, *names: str, **environment: str) -> run.Result:
    command = [sys.executable, "-c", CALL, str(build.faults_library(variant)), str(int(bug)), *names]
    return run.run_process(variant, command, environment)


def expected(name: str) -> list[float]:
    value = FAULTS[name]
    return value if isinstance(value, list) else [value] * THREADS


@pytest.mark.parametrize("order", ORDERS)
def test_correct_kernels_pass(order, monkeypatch):
    monkeypatch.setenv("PYVIDX_EMU_ORDER", order)
    for name in FAULTS:
        assert call(name, bug=False) == (expected(name), "")


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_correct_kernels_give_no_report(variant):
    result = call_sanitized(variant, False, *FAULTS)
    assert result.reports == "" and result.returncode == 0, result.reports + result.output
    got = {name: (out, message) for name, out, message in map(json.loads, result.output.splitlines())}
    assert got == {name: (expected(name), "") for name in FAULTS}


@pytest.mark.parametrize(
    "name, message",
    [
        ("divergent_barrier", r"faults.cu:\d+: divergent barrier: other threads wait at tests/cuda_emu/faults.cu:\d+"),
        ("partial_barrier", "returns while others wait at __syncthreads|__syncthreads after a thread .* has returned"),
        ("missing_lane", "shuffle reads a lane that is not in the mask or has returned"),
        ("missing_wait", "the thread returns without having waited for this cp.async"),
        ("too_many_threads", "partial_barrier_kernel: invalid configuration argument"),
        ("shared_memory_not_asked_for", "uninitialized_dynamic_kernel: invalid argument"),
        ("more_shared_memory_than_there_is", "set_max_dynamic_smem: invalid argument"),
        ("other_stream", "partial_barrier_kernel.* is launched on another stream than it was given"),
        ("too_many_blocks", r"partial_barrier_kernel.*at most .* blocks, got \(4294967297, 1, 1\)"),
        ("launch_not_checked", "launch of partial_barrier_kernel.* is not followed by check_launch"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_broken_rules_are_named(name, message, order, monkeypatch):
    monkeypatch.setenv("PYVIDX_EMU_ORDER", order)
    _, got = call(name, bug=True)
    assert re.search(message, got), got
    assert call(name, bug=False) == (expected(name), ""), "and the next launch is not affected"


@pytest.mark.parametrize(
    "name, nans", [("uninitialized_static", THREADS), ("uninitialized_dynamic", 1), ("wait_for_too_few", THREADS)]
)
def test_shared_memory_starts_as_nan(name, nans):
    out, message = call(name, bug=True)
    assert message == "" and sum(math.isnan(v) for v in out) == nans


def test_the_schedule_shows_a_missing_barrier(monkeypatch):
    wrong = []
    for order in ORDERS:
        monkeypatch.setenv("PYVIDX_EMU_ORDER", order)
        wrong.append(call("missing_syncthreads", bug=True)[0] != expected("missing_syncthreads"))
    assert any(wrong)


@pytest.mark.parametrize(
    "variant, name, report",
    [
        ("asan", "out_of_bounds", r"heap-buffer-overflow .*faults.cu:\d+ in .*out_of_bounds_kernel"),
        ("asan", "static_shared_overflow", r"use-after-poison .*faults.cu:\d+ in .*write_one"),
        (
            "asan",
            "dynamic_shared_overflow",
            r"heap-buffer-overflow .*faults.cu:\d+ in .*dynamic_shared_overflow_kernel",
        ),
        ("asan", "misaligned", r"block.cuh:\d+:\d+: runtime error: .* misaligned address"),
        ("tsan", "missing_syncthreads", r"data race .*faults.cu:\d+ in .*missing_syncthreads_kernel"),
        ("tsan", "missing_syncwarp", r"data race .*faults.cu:\d+ in .*missing_syncwarp_kernel"),
        ("tsan", "missing_barrier_after_wait", r"data race [\s\S]*missing_barrier_after_wait_kernel"),
    ],
)
def test_sanitizers_name_the_line(variant, name, report):
    result = call_sanitized(variant, True, name)
    assert result.returncode != 0
    assert re.search(report, result.reports + result.output), result.reports + result.output


def test_tensor_cores_truncate():
    """What a running sum of tiles loses on them, and ours does not."""
    results = [call_sanitized("plain", bug, "tile_sums", PYVIDX_EMU_MMA="tensor_cores") for bug in (True, False)]
    sums = [json.loads(r.output)[1] for r in results]
    assert sums == [[0.0] * THREADS, [64.0] * THREADS]


# ---- the ops' launchers ----


# In a process of its own: the library would put the emulator's kernels in the place of this process' CPU kernels.
EXCEED = """
import ctypes, json, sys
import torch
library = ctypes.CDLL(sys.argv[1])
library.pyvidx_limits.restype = ctypes.c_char_p
for name in library.pyvidx_limits().decode().split("\\n"):
    message = ctypes.create_string_buffer(500)
    library.cuemu_begin_capture()
    refused = library.pyvidx_exceed(name.encode(), message, ctypes.c_size_t(500))
    library.cuemu_end_capture()
    print(json.dumps([name, bool(refused), message.value.decode()]))
"""


def test_launchers_refuse_what_a_launch_cannot_have():
    """Captured, so that nothing runs: what is wrongly taken would be a launch of the wrong size."""
    command = [sys.executable, "-c", EXCEED, str(build.ops_library("plain"))]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    launchers = re.findall(r"void (\w+)_cuda\(", "".join(p.read_text() for p in (ROOT / "csrc/cuda").glob("*.cu")))
    assert {name.split(" of ")[0] for name, *_ in found} == set(launchers)
    for name, refused, text in found:
        assert refused and re.search(r"at most|must be below", text), f"{name}: {text or 'taken'}"


def test_graphs_of_ops_do_all_their_work():
    result = run.run_tests("plain", "forward", ["tests/test_cuda_streams.py"])
    assert result.returncode == 0 and " passed" in result.output, result.output


COUNT = """
import os, torch
import tests.launches as launches
for B, t, n, keys, tabled in ((1, 1, 44, 44 * 21, 0), (1, 1, 32, 2048, 0), (1, 1, 32, 2049, 0), (1, 16, 32, 3000, 1),
                              (2, 1, 300, 5000, 0), (9, 16, 32, 3000, 1)):
    q, rows = torch.zeros(B, t, n, 96), torch.zeros(B, 1, keys, 192)
    table = torch.zeros(B, t, keys, 1, dtype=torch.int32) if tabled else None
    before = len(open(os.environ["PYVIDX_EMU_LOG"]).readlines())
    args = (q, rows, table, None, None, 12, 1.0)
    torch.ops.pyvidx.bank_attention(*args)
    launched = len(open(os.environ["PYVIDX_EMU_LOG"]).readlines()) - before
    assert launched == launches.launches_of_bank_attention(*args), (B, t, n, keys, launched)
    print(launched, end=" ")
"""


def test_launches_of_bank_attention_are_as_tests_launches_counts_them(tmp_path):
    log = tmp_path / "launches"
    log.touch()
    env = {"PYVIDX_OPS_LIBRARY": str(build.ops_library("plain")), "PYVIDX_EMU_LOG": str(log), "PYVIDX_EMU_DRY": "0"}
    done = run.run_process("plain", [sys.executable, "-c", "import pyvidx.ops\n" + COUNT], env)
    assert done.returncode == 0 and done.output.split() == ["1", "1", "2", "2", "2", "1"], done.output


# ---- the ops' own tests ----

NO_KERNEL = "not registration and not compiled and not rejects and not autocast"  # tests that are about Python


def run_ops(variant: str, order: str, *arguments: str, tests: str = NO_KERNEL, **environment: str) -> None:
    arguments = (*run.op_tests(), "-m", "not slow", "-k", tests, *arguments)
    result = run.run_tests(variant, order, list(arguments), environment)
    assert result.returncode == 0 and result.reports == "", result.output + result.reports
    assert " passed" in result.output, result.output


def test_ops_run_every_kernel(tmp_path):
    """All tests of all ops, and every kernel there is was launched by one of them."""
    log = tmp_path / "launches"
    run_ops("plain", "random:1", PYVIDX_EMU_LOG=str(log))
    sources = "".join(p.read_text() for p in (ROOT / "csrc/cuda").glob("*.cu*"))
    kernels = set(re.findall(r"__global__[^;{]*?(\w+_kernel)\(", sources))
    launched = set(re.findall(r"(\w+_kernel)", log.read_text()))
    assert kernels and launched == kernels


MMA_OPS = ["temporal_attention", "bank_attention"]


@pytest.mark.parametrize("sample", ["8", pytest.param("1000000", marks=pytest.mark.slow)])
def test_ops_on_tensor_cores_that_truncate(sample):
    tests = [f"tests/ops/test_{op}.py" for op in MMA_OPS]
    arguments = [*tests, "-m", "not slow", "-k", NO_KERNEL, f"--sample={sample}"]
    result = run.run_tests("plain", "forward", arguments, {"PYVIDX_EMU_MMA": "tensor_cores"})
    assert result.returncode == 0 and " passed" in result.output, result.output


@pytest.mark.parametrize("variant, order", [("asan", "forward"), ("tsan", "reverse")])
def test_ops_under_a_sanitizer(variant, order):
    # Nor what launches one kernel hundreds of times or for megabytes: a race detector sees the same in the first ones.
    once = "not _steps and not gradcheck and not _stream and not threads and not 100000 and not deterministic"
    run_ops(variant, order, "--sample=3", tests=f"{NO_KERNEL} and {once}")


@pytest.mark.slow
@pytest.mark.parametrize("order", ["forward", "reverse", "random:1", "random:2"])
@pytest.mark.parametrize("variant", ["plain", "asan", "tsan"])
def test_ops_under_every_schedule(variant, order):
    run_ops(variant, order)


@pytest.mark.slow
@pytest.mark.parametrize("smem", ["49152", "65536", "232448"])
def test_ops_with_the_tiles_of_other_gpus(smem):
    """Little shared memory as on sm_75, much as on sm_90, none to ask for."""
    run_ops("asan", "random:3", PYVIDX_EMU_SMEM=smem)
