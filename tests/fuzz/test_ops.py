"""A sample of tests/fuzz/ops.py, and the proof that it would see a fault."""

import platform
import shutil
import signal
import subprocess
import sys

import pytest

from pyvidx.ops._library import LOAD_ERROR, REFERENCES
from tests.fuzz import ops as fuzz
from tests.fuzz.ops_cases import RAW
from tests.fuzz.ops_entries import entries

needs_guard = pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which("gcc") is None or LOAD_ERROR is not None,
    reason="the allocator is for glibc and needs gcc; without kernels there is nothing to guard",
)

# Reads one float behind a tensor, or before one.
PLANTED = """
import ctypes, sys, torch
tensors = [torch.zeros(5) for _ in range(4)]
start = [t for t in tensors if (t.data_ptr() % 4096 == 0) == (sys.argv[1] == "-1")][0].data_ptr()
assert torch.isnan(torch.empty(3)).all()
print("planted", flush=True)
ctypes.c_float.from_address(start + 4 * int(sys.argv[1])).value
"""


def test_every_op_and_function_is_there():
    import pyvidx.ops

    assert set(RAW) == set(REFERENCES)
    functions = {name for name in pyvidx.ops.__all__ if name[0].islower()}
    assert {name for name in entries() if "::" not in name} == functions


@needs_guard
@pytest.mark.parametrize("element", [5, -1])
def test_a_planted_fault_is_seen(element, tmp_path):
    guard = fuzz.build_guard(tmp_path)
    command = [sys.executable, "-c", PLANTED, str(element)]
    child = subprocess.run(command, env=fuzz.environment(guard), capture_output=True, text=True)
    assert child.returncode == -signal.SIGSEGV and child.stdout == "planted\n", child.stderr


@needs_guard
def test_a_sample():
    result = fuzz.fuzz(400, "sample", modes=("eager",) * 39 + ("compiled",))
    assert result["calls"] == 400 and result["findings"] == []
    assert result["outcomes"]["eager"]["right"] > 100 and result["outcomes"]["eager"]["refused"] > 100
