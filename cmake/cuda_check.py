"""make cuda-check: compile every CUDA kernel for every architecture of build.json; registers, spills, shared memory.

    python cmake/cuda_check.py [--archs 75 90] [--sources FOLDER] [--jobs N]

nvcc compiles for the architectures it knows; those it no longer knows (sm_70 with CUDA 13) are compiled by NVRTC 12.9,
which is fetched from PyPI into build/nvrtc when it is missing. Needs no GPU. A kernel that spills registers or keeps
arrays in local memory fails the check unless build.json names it under "local_memory_allowed", with the reason.
Results are cached by content, so that a second run takes no time, and written to build/cuda_resources.json.
"""

import argparse
import ctypes
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import native_build as native  # noqa: E402
import ptxas  # noqa: E402

ROOT = native.ROOT
CACHE = ROOT / "build/cuda_check"
NVRTC_HOME = ROOT / "build/nvrtc"
# NVRTC has no standard library. The same types as in pyvidx/view.h.
NVRTC_HEADERS = {
    "cstdint": "using int8_t = signed char; using int32_t = int; using int64_t = long long;"
    "using uint8_t = unsigned char; using uint16_t = unsigned short; using uint32_t = unsigned int;"
    "using uint64_t = unsigned long long;"
}
NVRTC_PACKAGES = ["nvidia-cuda-nvrtc-cu12==12.9.*", "nvidia-cuda-runtime-cu12==12.9.*"]

Resources = dict[str, dict[str, dict[str, int]]]  # kernel -> architecture -> what ptxas.parse gives


class CompileError(Exception):
    """A kernel file does not compile; the message is the compiler's."""


def cached(key: str, compile_log) -> str:
    """The log under this key, made by compile_log() if there is none."""
    path = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.log"
    if not path.exists():
        log = compile_log()
        CACHE.mkdir(parents=True, exist_ok=True)
        path.write_text(log)
    return path.read_text()


def text_of(source: Path) -> str:
    """The source and all headers it could include."""
    headers = sorted([*(ROOT / "csrc/cuda").glob("*.cuh"), *(ROOT / "csrc/include").rglob("*.h")])
    return source.read_text() + "".join(h.read_text() for h in headers)


# ---- nvcc ----


