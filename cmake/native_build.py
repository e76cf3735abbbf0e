"""Compile and link the native code with ninja: what setup.py and the tests' emulator builds share.

Everything that is a list lives in build.json; sources are globbed, so a new op needs no edit here. CPU kernel files
(csrc/cpu) are compiled once per instruction-set level, everything else once. Incremental:
ninja follows headers and flags.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parents[1]
CONFIG = json.loads((ROOT / "cmake/build.json").read_text())
INCLUDE = ["-Icsrc/include"]


def isa_levels() -> dict[str, list[str]]:
    """Level name -> compiler flags, for this machine's architecture."""
    levels = CONFIG["isa_levels"]
    return levels.get(platform.machine(), levels["other"])


def installed_nvcc() -> str | None:
    """nvcc of CUDA_HOME, /usr/local/cuda or PATH."""
    nvcc = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/nvcc"
    return str(nvcc) if nvcc.exists() else shutil.which("nvcc")


def known_archs(nvcc: str) -> set[str]:
    """The architectures this nvcc can compile for."""
    return set(re.findall(r"compute_(\d+)\b", subprocess.check_output([nvcc, "--list-gpu-arch"], text=True)))


def find_nvcc() -> str | None:
    """The nvcc to build with: None without one, with PYVIDX_CUDA=0, or (unless PYVIDX_CUDA=1) for a torch that could
    not use the kernels."""
    import torch

    wish = os.environ.get("PYVIDX_CUDA", "")
    if wish == "0" or (wish != "1" and torch.version.cuda is None):
        return None
    found = installed_nvcc()
    if found is None:
        message = "pyvidx: no nvcc in CUDA_HOME, /usr/local/cuda or PATH: the CUDA kernels are not built"
        sys.exit(message) if wish == "1" else print(message, file=sys.stderr)
    return found


def cuda_headers() -> Path | None:
    """The folder of cuda_fp16.h and its like in CUDA_HOME or /usr/local/cuda, for what reads CUDA sources with g++."""
    include = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    return include if (include / "cuda_fp16.h").exists() else None


