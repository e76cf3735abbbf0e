"""Entry points: what vLLM and lmms-eval find of pyvidx, and that neither is imported by pyvidx itself."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pyvidx.memory import compute_retained_tokens_count, compute_retention_mask
from tests.harness import randn

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


@pytest.mark.parametrize("method", ["evs", "vidcom2"])
def test_vllm_prunes_qwen2_5_by_any_method(method):
    """What the engine asks of the model, without the engine: two pruned videos in one prompt."""
    pytest.importorskip("vllm", reason="needs vLLM; its models import on a CPU")
    from vllm import ModelRegistry

    from pyvidx.hosts.vllm_models import PyvidxQwen2_5_VLForConditionalGeneration as Model
    from pyvidx.hosts.vllm_plugin import ARCHITECTURE, register

    register()
    register()  # as in processes that load plug-ins twice
    assert ARCHITECTURE in ModelRegistry.get_supported_archs()
    model = Model.__new__(Model)
    torch.nn.Module.__init__(model)
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    model.config = SimpleNamespace(
        image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_config=vision
    )  # fmt: skip
    model.is_multimodal_pruning_enabled = True
    model.multimodal_config = SimpleNamespace(get_video_pruning_spec=lambda: (method, 0.6))
    grids, apart = torch.tensor([[4, 4, 4], [3, 4, 6]]), torch.tensor([0.75, 1.0])
    rows = [randn(16, 8, seed=1), randn(18, 8, seed=2)]
    given = {"video_grid_thw": grids, "second_per_grid_ts": apart}
    found = model._postprocess_video_embeds_evs(rows, given)
    ids = [5, 6]
    for x in found:
        ids += [92, *[91] * len(x), 93, 7]
    before, _ = model.get_mrope_input_positions(ids, [])
    embeds, positions, delta = model.recompute_mrope_positions(torch.tensor(ids), found, before, 0)
    at = 0
    for x, grid, seconds, embed in zip(rows, grids, apart, embeds):
        T, h, w = (grid // torch.tensor([1, 2, 2])).tolist()
        mask = compute_retention_mask(x, grid, 2, 0.6, method)
        assert len(embed) == compute_retained_tokens_count(h * w, T, 0.6, method)
        torch.testing.assert_close(embed, x[mask])
        t, y, z = torch.meshgrid(*map(torch.arange, (T, h, w)), indexing="ij")
        where = torch.stack([(t * seconds * 2).floor().long(), y, z]).flatten(1)[:, mask]
        start = ids.index(92, at)
        at = start + 1 + len(embed)
        assert torch.equal(positions[:, start + 1 : at], where + positions[0, start] + 1)
        text = positions[:, at : at + 2]
        assert torch.equal(text, text[:1].expand(3, 2)) and text[0].diff().tolist() == [1]
    assert delta == int(positions.max()) + 1 - len(ids)
