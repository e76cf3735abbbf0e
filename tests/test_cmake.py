"""The kernels as a C++ library: build, install, find_package from another project, run its program."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def cmake(*arguments) -> None:
    run = subprocess.run(["cmake", *map(str, arguments)], cwd=ROOT, text=True, capture_output=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake 3.20")
@pytest.mark.parametrize("shared", [pytest.param("OFF", marks=pytest.mark.slow), "ON"])
def test_installed_package(shared, tmp_path):
    build, prefix = ROOT / "build" / f"cmake-shared-{shared}", tmp_path / "prefix"
    cmake("-S", "cmake", "-B", build, f"-DBUILD_SHARED_LIBS={shared}", "-DCMAKE_BUILD_TYPE=Debug")
    cmake("--build", build, "--parallel", 2)
    cmake("--install", build, "--prefix", prefix)
    cmake("-S", "cmake/example", "-B", tmp_path / "example", f"-DCMAKE_PREFIX_PATH={prefix}")
    cmake("--build", tmp_path / "example")
    text = subprocess.check_output([tmp_path / "example/example"], text=True)
    assert text.rstrip().endswith("right")
