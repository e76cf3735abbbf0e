"""Nothing on the way of a CUDA tensor waits for the host, or has a size that depends on what a tensor holds: otherwise
the GPU runs dry between launches, and CUDA graphs cannot be captured. Shown without a GPU, see tests/no_sync.py."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from tests.cuda_emu.build import native

ROOT = Path(__file__).parents[1]


def one_gpu_that_does_nothing() -> dict[str, str]:
    """What makes a CPU build of torch take fake CUDA tensors through autograd; a CUDA build does so by itself."""
    if torch.version.cuda is not None:
        return {}
    build = native.Build(ROOT / "build/no_gpu")
    flags = ["-std=c++20", "-O0", "-g0", "-fPIC", *(f"-isystem {p}" for p in cpp_extension.include_paths())]
    library = build.folder / "no_gpu.so"
    build.link(library, [build.compile(ROOT / "tests/cuda_emu/no_gpu.cpp", flags)], native.torch_link_flags())
    build.run()
    return {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": os.pathsep.join(cpp_extension.library_paths())}


@pytest.mark.skipif(platform.system() != "Linux" or shutil.which("g++") is None, reason="needs Linux and g++")
def test_no_sync():
    files = ("tests/no_sync.py", "tests/hosts/no_sync.py", "tests/launches.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    env = os.environ | one_gpu_that_does_nothing()
    run = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]
