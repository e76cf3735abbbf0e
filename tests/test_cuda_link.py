"""The CUDA kernels compile, link and register against whatever torch is here, also one without CUDA."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "cmake"))

import cuda_check  # noqa: E402
import native_build  # noqa: E402
import ptxas  # noqa: E402

PROBE = """
import torch
from pyvidx.ops import _library as library, token_gather
assert library.LOAD_ERROR is None, library.LOAD_ERROR
missing = [n for n in library.REFERENCES for d in ("cpu", "cuda") if not library.has_kernel(n, d)]
print(missing, token_gather(torch.ones(1, 1, 2, 3), torch.tensor([[1]])).sum().item())
"""


@pytest.mark.skipif(native_build.installed_nvcc() is None, reason="no nvcc")
def test_the_runtime_is_found_behind_a_script(tmp_path):
    """As module systems and ccache install nvcc: its own folder has no lib64 beside it."""
    script = tmp_path / "bin/nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{native_build.installed_nvcc()}" "$@"\n')
    script.chmod(0o755)
    folders = [Path(f[2:]) for f in native_build.cuda_link_flags(str(script)) if f.startswith("-L")]
    assert any((folder / "libcudart_static.a").exists() for folder in folders), folders


def test_an_nvcc_that_knows_none_of_the_gpus(monkeypatch, capsys):
    """A V100 and CUDA 13: an error where CUDA was asked for, and said otherwise."""
    monkeypatch.setattr(native_build, "known_archs", lambda nvcc: {"75", "90"})
    monkeypatch.setenv("PYVIDX_CUDA_ARCHS", "70")
    monkeypatch.delenv("PYVIDX_CUDA", raising=False)
    assert native_build.cuda_archs("/cuda/bin/nvcc") == []
    said = capsys.readouterr().err
    assert "/cuda/bin/nvcc cannot compile for sm_70; a V100" in said and "kernels are not built" in said
    monkeypatch.setenv("PYVIDX_CUDA", "1")
    with pytest.raises(SystemExit, match="no architecture is left"):
        native_build.cuda_archs("/cuda/bin/nvcc")
    monkeypatch.setenv("PYVIDX_CUDA_ARCHS", "70 90")
    assert native_build.cuda_archs("/cuda/bin/nvcc") == ["90"]


def test_builds_in_one_folder_take_turns(tmp_path):
    def build(name: str) -> None:
        made = native_build.Build(tmp_path)
        rule = made._rule(f"mkdir {tmp_path}/busy && sleep .2 && rmdir {tmp_path}/busy && touch $out", deps=False)
        made.lines.append(f"build {tmp_path}/{name}: {rule}")
        made.run()

    with ThreadPoolExecutor() as pool:
        list(pool.map(build, "ab"))
    assert (tmp_path / "a").exists() and (tmp_path / "b").exists()


@pytest.mark.skipif(native_build.installed_nvcc() is None, reason="no nvcc")
def test_one_binary_with_cuda(tmp_path):
    """One architecture, to be quick; cmake/cuda_check.py compiles for all. The CPU objects are those of this tree."""
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path}"]
    env = os.environ | {"PYVIDX_CUDA": "1", "PYVIDX_CUDA_ARCHS": "75"}
    build = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    assert build.returncode == 0, (build.stdout + build.stderr)[-4000:]
    env = os.environ | {"PYVIDX_OPS_LIBRARY": str(tmp_path / "pyvidx/_ops.abi3.so")}
    probe = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, env=env, text=True, capture_output=True)
    assert probe.stdout.strip() == "[] 3.0", probe.stdout + probe.stderr
    kernels = ptxas.of_logs(native_build.cuda_logs(ROOT / "build/native/kernels", ["75"]))
    assert len(kernels) > 50 and all(set(per_arch) == {"75"} for per_arch in kernels.values())
    assert cuda_check.offenders(kernels, native_build.CONFIG["local_memory_allowed"]) == []
