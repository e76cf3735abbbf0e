"""make hf-kernel: the ops in the layout of the `kernels` package of Hugging Face, for models of transformers.

    python cmake/hf_kernel.py [--ops quick_gelu ...] [--out dist/hf-kernel]

Writes OUT/build/torch-stable-abi210-cpu-x86_64-linux, with what the loader asks for: an __init__.py, layers.py with
stateless layers of the names that transformers uses (QuickGELU), metadata.json with the commit, and the compiled ops.
Their namespace in torch is this build's own, so that it can be loaded beside pyvidx, or beside another build of it.

    from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping
    quick = LocalLayerRepository(repo_path=Path("dist/hf-kernel"), layer_name="QuickGELU")
    with use_kernel_mapping({"QuickGELU": {"cpu": quick}}):
        kernelize(model, mode=Mode.INFERENCE, device="cpu")
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import native_build as native  # noqa: E402

ROOT = native.ROOT
PYTHON = ROOT / "pyvidx/ops"
LAYERS = '''"""Layers whose forward a model's own take over: stateless, by the names that transformers gives them."""

from torch import Tensor, nn

from .ops import quick_gelu


class QuickGELU(nn.Module):
    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return quick_gelu(input)
'''


def commit() -> tuple[str, bool]:
    """The commit of the source tree, and whether what it holds was changed since."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True, capture_output=True)
    if head.returncode:
        sys.exit("pyvidx: a kernel's metadata names its commit, and this is no git checkout")
    status = ["git", "status", "--porcelain", "--", "csrc", "pyvidx/ops", "cmake"]
    return head.stdout.strip(), bool(subprocess.check_output(status, cwd=ROOT, text=True).strip())


def python_files(ops: list[str]) -> set[str]:
    """The modules of pyvidx/ops that these ops are made of, with what they import."""
    found, wanted = set(), {"_library", *ops}
    while wanted:
        name = wanted.pop()
        found.add(name)
        text = (PYTHON / f"{name}.py").read_text()
        modules = re.findall(r"^from pyvidx\.ops\.(\w+) import", text, re.M)
        modules += re.findall(r"^from pyvidx\.ops import (\w+)", text, re.M)
        wanted |= set(modules) - found
    return found


def write(ops: list[str], out: Path) -> Path:
    """The folder of this build, with everything but the library."""
    head, dirty = commit()
    namespace = f"_pyvidx_{head[:7]}" + ("_dirty" if dirty else "")
    variant = out / "build" / f"torch-stable-abi210-cpu-{platform.machine()}-linux"
    shutil.rmtree(variant, ignore_errors=True)
    (variant / "ops").mkdir(parents=True)
    for name in python_files(ops):
        text = (PYTHON / f"{name}.py").read_text()
        text = re.sub(r"^from pyvidx\.ops(\.\w+)? import", lambda m: f"from {m[1] or '.'} import", text, flags=re.M)
        if name == "_library":
            text = text.replace('NAMESPACE = "pyvidx"', f'NAMESPACE = "{namespace}"')
        (variant / "ops" / f"{name}.py").write_text(text)
    imports = (PYTHON / "__init__.py").read_text().splitlines()
    chosen = [line for line in imports if (m := re.match(r"from pyvidx\.ops\.(\w+)", line)) and m[1] in ops]
    (variant / "ops/__init__.py").write_text("".join(line.replace("pyvidx.ops", "") + "\n" for line in chosen))
    (variant / "layers.py").write_text(LAYERS)
    (variant / "__init__.py").write_text("from . import layers, ops\nfrom .ops import *\n")
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    metadata = {
        "id": namespace,
        "name": "pyvidx",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
        "provenance": {"kernel-builder": {"version": version}, "kernel": {"commit": head, "dirty": dirty}},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    shutil.copy(ROOT / "LICENSE", out)
    return variant


def compile_into(variant: Path, ops: list[str]) -> None:
    """_ops.abi3.so, of the objects of the build in the source tree and of bindings for this namespace."""
    namespace = json.loads((variant / "metadata.json").read_text())["id"]
    build = native.Build(ROOT / "build/native/kernels")
    native.ops_library(build, variant / "_ops.abi3.so", None, [], ops=ops, namespace=namespace)
    build.run()


def main() -> None:
    every = sorted(s.stem for s in native.sources("torch") if (PYTHON / f"{s.stem}.py").exists())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=every, default=every, metavar="OP")
    parser.add_argument("--out", type=Path, default=ROOT / "dist/hf-kernel")
    options = parser.parse_args()
    if "quick_gelu" not in options.ops:
        parser.error("--ops must hold quick_gelu, whose layer this is for")
    variant = write(options.ops, options.out.resolve())
    compile_into(variant, options.ops)
    print(os.path.relpath(variant))


if __name__ == "__main__":
    main()
