"""cmake/cuda_check.py: every kernel compiles, without spills, for V100 and H100; spills are caught.

test_cuda_link.py does the same for sm_75, whose objects it links.

Compiles for real with nvcc and, for sm_70, NVRTC; `make cuda-check` does all architectures.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "cmake"))

import cuda_check  # noqa: E402
import ptxas  # noqa: E402

pytestmark = pytest.mark.skipif(cuda_check.native.installed_nvcc() is None, reason="no nvcc")

SPILLS = """
#include "block.cuh"
namespace pyvidx::cuda {
// 96 values kept in the 64 registers that a block of 1024 threads leaves each
template <typename T>
__global__ __launch_bounds__(1024) void greedy_kernel(const T* x, T* y) {
  T v[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) y[i * 1024 + threadIdx.x] = v[i] * v[95 - i] + v[(i * 7) % 96];
}
template __global__ void greedy_kernel<float>(const float*, float*);
}
"""
ARRAY = """
#include "block.cuh"
namespace pyvidx::cuda {
__global__ void indexed_kernel(const int* index, float* y) {
  float v[32] = {};
  for (int i = 0; i < 1000; ++i) v[index[i]] += y[i];
  for (int i = 0; i < 32; ++i) y[i] = v[i];
}
}
"""


@pytest.fixture(scope="module")
def v100():
    """sm_70, if the compiler for it can be had."""
    try:
        cuda_check.nvrtc_library()
    except cuda_check.CompileError as error:
        pytest.skip(f"no NVRTC 12.9 here, so sm_70 cannot be compiled: {error}")
    return "70"


def run(archs: list[str], sources: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "cmake/cuda_check.py"), "--archs", *archs, "--sources", str(sources)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("sources", ["csrc/cuda", "tests/cuda_emu"])  # the latter uses all of launch.cuh and block.cuh
def test_kernels_compile_without_spills(sources, v100):
    result = run(["90", v100], ROOT / sources)
    assert result.returncode == 0, result.stdout + result.stderr
    header, *kernels = result.stdout.splitlines()
    assert header.split()[-4:] == ["sm_90", "sm_70", "shared", "bytes"]
    assert kernels and all(int(cell) > 0 for line in kernels for cell in line.split()[-3:-1])


@pytest.mark.parametrize("source, message", [(SPILLS, "spill"), (ARRAY, "local 128")])
def test_local_memory_is_caught(source, message, v100, tmp_path):
    (tmp_path / "planted.cu").write_text(source)
    result = run(["75", v100], tmp_path)
    assert result.returncode == 1
    assert message in result.stdout
    assert "uses local memory on sm_70, sm_75" in result.stderr


@pytest.mark.parametrize("source", ["void broken(", "#ifdef __CUDACC_RTC__\n#error only here\n#endif\n" + ARRAY])
def test_what_does_not_compile_is_caught(source, v100, tmp_path):
    (tmp_path / "planted.cu").write_text(source)
    result = run(["75", v100], tmp_path)
    assert result.returncode == 1
    assert "planted.cu for sm_" in result.stderr and "error" in result.stderr


def test_exceptions_are_listed_with_a_reason_and_needed():
    used = {"registers": 255, "spills": 8, "local": 8, "shared": 0}
    resources = {"pyvidx::cuda::big_kernel<double>": {"75": used, "90": used | {"spills": 0, "local": 0}}}
    assert cuda_check.offenders(resources, {}) == ["pyvidx::cuda::big_kernel<double> uses local memory on sm_75"]
    assert cuda_check.offenders(resources, {"big_kernel<double>": "gradcheck only"}) == []
    (stale,) = cuda_check.offenders(resources, {"big_kernel<double>": "", "small_kernel": ""})
    assert "small_kernel" in stale


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt (binutils)")
def test_names_lose_their_parameters():
    mangled = "_ZN6pyvidx4cuda8k_kernelIfLb1ELNS_5DTypeE2EEEvNS_4ArgsEPKf"
    assert ptxas.demangle([mangled]) == ["pyvidx::cuda::k_kernel<float, true, (pyvidx::DType)2>"]
