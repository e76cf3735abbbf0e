"""How ops come to life: kernels where they are built, references where they are not, errors on demand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyvidx.ops  # noqa: F401
from pyvidx.cli import info
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


def test_without_the_library_references_run_and_say_so_once():
    run = python(USE + "import pyvidx.models", PYVIDX_OPS_LIBRARY="/nowhere/_ops.so")
    assert run.returncode == 0 and run.stdout.strip() == "3.0", run.stderr
    assert run.stderr.count("RuntimeWarning: pyvidx has no compiled kernels here") == 1, run.stderr


def test_info_without_the_library():
    run = python("from pyvidx.cli.info import main; main([])", PYVIDX_OPS_LIBRARY="/nowhere/_ops.so")
    assert "NO COMPILED KERNELS, every op runs its reference: /nowhere/_ops.so does not exist" in run.stdout
    assert "built with: nothing compiled" in run.stdout and "level unknown" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize(
    "built_for, pinned, why",
    [
        ("+cu130", "{torch}", "is a build for CUDA 13.0, and torch {torch}"),
        ("+cpu", "2.0.0", "needs torch 2.0.0, and this is {torch}"),
        ("+cpu", "{torch}", None),
    ],
)
def test_a_torchvision_that_does_not_fit_is_named(built_for, pinned, why, monkeypatch, tmp_path):
    from pyvidx.hosts import importing

    if torch.version.cuda is not None:
        pytest.skip("written for a torch without CUDA")
    release = torch.__version__.split("+")[0]
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").touch()
    (tmp_path / "torchvision/version.py").write_text(f"__version__ = '0.99.0{built_for}'\n")
    metadata = tmp_path / "torchvision-0.99.0.dist-info"
    metadata.mkdir()
    metadata.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99.0\n"
        f"Requires-Dist: torch (=={pinned.format(torch=release)})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    said = importing.torchvision_misfit()
    if why is None:
        assert said is None
    else:
        assert said.startswith("torchvision 0.99.0 " + why.format(torch=release)) and "--index-url" in said
    with pytest.raises(RuntimeError, match=r"test: host cannot be imported: torchvision 0\.99\.0"):
        with importing.importing("test", "host"):
            raise RuntimeError("operator torchvision::nms does not exist")


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
        assert (
            python("from pyvidx.ops import _library; print(_library.isa())", PYVIDX_ISA=level).stdout.strip() == level
        )
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


@pytest.mark.parametrize("built, sm, runs", [
    ("80 90", "70", "error"), ("70 90", "80", "error"), ("80", "86", "kernel"), ("80 90", "120", "kernel"),
])  # fmt: skip
def test_a_gpu_that_the_build_has_no_code_for_is_told(built, sm, runs, monkeypatch):
    """Binary code runs on its major version from its minor on; the newest architecture's PTX on all that came later."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_library, "has_kernel", lambda *_: True)
    monkeypatch.setattr(_library, "build", lambda: {"compiler": "g++", "torch": "2", "cuda_archs": built.split()})
    monkeypatch.setattr(info, "_gpus", lambda: [{"name": "a GPU", "sm": sm, "memory_gib": 16.0}])
    report = collect()
    assert report["ops"]["token_gather"]["cuda"]["runs"] == runs and f"a GPU (sm_{sm}, 16.0 GiB)" in as_text(report)
    why = report["ops"]["token_gather"]["cuda"]["why"]
    assert why == ("compiled kernel" if runs == "kernel" else f"this build has no code for sm_{sm}: rebuild with "
                   "PYVIDX_CUDA_ARCHS")  # fmt: skip
