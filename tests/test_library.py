"""How ops come to life: kernels where they are built, references where they are not, errors on demand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyvidx.ops  # noqa: F401
from pyvidx.cli.info import as_text, collect
from pyvidx.ops import _library

ROOT = Path(__file__).parents[1]
USE = """
import torch
from pyvidx.ops import token_gather
print(token_gather(torch.ones(1, 1, 2, 3), torch.tensor([[1]])).sum().item())
"""


def python(code: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, text=True,
                          capture_output=True)  # fmt: skip


def test_every_op_has_a_cpu_kernel():
    assert _library.LOAD_ERROR is None
    missing = [name for name in _library.REFERENCES if not _library.has_kernel(name, "cpu")]
    assert not missing, f"these run their reference on the CPU: {missing}"


def test_without_the_library_references_run():
    run = python(USE, PYVIDX_OPS_LIBRARY="/nowhere/_ops.so")
    assert run.returncode == 0 and run.stdout.strip() == "3.0", run.stderr


def test_strict_refuses_references():
    run = python(USE, PYVIDX_OPS_LIBRARY="/nowhere/_ops.so", PYVIDX_STRICT="1")
    assert run.returncode != 0
    assert "token_gather: PYVIDX_STRICT=1" in run.stderr and "/nowhere/_ops.so does not exist" in run.stderr


def test_strict_allows_kernels():
    assert python(USE, PYVIDX_STRICT="1").stdout.strip() == "3.0"


@pytest.mark.parametrize("level, message", [("v9", "must be v2, v3, v4 or v4bf16"), ("v2", None)])
def test_forced_instruction_set(level, message):
    run = python(USE, PYVIDX_ISA=level)
    if message is None:
        assert run.stdout.strip() == "3.0", run.stderr
        assert python("from pyvidx import _C; print(_C.isa())", PYVIDX_ISA=level).stdout.strip() == level
    else:
        assert run.returncode != 0 and message in run.stderr


def test_info():
    info = collect()
    assert set(info["ops"]) == set(_library.REFERENCES)
    assert all(on["cpu"] == {"runs": "kernel", "why": "compiled kernel"} for on in info["ops"].values())
    text = as_text(info, kernels=True)
    assert all(name in text for name in info["ops"])
    run = subprocess.run([sys.executable, "-m", "pyvidx", "info", "--json"], cwd=ROOT, text=True, capture_output=True)
    assert json.loads(run.stdout)["torch"] == torch.__version__


def test_import_of_the_package_does_no_work():
    run = python("import sys, pyvidx; print('torch' in sys.modules)")
    assert run.stdout.strip() == "False", run.stderr
