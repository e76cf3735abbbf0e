"""Build the torch extension with the CUDA kernels running in the emulator, on CPU tensors.

csrc/cuda/*.cu and csrc/torch/*.cpp are compiled by g++ with -DPYVIDX_EMU; pyvidx loads the result in place of its own
library when PYVIDX_OPS_LIBRARY names it. Variants:

    plain   fast; the emulator's own checks
    asan    AddressSanitizer and UndefinedBehaviorSanitizer: out of bounds, misaligned, overflowing
    tsan    ThreadSanitizer with every CUDA thread a thread: missing barriers

    python -m tests.cuda_emu.build [variant ...]     builds incrementally, prints the paths
"""

import functools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "cmake"))

import native_build as native  # noqa: E402

# Flags of the kernels; of the engine, which is not what is tested and only tells the sanitizer of its fibers; and of
# linking.
VARIANTS = {
    "plain": (["-O2"], ["-O2"], []),
    "asan": (
        ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
        ["-O2", "-DCUEMU_ASAN"],
        ["-fsanitize=address,undefined"],
    ),
    "tsan": (["-O1", "-fno-omit-frame-pointer", "-fsanitize=thread"], ["-O2", "-DCUEMU_TSAN"], ["-fsanitize=thread"]),
}
ENGINE = ["engine", "threads", "runtime", "graphs", "shared_memory"]


def _flags() -> list[str]:
    # Kernels read memory through types of their own (uint4), which nvcc allows; symbols must be this library's own and
    # in its symbol table, where the emulator looks for shared variables.
    flags = ["-std=c++17", "-g1", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique", "-fvisibility=hidden"]
    flags += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-unused-variable"]
    flags += [f"-ffile-prefix-map={ROOT}/=", "-DPYVIDX_EMU", "-Itests/cuda_emu", "-Icsrc/cuda", *native.INCLUDE]
    return [*flags, f"-isystem {native.cuda_headers()}"]


def ops() -> list[str]:
    """The ops that have CUDA kernels."""
    return [s.stem for s in native.sources("torch") if (ROOT / f"csrc/cuda/{s.stem}.cu").exists()]


def _library(name: str, variant: str, kernels: list[Path], torch: bool) -> Path:
    flags, (kernel, engine, link) = _flags(), VARIANTS[variant]
    build = native.Build(ROOT / "build/emu" / name)
    objects = [build.compile(ROOT / f"tests/cuda_emu/{e}.cpp", flags + engine, tag=variant) for e in ENGINE]
    link = [*link, "-ldl"]
    if torch:  # the same for all variants: they hold no kernels, and torch's headers take long to compile
        bindings = native.sources("torch")
        objects += [build.compile(s, [*flags, "-O1", *native.torch_flags()]) for s in bindings]
        objects += [build.compile(s, [*flags, "-O1"]) for s in native.sources("common")]
        objects.append(build.compile(ROOT / "tests/cuda_emu/limits.cpp", [*flags, "-O1"]))
        link += native.torch_link_flags()
    # Last, so that no small variable fills the red zone behind a kernel's shared memory.
    objects += [build.compile(s, ["-x c++", *flags, *kernel], tag=variant) for s in kernels]
    out = build.folder / f"{name}_{variant}.so"
    build.link(out, objects, link)
    build.run()
    return out


@functools.cache
def ops_library(variant: str) -> Path:
    """Build the emulated counterpart of pyvidx/_ops.abi3.so; its path."""
    return _library("ops", variant, native.sources("cuda", "cu"), torch=True)


@functools.cache
def faults_library(variant: str) -> Path:
    """Build faults.cu, the kernels with planted bugs that test the emulator itself; its path."""
    return _library("faults", variant, [ROOT / "tests/cuda_emu/faults.cu"], torch=False)


if __name__ == "__main__":
    for name in sys.argv[1:] or ["plain"]:
        print(ops_library(name))