def compile_with_nvcc(nvcc: str, version: str, source: Path, arch: str, whole: bool) -> str:
    """ptxas' log. whole: the host code too; it is the same for all architectures."""
    flags = [
        *native.CONFIG["nvcc_flags"],
        *native.INCLUDE,
        "-Icsrc/cuda",
        "-Xptxas=-v",
        "-Werror=all-warnings",
        "-c" if whole else "-cubin",
    ]
    flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")

    def run() -> str:
        with tempfile.TemporaryDirectory() as folder:
            command = [nvcc, *flags, str(source), "-o", f"{folder}/object"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise CompileError(f"{source.name} for sm_{arch} (nvcc):\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    return cached("\n".join([version, *flags, source.name, text_of(source)]), run)


# ---- NVRTC ----


def nvrtc_library() -> ctypes.CDLL:
    """NVRTC 12.9, installed from PyPI if it is not there yet."""
    path = NVRTC_HOME / "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(NVRTC_HOME)]
        done = subprocess.run(pip + NVRTC_PACKAGES, capture_output=True, text=True)
        if done.returncode != 0:
            raise CompileError(f"cuda_check: could not install {' '.join(NVRTC_PACKAGES)}:\n{done.stderr}")
    library = ctypes.CDLL(str(path))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def strings(items: Iterable[str]) -> ctypes.Array:
    """As C wants them: const char*[]."""
    encoded = [item.encode() for item in items]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def nvrtc(text: str, name: str, arch: str, kernels: list[str]) -> tuple[str, bytes]:
    """ptxas' log and the cubin of a source. kernels: the instantiations wanted, as C++ names."""
    library = nvrtc_library()
    flags = nvrtc_flags(arch)
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), name.encode(), len(NVRTC_HEADERS), strings(NVRTC_HEADERS.values()),
        strings(NVRTC_HEADERS)
    )  # fmt: skip
    for kernel in kernels:
        library.nvrtcAddNameExpression(program, kernel.encode())
    code = library.nvrtcCompileProgram(program, len(flags), strings(flags))

    def fetched(what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{what}")(program, data)
        return data.raw

    log = fetched("ProgramLog").rstrip(b"\0").decode()
    cubin = fetched("CUBIN") if code == 0 else b""
    library.nvrtcDestroyProgram(ctypes.byref(program))
    if code != 0:
        raise CompileError(f"{name} for sm_{arch} (NVRTC): {library.nvrtcGetErrorString(code).decode()}\n{log}")
    return log, cubin


def nvrtc_flags(arch: str) -> list[str]:
    include = [ROOT / "csrc/include", ROOT / "csrc/cuda", NVRTC_HOME / "nvidia/cuda_runtime/include"]
    # default-device: the entry points of the headers are declared without __host__.
    return [
        "--std=c++17",
        "-default-device",
        "--ptxas-options=-v",
        f"--gpu-architecture=sm_{arch}",
        *(f"-I{p}" for p in include),
    ]


def compile_with_nvrtc(source: Path, arch: str, kernels: list[str]) -> str:
    """The same log for an architecture that nvcc no longer knows. kernels: the instantiations wanted, as C++ names."""
    key = "\n".join([*NVRTC_PACKAGES, *nvrtc_flags(arch), *kernels, source.name, text_of(source)])
    return cached(key, lambda: nvrtc(source.read_text(), source.name, arch, kernels)[0])


# ---- all of it ----


def check(sources: list[Path], archs: list[str], jobs: int) -> tuple[Resources, list[str]]:
    """Compile everything; what the kernels use, and the errors of what did not compile."""
    nvcc = native.installed_nvcc()
    if nvcc is None:
        sys.exit("cuda_check: needs nvcc, got none in CUDA_HOME, /usr/local/cuda or PATH")
    version = subprocess.check_output([nvcc, "--version"], text=True)
    known = native.known_archs(nvcc)
    by_nvcc = [a for a in archs if a in known]
    if not by_nvcc:
        sys.exit(f"cuda_check: at least one architecture must be known to {nvcc}, got {' '.join(archs)}")

    def with_names(source: Path, arch: str, first: Future) -> str:
        kernels = ptxas.demangle(sorted(ptxas.parse(first.result())))
        return compile_with_nvrtc(source, arch, kernels)

    with ThreadPoolExecutor(jobs) as pool:
        tasks = {}
        for arch in by_nvcc:  # these come first, so that those below never wait for one that cannot start
            for source in sources:
                whole = arch == by_nvcc[0]
                tasks[source, arch] = pool.submit(compile_with_nvcc, nvcc, version, source, arch, whole)
        for arch in [a for a in archs if a not in known]:
            for source in sources:
                tasks[source, arch] = pool.submit(with_names, source, arch, tasks[source, by_nvcc[0]])
    resources: Resources = {}
    errors = []
    for task in tasks.values():
        try:
            log = task.result()
        except CompileError as error:
            errors.append(str(error))
            continue
        found = ptxas.parse(log)
        for kernel, per_arch in zip(ptxas.demangle(list(found)), found.values()):
            resources.setdefault(kernel, {}).update(per_arch)
    return dict(sorted(resources.items())), list(dict.fromkeys(errors))


def table(resources: Resources, archs: list[str]) -> str:
    """Registers per architecture, then the bytes of spills and of local arrays if there are any."""

    def cell(used: dict[str, int] | None) -> str:
        if used is None:
            return "-"
        extra = f" spill {used['spills']}" if used["spills"] else f" local {used['local']}" if used["local"] else ""
        return f"{used['registers']}{extra}"

    rows = [["kernel: registers for", *(f"sm_{a}" for a in archs), "shared bytes"]]
    for kernel, per_arch in resources.items():
        shared = sorted({used["shared"] for used in per_arch.values()})
        cells = [cell(per_arch.get(a)) for a in archs]
        rows.append([kernel.removeprefix("pyvidx::cuda::"), *cells, "-".join(map(str, shared))])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [[c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def offenders(resources: Resources, allowed: dict[str, str]) -> list[str]:
    """Kernels that use local memory and are not listed, and listed ones that do not exist or no longer do."""
    uses = {k: sorted(a for a, used in per.items() if used["spills"] or used["local"]) for k, per in resources.items()}
    found = []
    for kernel, archs in uses.items():
        if archs and not any(re.search(pattern, kernel) for pattern in allowed):
            found.append(f"{kernel} uses local memory on sm_{', sm_'.join(archs)}")
    for pattern in allowed:
        if not any(archs and re.search(pattern, kernel) for kernel, archs in uses.items()):
            found.append(f"local_memory_allowed in build.json lists {pattern!r}, which no kernel needs")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=native.CONFIG["cuda_archs"])
    parser.add_argument("--sources", type=Path, default=ROOT / "csrc/cuda", help="folder of the .cu files")
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    options = parser.parse_args()

    resources, errors = check(sorted(options.sources.glob("*.cu")), options.archs, options.jobs)
    print(table(resources, options.archs))
    ours = options.sources == ROOT / "csrc/cuda"
    whole = ours and options.archs == native.CONFIG["cuda_archs"]
    if whole and not errors:
        (ROOT / "build/cuda_resources.json").write_text(json.dumps(resources, indent=1) + "\n")
    if not errors:
        gaps = [(k, a) for k, per in resources.items() for a in options.archs if a not in per]
        errors += [f"{kernel} was not compiled for sm_{arch}" for kernel, arch in gaps]
    allowed = native.CONFIG.get("local_memory_allowed", {}) if ours else {}
    errors += [e for e in offenders(resources, allowed) if whole or "build.json lists" not in e]
    if not resources and not errors:
        errors.append(f"no kernels in {options.sources}")
    for error in errors:
        print(f"\ncuda_check: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
