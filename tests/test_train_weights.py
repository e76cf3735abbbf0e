"""Where BT-Adapter's pretraining starts: the official file, transformers' CLIP, open_clip's, and back to the official
names."""

import json

import pytest
import torch

from pyvidx.backbones import TextConfig, TextTower
from pyvidx.models import BTAdapter, BTAdapterConfig
from pyvidx.models.pretraining import Pretraining
from pyvidx.reference.bt_adapter import ReferenceBTAdapter
from pyvidx.train.pretrain import Config, build
from pyvidx.weights.mma_export import export_mma
from tests.test_models import CONFIG
from tests.test_train_pretrain import TEXT, step
from tests.torchvision_shim import mend_torchvision


@pytest.fixture(autouse=True)
def tokenizers():
    """Every one of them reads captions."""
    mend_torchvision()
    pytest.importorskip("open_clip", reason="pip install 'pyvidx[hosts]'")


def same(task, want):
    """The towers of a task are those of a step, float32."""
    for name in ("model.tower", "text"):
        for (key, p), q in zip(task.step.get_submodule(name).named_parameters(), want.get_submodule(name).parameters()):
            assert torch.equal(p, q), f"{name}.{key}"


def test_weights_from_the_official_file_and_back(tmp_path):
    first = step()
    assert set(export_mma(first)) >= {
        "backbone.balance1",
        "extra_proj.1.bias",
        "backbone.btadapter_T_layers.2.temporal_fc.weight",
    }
    torch.save({"meta": {}, "state_dict": export_mma(first)}, tmp_path / "w.pth")
    values = {"out": "o", "train": {}, "weights": str(tmp_path / "w.pth"), "heads": [2, 2]}
    task = build(Config.from_dict(values), torch.device("cpu"))
    for (name, p), q in zip(task.step.named_parameters(), first.parameters()):
        assert torch.equal(p, q), name
    torch.testing.assert_close(export_mma(task.step), export_mma(first), rtol=0, atol=0)
    first.model.save(tmp_path / "ours.safetensors")
    values |= {"text": values["weights"], "weights": str(tmp_path / "ours.safetensors")}
    same(build(Config.from_dict(values), torch.device("cpu")), first)


def test_the_official_names_are_the_published_ones():
    with torch.device("meta"):
        text = TextTower(TextConfig(49408, 77, 768, 12, 12, 3072, 768))
        weights = export_mma(Pretraining(BTAdapter(BTAdapterConfig.named("clip-l-14")), text))
        tower = ReferenceBTAdapter(CONFIG)
        tiny = export_mma(Pretraining(BTAdapter(CONFIG), TextTower(TEXT)))
    assert (len(weights), sum(value.numel() for value in weights.values())) == (709, 499_858_944)
    shapes = {name: value.shape for name, value in tiny.items()}
    for name, value in tower.state_dict().items():
        assert shapes.pop(f"backbone.{name}") == value.shape, name
    assert {name.split(".")[0] for name in shapes} == {"text_backbone", "extra_proj"}


def test_weights_of_a_clip(tmp_path):
    """A folder of transformers, its state dict, and open_clip's give the same towers and a branch that starts as it."""
    transformers = pytest.importorskip("transformers", reason="pip install 'pyvidx[hosts]'")
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, num_attention_heads=1, num_hidden_layers=3, intermediate_size=96, projection_dim=6)
    text = transformers.CLIPTextConfig(vocab_size=50, max_position_embeddings=9, **sizes)
    vision = transformers.CLIPVisionConfig(image_size=12, patch_size=4, **sizes)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=6)
    )
    model.save_pretrained(tmp_path / "clip")
    values = {"out": "o", "train": {}, "weights": str(tmp_path / "clip"),
              "module": {"name": "bt_adapter", "depth": 2, "time_length": 5, "gated": False}}  # fmt: skip
    task = build(Config.from_dict(values), torch.device("cpu"))
    config = task.model.config
    assert (config.depth, config.time_length, config.gated, config.vision.layers) == (2, 5, False, 3)
    assert torch.equal(task.model.temporal.branch.spatial[1].fc1.weight, task.model.tower.blocks["2"].fc1.weight)
    assert not task.model.temporal.branch.temporal[0].fc.weight.any()
    with torch.no_grad():
        pixels, ids = torch.randn(2, 3, 12, 12), torch.tensor([[1, 49, 0]])
        want = model.visual_projection(model.vision_model(pixels).pooler_output)
        backbone = task.model.tower
        torch.testing.assert_close(backbone.embedding(backbone(pixels)[0]), want, rtol=1e-4, atol=1e-5)
    values["weights"] = str(tmp_path / "clip/model.safetensors")
    again = build(Config.from_dict(values), torch.device("cpu"))
    same(again, task.step)
    assert torch.equal(again.model.temporal.branch.time, task.model.temporal.branch.time)  # the seed's
    values |= {"text": values["weights"], "weights": str(tmp_path / "ours")}
    BTAdapter(config).save(tmp_path / "ours")
    assert torch.equal(build(Config.from_dict(values), torch.device("cpu")).step.text(ids), task.step.text(ids))


def test_weights_of_open_clip(tmp_path):
    import open_clip

    sizes = {
        "embed_dim": 6, "vision_cfg": {"image_size": 12, "layers": 3, "width": 64, "patch_size": 4},
        "text_cfg": {"context_length": 9, "vocab_size": 50, "width": 64, "heads": 1, "layers": 1},
    }  # fmt: skip
    (tmp_path / "pyvidx-tiny.json").write_text(json.dumps(sizes))
    open_clip.add_model_config(tmp_path / "pyvidx-tiny.json")
    torch.manual_seed(0)
    model = open_clip.create_model("pyvidx-tiny")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    values = {"out": "o", "train": {}, "module": {"name": "bt_adapter", "depth": 2}, "hidden_act": "gelu"}
    named = f"open_clip:pyvidx-tiny:{tmp_path / 'w.pt'}"
    task = build(Config.from_dict({**values, "weights": named}), torch.device("cpu"))
    same(build(Config.from_dict({**values, "weights": str(tmp_path / "w.pt")}), torch.device("cpu")), task.step)
    with torch.no_grad():
        pixels, ids = torch.randn(2, 3, 12, 12), torch.tensor([[1, 49, 0, 0, 0, 0, 0, 0, 0]])
        backbone = task.model.tower
        torch.testing.assert_close(backbone.embedding(backbone(pixels)[0]), model.encode_image(pixels))
        torch.testing.assert_close(task.step.text(ids), model.encode_text(ids))