def cuda_archs(nvcc: str) -> list[str]:
    """The wanted architectures (PYVIDX_CUDA_ARCHS, else those of the GPUs here, else build.json's) that this nvcc can
    compile for. None at all is an error with PYVIDX_CUDA=1, and a build without CUDA kernels otherwise."""
    import torch

    wanted = os.environ.get("PYVIDX_CUDA_ARCHS", "").split()
    if not wanted and torch.cuda.is_available():
        wanted = sorted({"{}{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())})
    wanted = wanted or CONFIG["cuda_archs"]
    known = known_archs(nvcc)
    dropped, found = [a for a in wanted if a not in known], [a for a in wanted if a in known]
    if dropped:
        advice = "; a V100, sm_70, needs nvcc of CUDA 12: set CUDA_HOME to it" if "70" in dropped else ""
        print(f"pyvidx: {nvcc} cannot compile for sm_{', sm_'.join(dropped)}{advice}", file=sys.stderr)
    if not found:
        message = "pyvidx: no architecture is left: the CUDA kernels are not built"
        sys.exit(message) if os.environ.get("PYVIDX_CUDA") == "1" else print(message, file=sys.stderr)
    return found


class Build:
    """A build.ninja in `folder`. Add objects and libraries, then run()."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lines: list[str] = ["ninja_required_version = 1.5", f"builddir = {self.folder}"]
        self.rules: dict[tuple, str] = {}

    def _rule(self, command: str, deps: bool) -> str:
        name = self.rules.get((command, deps))
        if name is None:
            name = self.rules[command, deps] = f"r{len(self.rules)}"
            self.lines += [f"rule {name}", f"  command = {command}", "  description = $out"]
            if deps:
                self.lines += ["  depfile = $out.d", "  deps = gcc"]
        return name

    def compile(self, source: Path, flags: list[str], tag: str = "", compiler: str | None = None) -> Path:
        """One object of one source; `tag` tells several objects of one source apart."""
        compiler = compiler or os.environ.get("CXX", "g++")
        out = self.folder / "obj" / f"{source.parent.name}.{source.stem}{'.' + tag if tag else ''}.o"
        log = " > $out.log 2>&1 || (cat $out.log; exit 1)" if "nvcc" in Path(compiler).name else ""
        rule = self._rule(f"cd {ROOT} && {compiler} {' '.join(flags)} -MD -MF $out.d -c $in -o $out{log}", deps=True)
        self.lines.append(f"build {out}: {rule} {source.resolve()}")
        return out

    def link(self, out: Path, objects: list[Path], flags: list[str]) -> Path:
        rule = self._rule(f"{os.environ.get('CXX', 'g++')} -shared $in -o $out {' '.join(flags)}", deps=False)
        self.lines.append(f"build {out}: {rule} {' '.join(map(str, objects))}")
        return out

    def run(self) -> None:
        text = "\n".join(self.lines) + "\n"
        file = self.folder / "build.ninja"
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        with open(self.folder / "lock", "w") as lock:  # two ninjas in one folder spoil each other's work
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists() or file.read_text() != text:
                file.write_text(text)
            # In ROOT, where the compilers run: the headers they found are named from there.
            subprocess.check_call([_ninja(), "-f", str(file), "-j", jobs, "--quiet"], cwd=ROOT)


def _ninja() -> str:
    """The ninja of PATH, or of the PyPI package of the running Python (whose folder need not be in PATH)."""
    found = shutil.which("ninja", path=os.environ.get("PATH", "") + os.pathsep + str(Path(sys.executable).parent))
    return found or sys.exit("pyvidx: the build needs ninja: pip install ninja")


def sources(folder: str, suffix: str = "cpp") -> list[Path]:
    return sorted((ROOT / "csrc" / folder).glob(f"*.{suffix}"))


def torch_flags() -> list[str]:
    """Compile flags for csrc/torch: the stable ABI of torch 2.10, which newer versions keep."""
    from torch.utils import cpp_extension

    return [f"-isystem {p}" for p in cpp_extension.include_paths()] + ["-DTORCH_TARGET_VERSION=0x020a000000000000"]


def torch_link_flags() -> list[str]:
    """libtorch is needed even if no symbol asks for it: on a CUDA torch it brings in libtorch_cuda."""
    from torch.utils import cpp_extension

    return [f"-L{p}" for p in cpp_extension.library_paths()] + ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]


def kernel_objects(build: Build, ops: list[str] | None = None) -> list[Path]:
    """The CPU kernels of every level (of all ops, or of some), and what they share."""
    flags = CONFIG["cxx_flags"] + INCLUDE
    objects = [build.compile(s, flags) for s in sources("common")]
    for level, level_flags in isa_levels().items():
        define = [f"-DPYVIDX_LEVEL={level}"]
        objects += [build.compile(s, flags + level_flags + define, tag=level) for s in sources("cpu")
                    if ops is None or s.stem.removesuffix("_backward") in ops]  # fmt: skip
    return objects


def cuda_objects(build: Build, nvcc: str, archs: list[str]) -> list[Path]:
    """The CUDA kernels: code for every architecture, and PTX of the last for newer GPUs."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    flags = CONFIG["nvcc_flags"] + INCLUDE + ["-Xptxas=-v"] + targets
    # Told apart by what they are for: a build for another GPU leaves them as they are.
    return [build.compile(s, flags, tag="-".join(archs), compiler=nvcc) for s in sources("cuda", "cu")]


def cuda_logs(folder: Path, archs: list[str]) -> list[Path]:
    """What nvcc said of the objects of cuda_objects, in the folder of their build."""
    return sorted((folder / "obj").glob(f"cuda.*.{'-'.join(archs)}.o.log")) if archs else []


def cuda_link_flags(nvcc: str) -> list[str]:
    """The static runtime: the same library then also loads where no CUDA is installed. nvcc itself is asked where that
    is, since it may be a script that calls the compiler of another folder."""
    plan = subprocess.run([nvcc, "--dryrun", "-o", "a.out", "a.o"], text=True, capture_output=True).stderr
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", plan, re.MULTILINE)
    found = re.findall(r'"?-L([^"\s]+)"?', libraries.group(1)) if libraries else []
    home = Path(os.path.realpath(nvcc)).parents[1]
    folders = [*found, f"{home}/lib64", f"{home}/lib"]
    return [*(f"-L{folder}" for folder in folders), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def _written(build: Build, name: str, define: str, value) -> list[str]:
    """A header in the build's folder that defines `define` as JSON text; the flags to find it."""
    header, file = f'#define {define} R"json({json.dumps(value)})json"\n', build.folder / name
    if not file.exists() or file.read_text() != header:
        file.write_text(header)
    return [f"-I{build.folder}"]


def ops_library(
    build: Build, out: Path, nvcc: str | None, archs: list[str], ops: list[str] | None = None, namespace: str = ""
) -> Path:
    """pyvidx/_ops: kernels, their torch bindings, and what was built.

    ops: the ones to build; None: all. namespace: of the ops in torch; "": pyvidx.
    """
    import torch

    flags = CONFIG["cxx_flags"] + INCLUDE
    compiler = subprocess.check_output([os.environ.get("CXX", "g++"), "--version"], text=True).splitlines()[0]
    built = {"compiler": compiler, "torch": torch.__version__, "cuda_archs": archs}
    objects = kernel_objects(build, ops)
    objects += [build.compile(s, flags + _written(build, "build_info.h", "PYVIDX_BUILD", built))
                for s in sources("library")]  # fmt: skip
    flags = flags + torch_flags() + (["-DPYVIDX_CUDA"] if nvcc else [])
    tag = "cuda" if nvcc else ""  # builds with and without CUDA share a folder and all other objects
    for s in sources("torch"):
        registers = "PYVIDX_REGISTER" in s.read_text()
        if registers and namespace and (ops is None or s.stem in ops):
            objects.append(build.compile(s, [*flags, f"-DPYVIDX_NAMESPACE={namespace}"], tag="other"))
        elif not registers or ops is None or s.stem in ops:
            objects.append(build.compile(s, flags, tag=tag))
    link = torch_link_flags() + CONFIG["link_flags"].get(platform.machine(), [])
    if nvcc:
        objects += cuda_objects(build, nvcc, archs)
        link += cuda_link_flags(nvcc)
    return build.link(out, objects, link)


def info_module(build: Build, out: Path, kernels: Build, archs: list[str]) -> Path:
    """pyvidx/_C: a pybind11 module with the compiler's report. `kernels` has been run: its logs are read."""
    import ptxas
    import pybind11

    logs = cuda_logs(kernels.folder, archs)
    flags = CONFIG["cxx_flags"] + [f"-isystem {pybind11.get_include()}", f"-isystem {sysconfig.get_paths()['include']}"]
    flags += _written(build, "kernel_resources.h", "PYVIDX_KERNEL_RESOURCES", ptxas.of_logs(logs))
    return build.link(out, [build.compile(s, flags) for s in sources("python")], [])
