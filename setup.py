"""Build pyvidx against the torch that is installed; see cmake/native_build.py for how, cmake/build.json for what.

PYVIDX_CUDA=0|1            leave the CUDA kernels out, or insist on them (default: if torch has CUDA and there is nvcc)
PYVIDX_CUDA_ARCHS="80 90"  only these architectures (default: those of the GPUs here, or all where there is none)
PYVIDX_PURE=1              nothing compiled: a wheel for any platform, whose ops run their references
MAX_JOBS                   parallel compilations
"""

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

sys.path.insert(0, str(Path(__file__).parent / "cmake"))


class NinjaBuild(build_ext):
    """The library of ops, in one incremental ninja build, in place or into the wheel; in place also pyvidx._C."""

    def finalize_options(self):
        self.build_temp = self.build_temp or "build/native"
        super().finalize_options()

    def run(self):
        try:
            import torch  # noqa: F401
        except ImportError:
            sys.exit(
                "pyvidx builds against the torch you run: install torch first, then\n"
                "    pip install --no-build-isolation -e ."
            )
        import native_build as native

        package = Path("pyvidx") if self.inplace else Path(self.build_lib) / "pyvidx"
        package.mkdir(parents=True, exist_ok=True)
        nvcc = native.find_nvcc()
        archs = native.cuda_archs(nvcc) if nvcc else []
        nvcc = nvcc if archs else None
        kernels = native.Build(Path(self.build_temp) / "kernels")
        native.ops_library(kernels, package.resolve() / "_ops.abi3.so", nvcc, archs)
        kernels.run()
        if self.inplace:
            info = native.Build(Path(self.build_temp) / "info")
            out = package.resolve() / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
            native.info_module(info, out, kernels, archs)
            info.run()

    def get_source_files(self):
        """What a source distribution must have besides pyvidx/."""
        found = (p for folder in ("csrc", "cmake") for p in sorted(Path(folder).rglob("*")))
        return [str(p) for p in found if p.is_file() and "__pycache__" not in p.parts]

    def get_outputs(self):
        return [str(p) for p in (Path(self.build_lib) / "pyvidx").glob("*.so")]


class Source(sdist):
    """Without the few files of tests/ that setuptools would add: the others, which they need, are in the repository."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, [f for f in files if not f.startswith("tests")])


setup(
    packages=find_packages(include=["pyvidx*"]),
    package_data={
        "pyvidx": [
            "py.typed",
            "*/configs/*.json",
            "bench/*.json",
            "models/*.safetensors",
            "eval/tasks.json",
            "train/cards.json",
        ]
    },
    # So that setuptools knows of native code. It has nothing of Python in it: one wheel serves all from 3.10 on.
    ext_modules=[] if os.environ.get("PYVIDX_PURE") == "1" else [Extension("pyvidx._ops", [], py_limited_api=True)],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    cmdclass={"build_ext": NinjaBuild, "sdist": Source},
)
