"""Build the torch extension with the CUDA kernels running in the emulator, on CPU tensors.

csrc/cuda/*.cu and csrc/torch/*.cpp are compiled by g++ with -DPYVIDX_EMU; pyvidx loads the result in place of its own
library when PYVIDX_OPS_LIBRARY names it. Variants:

    plain   fast; the emulator's own checks
    asan    AddressSanitizer and UndefinedBehaviorSanitizer: out of bounds, misaligned, overflowing
    tsan    ThreadSanitizer with every CUDA thread a thread: missing barriers

    python tests/cuda_emu/build.py [variant ...]     builds incrementally, prints the paths
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "cmake"))

import native_build as native  # noqa: E402

SANITIZE = {
    "plain": ["-O2"],
    "asan": ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O1", "-fno-omit-frame-pointer", "-fsanitize=thread"],
}
ENGINE = {"plain": [], "asan": ["-DCUEMU_ASAN"], "tsan": ["-DCUEMU_TSAN"]}
RUNTIME = {"plain": [], "asan": ["-fsanitize=address,undefined"], "tsan": ["-fsanitize=thread"]}


def _flags() -> list[str]:
    # Kernels read memory through types of their own (uint4), which nvcc allows; symbols must be this library's own and
    # in its symbol table, where the emulator looks for shared variables.
    flags = ["-std=c++17", "-g1", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique", "-fvisibility=hidden"]
    flags += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-unused-variable"]
    flags += ["-DPYVIDX_EMU", "-Itests/cuda_emu", "-Icsrc/cuda", *native.INCLUDE]
    return flags + [f"-isystem {native.cuda_headers()}"]


def _engine(build: native.Build, variant: str) -> list[Path]:
    flags = [*_flags(), "-O2", *ENGINE[variant]]  # what is tested is instrumented, the engine is not
    names = ("engine", "threads", "runtime", "shared_memory")
    return [build.compile(ROOT / f"tests/cuda_emu/{name}.cpp", flags) for name in names]


def ops_library(variant: str) -> Path:
    """Build the emulated counterpart of pyvidx/_ops.abi3.so; its path."""
    build = native.Build(ROOT / "build/emu" / variant)
    flags = _flags() + SANITIZE[variant]
    objects = _engine(build, variant)
    objects += [build.compile(s, ["-x c++", *flags]) for s in native.sources("cuda", "cu")]
    objects += [build.compile(s, flags) for s in native.sources("common")]
    objects += [build.compile(s, flags + native.torch_flags()) for s in native.sources("torch")]
    out = build.folder / f"_ops_emu_{variant}.so"
    build.link(out, objects, RUNTIME[variant] + native.torch_link_flags() + ["-ldl"])
    build.run()
    return out


def faults_library(variant: str) -> Path:
    """Build faults.cu, the kernels with planted bugs that test the emulator itself; its path."""
    build = native.Build(ROOT / "build/emu" / f"{variant}_faults")
    objects = _engine(build, variant)
    objects.append(build.compile(ROOT / "tests/cuda_emu/faults.cu", ["-x c++", *_flags(), *SANITIZE[variant]]))
    out = build.folder / f"faults_{variant}.so"
    build.link(out, objects, RUNTIME[variant] + ["-ldl"])
    build.run()
    return out


if __name__ == "__main__":
    for name in sys.argv[1:] or ["plain"]:
        print(ops_library(name))
