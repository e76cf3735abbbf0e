"""make hf-kernel: its folder is what the loader of `kernels` takes, and a CLIP of transformers runs on it."""

import copy
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

kernels = pytest.importorskip("kernels", reason="pip install kernels, of the version that transformers asks for")
transformers = pytest.importorskip("transformers", reason="pip install 'pyvidx[hosts]'")

import pyvidx.ops  # noqa: E402, F401  (beside it, the folder's ops must load)
from tests.torchvision_shim import mend_torchvision  # noqa: E402

mend_torchvision()
if not transformers.utils.is_kernels_available():
    pytest.skip(f"transformers {transformers.__version__} takes another version of kernels", allow_module_level=True)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not (ROOT / ".git").exists():
        pytest.skip("a kernel's metadata names its commit, and this is no git checkout")
    out = tmp_path_factory.mktemp("hf-kernel")
    command = [sys.executable, "cmake/hf_kernel.py", "--ops", "quick_gelu", "--out", out]
    run = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return out


def test_a_clip_of_transformers_runs_on_it(folder):
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    plain = transformers.CLIPVisionModel(config).eval()
    model = copy.deepcopy(plain)
    quick = kernels.LocalLayerRepository(repo_path=folder, layer_name="QuickGELU")
    with kernels.use_kernel_mapping({"QuickGELU": {"cpu": quick}}):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
    ours, theirs = (
        next(m for m in tower.modules() if type(m).__name__ == "QuickGELUActivation") for tower in (model, plain)
    )
    assert ours.forward.__func__ is not theirs.forward.__func__

    pixels = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(model(pixels).last_hidden_state, plain(pixels).last_hidden_state)

        x, best = torch.randn(1, 197, 3072), {}
        for layer in (ours, theirs) * 20:
            began = time.perf_counter()
            layer(x)
            best[layer] = min(best.get(layer, 1.0), time.perf_counter() - began)
    assert best[ours] < 1.2 * best[theirs]  # .8 of it on a Zen 4


def test_the_namespace_and_the_commit_are_this_build_s(folder):
    (metadata,) = folder.glob("build/*/metadata.json")
    about = json.loads(metadata.read_text())
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    assert about["provenance"]["kernel"]["commit"] == head and head[:7] in about["id"]
    kernels.get_local_kernel(folder)
    x = torch.randn(3, 5, requires_grad=True)
    op = getattr(torch.ops, about["id"]).quick_gelu.default
    op(x).sum().backward()
    torch.testing.assert_close(op(x), x * torch.sigmoid(1.702 * x))
    assert x.grad is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"{about['id']}::quick_gelu", "CPU")
