"""SASS, registers and shared memory of single kernels, compiled by NVRTC 12.9 for any GPU from V100 on, in seconds."""

import hashlib
import importlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pyvidx.bench import sass
from pyvidx.files import write_json

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build/predict"
# Where the flags of an ELF header stand; nvdisasm 13 takes code of sm_70 if they say that it is of sm_75.
FLAGS_AT, FLAGS_70, FLAGS_75 = 48, 0x460546, 0x4B054B
DISASSEMBLE = ("-hex",)


@dataclass
class Compiled:
    kernel: sass.Kernel
    registers: int
    shared: int  # bytes, static
    spills: int


def check_tools() -> None:
    """What compiling and disassembling needs.

    Raises:
        FileNotFoundError: this is an installed package: there are no sources.
        RuntimeError: nvdisasm or c++filt is missing.
    """
    if not (ROOT / "csrc/cuda").is_dir() or not (ROOT / "cmake/cuda_check.py").exists():
        raise FileNotFoundError(
            "predict: needs a checkout of pyvidx with csrc/ and cmake/, since it compiles the kernels"
        )
    nvdisasm()
    if shutil.which("c++filt") is None:
        raise RuntimeError("predict: needs c++filt (binutils)")


def nvdisasm() -> str:
    """nvdisasm of PATH, CUDA_HOME, or the package nvidia-cuda-nvdisasm.

    Raises:
        RuntimeError: it is nowhere.
    """
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), *(f"{p}/nvidia/cu*" for p in sys.path if p)]
    found = shutil.which("nvdisasm") or next(
        (str(p) for home in homes for p in sorted(Path("/").glob(f"{home}/bin/nvdisasm".lstrip("/")))), None
    )
    if found is None:
        raise RuntimeError("predict: needs nvdisasm: pip install nvidia-cuda-nvdisasm, or a CUDA toolkit in CUDA_HOME")
    return found


def compiled(symbol: str, arch: int) -> Compiled:
    """One kernel.

    Args:
        symbol: its mangled name.
        arch: 70, 80, 90.

    Raises:
        RuntimeError: it does not compile.
    """
    cuda_check, ptxas = tools()
    text = source_of(symbol)
    headers = cuda_check.text_of(ROOT / "csrc/include/pyvidx/view.h")
    how = [*DISASSEMBLE, *cuda_check.nvrtc_flags(str(arch)), *cuda_check.NVRTC_PACKAGES]
    key = [symbol, str(arch), text, headers, *how]
    path = CACHE / f"{hashlib.sha256(chr(10).join(key).encode()).hexdigest()[:24]}.json"
    name = ptxas.demangle([symbol])[0]
    if not path.exists():
        try:
            log, cubin = cuda_check.nvrtc(text, "predicted.cu", str(arch), [name])
        except cuda_check.CompileError as error:
            raise RuntimeError(f"predict: {name} does not compile: {error}") from error
        write_json(path, {"log": log, "sass": disassembled(cubin)})
    found = json.loads(path.read_text())
    # int64_t is another type for NVRTC than for g++, and so in the names.
    kernels, used = sass.parse(found["sass"]), ptxas.parse(found["log"])
    mangled = next(m for m, readable in zip(kernels, ptxas.demangle(list(kernels))) if readable == name)
    resources = used[mangled][str(arch)]
    return Compiled(kernels[mangled], resources["registers"], resources["shared"], resources["spills"])


def tools():
    """cmake/cuda_check.py and cmake/ptxas.py of this checkout."""
    folder = str(ROOT / "cmake")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("cuda_check"), importlib.import_module("ptxas")


def source_of(symbol: str) -> str:
    """The source to compile for a kernel: the file that defines it, or an include of it."""
    base = re.match(r"_ZN6pyvidx4cuda(\d+)", symbol)
    name = symbol[base.end() : base.end() + int(base[1])] if base else symbol
    for path in sorted((ROOT / "csrc/cuda").glob("*.cu*"), key=lambda p: p.suffix):
        if re.search(rf"__global__[^;{{]*?\b{name}\(", path.read_text()):
            return path.read_text() if path.suffix == ".cu" else f'#include "{path.name}"\n'
    raise RuntimeError(f"predict: no file of csrc/cuda defines {name}")


def disassembled(cubin: bytes) -> str:
    """Text of nvdisasm -hex."""
    data = bytearray(cubin)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(data)
        done = subprocess.run([nvdisasm(), *DISASSEMBLE, str(file)], text=True, capture_output=True)
        if done.returncode != 0 and struct.unpack_from("<I", data, FLAGS_AT)[0] == FLAGS_70:
            struct.pack_into("<I", data, FLAGS_AT, FLAGS_75)
            file.write_bytes(data)
            done = subprocess.run([nvdisasm(), *DISASSEMBLE, str(file)], text=True, capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(f"predict: nvdisasm failed: {done.stderr.strip()}")
    return done.stdout
