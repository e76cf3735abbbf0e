"""Official files in miniature: every kind of key list of the published weights, and every way to go wrong."""

import dataclasses
import zlib

import pytest
import torch
from safetensors.torch import save_file

from pyvidx.backbones.vit import ViT, ViTConfig
from pyvidx.models import BTAdapter, BTAdapterConfig
from pyvidx.reference.bt_adapter import ReferenceBTAdapter
from pyvidx.weights.bt_adapter import load_official, load_weights
from pyvidx.weights.keys import rename
from pyvidx.weights.state import read

VISION = ViTConfig(image_size=8, patch_size=4, width=64, heads=1, layers=6, mlp_width=96, embed_dim=12)
CONFIG = BTAdapterConfig(VISION, depth=4, time_length=16)
CLIP_LAYER = [
    f"{name}.{leaf}"
    for name in ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "layer_norm1",
                 "mlp.fc1", "mlp.fc2", "layer_norm2")
    for leaf in ("weight", "bias")
]  # fmt: skip
TIME_LAYER = [k for k in CLIP_LAYER if not k.startswith(("mlp", "layer_norm2"))] + [
    "temporal_fc.weight",
    "temporal_fc.bias",
]


def value(key):
    """A tensor of the published shape, at the miniature size; another one for every key."""
    C, F, E = VISION.width, VISION.mlp_width, VISION.embed_dim
    name = key.rsplit("timesFPN_")[-1].rsplit("btadapter_")[-1]
    shapes = {"cls_token": (1, 1, C), "time_embed.weight": (16, C), "visual_projection.weight": (E, C)}
    shapes |= {"patch_embedding.weight": (C, 3, 4, 4), "position_embedding.weight": (5, C)}
    shapes |= {"fc1.weight": (F, C), "fc1.bias": (F,), "fc2.weight": (C, F)}
    shape = next((s for end, s in shapes.items() if name.endswith(end)), None)
    if shape is None:
        square = name.endswith(("_proj.weight", "temporal_fc.weight"))
        shape = (C, C) if square else (C,)
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))


def state(*keys, prefix=""):
    return {prefix + key: value(key) for key in keys}


def tower(layers, branch, *, head=True, projection=True, embeddings=True, gates=True, name="btadapter"):
    keys = ["position_embedding.weight"] * (layers > 0)
    if embeddings:
        keys += ["class_embedding", "patch_embedding.weight", "pre_layrnorm.weight", "pre_layrnorm.bias"]
    if head:
        keys += ["post_layernorm.weight", "post_layernorm.bias"] + ["visual_projection.weight"] * projection
    keys += ["balance1", "balance2"] * gates + [f"{name}_cls_token", f"{name}_time_embed.weight"] * (branch > 0)
    keys += [f"layers.{i}.{k}" for i in range(layers) for k in CLIP_LAYER]
    keys += [f"{name}_S_layers.{i}.{k}" for i in range(branch) for k in CLIP_LAYER]
    keys += [f"{name}_T_layers.{i}.{k}" for i in range(branch) for k in TIME_LAYER]
    return keys


def mma_file(**changes):
    """The pretraining file: wrapped, `backbone.` before the tower, the text tower and the MBTA head beside it."""
    extra = ["extra_proj.0.weight", "text_backbone.text_model.embeddings.token_embedding.weight",
             "text_backbone.text_model.embeddings.position_ids", "text_backbone.text_projection.weight"]  # fmt: skip
    return {"state_dict": state(*tower(6, 4, **changes), prefix="backbone.") | {k: torch.zeros(2) for k in extra}}


def clip_keys(whole=True):
    """transformers' published CLIP names, as the same values as tower()'s."""
    plain = state(*tower(6, 0, gates=False))
    names = {}
    for key, tensor in plain.items():
        if key.startswith("layers."):
            key = "vision_model.encoder." + key
        elif key != "visual_projection.weight":
            key = "vision_model." + ("embeddings." if "embedding" in key else "") + key
        names[key] = tensor
    return names | (
        {"logit_scale": torch.zeros(()), "text_model.final_layer_norm.weight": torch.ones(3)} if whole else {}
    )


def expect(model, name, key, third=None):
    """Parameter `name` holds what the file has under `key` (its third of a packed weight)."""
    got = dict(model.named_parameters())[name].detach()
    if third is not None:
        got = got.chunk(3)["qkv".index(third)]
    assert torch.equal(got, value(key).reshape(got.shape)), f"{name} does not hold {key}"


def expect_backbone(model, layers=range(6)):
    for i in layers:
        for third in "qkv":
            expect(model, f"tower.blocks.{i}.qkv.weight", f"layers.{i}.self_attn.{third}_proj.weight", third)
            expect(model, f"tower.blocks.{i}.qkv.bias", f"layers.{i}.self_attn.{third}_proj.bias", third)
        expect(model, f"tower.blocks.{i}.out.weight", f"layers.{i}.self_attn.out_proj.weight")
        expect(model, f"tower.blocks.{i}.fc2.bias", f"layers.{i}.mlp.fc2.bias")
        expect(model, f"tower.blocks.{i}.norm2.weight", f"layers.{i}.layer_norm2.weight")


def expect_branch(model, depth, name="btadapter"):
    for j in range(depth):
        expect(model, f"temporal.branch.spatial.{j}.qkv.weight", f"{name}_S_layers.{j}.self_attn.k_proj.weight", "k")
        expect(model, f"temporal.branch.spatial.{j}.fc1.weight", f"{name}_S_layers.{j}.mlp.fc1.weight")
        expect(model, f"temporal.branch.temporal.{j}.qkv.bias", f"{name}_T_layers.{j}.self_attn.v_proj.bias", "v")
        expect(model, f"temporal.branch.temporal.{j}.fc.weight", f"{name}_T_layers.{j}.temporal_fc.weight")
        expect(model, f"temporal.branch.temporal.{j}.norm.bias", f"{name}_T_layers.{j}.layer_norm1.bias")
    expect(model, "temporal.branch.seed", f"{name}_cls_token")
    expect(model, "temporal.branch.time", f"{name}_time_embed.weight")


def test_the_reference_has_the_published_keys():
    """The key lists of this file are those of the official modules."""
    assert set(ReferenceBTAdapter(CONFIG).state_dict()) == set(tower(6, 4))
    features = dataclasses.replace(CONFIG, part="features")
    assert set(ReferenceBTAdapter(features, "llava").state_dict()) == set(tower(3, 3, head=False, embeddings=False))


@pytest.mark.parametrize("name", ["btadapter", "timesFPN"])
def test_pretraining_file(name, tmp_path):
    torch.save(mma_file(name=name), tmp_path / "w.pth")
    model, report = load_official(tmp_path / "w.pth")
    assert model.config == CONFIG and (model.compat, model.variant) == ("official", "mma")
    assert not model.is_random and not model.training
    expect_backbone(model)
    expect_branch(model, 4, name)
    expect(model, "temporal.output_gate", "balance1")
    expect(model, "temporal.branch.gate", "balance2")
    expect(model, "tower.patch", "patch_embedding.weight")
    expect(model, "tower.projection.weight", "visual_projection.weight")
    assert len(report.loaded) == len(list(model.parameters())) and len(report.left_out) == 4
    assert not (report.missing or report.unexpected or report.unused or report.replaced)
    assert report.reshaped == [("temporal.branch.seed", (1, 1, 64), (64,))]
    assert "left_out 4" in str(report) and "loaded" in str(report)


def test_it_computes_what_the_reference_computes():
    reference = ReferenceBTAdapter(CONFIG)
    reference.load_state_dict(state(*tower(6, 4)))
    model, _ = load_official({f"module.backbone.{k}": v for k, v in reference.state_dict().items()})
    pixels = torch.randn(2, 4, 3, 8, 8)
    with torch.no_grad():
        want = reference(pixels)
        torch.testing.assert_close(model(pixels).pooled, want, rtol=0, atol=2e-5 * want.abs().max().item())


def test_ungated_file():
    model, report = load_official(mma_file(gates=False))
    assert model.temporal.output_gate is None and model.temporal.branch.gate is None and not report.missing
    model, report = load_official(mma_file(), gated=False)  # the zero-shot configurations drop the gates of the file
    assert report.unused == ["backbone.balance1", "backbone.balance2"]
    with pytest.raises(ValueError, match="nothing fills 2 parameters: temporal.branch.gate, temporal.output_gate"):
        load_official(mma_file(gates=False), gated=True)


def test_llava_inference_tower():
    model, report = load_official(state(*tower(6, 4, projection=False)))
    assert model.variant == "llava" and model.config.vision.embed_dim is None and not report.missing
    expect_backbone(model)
    expect_branch(model, 4)


def test_reserved_layers_go_where_they_came_from():
    """Training files count CLIP's layers L-4 to L-2 from 0."""
    reserved = state(*tower(3, 3, head=False, embeddings=False), prefix="model.vision_tower.")
    model, report = load_official(reserved, part="features", layers=6)
    assert model.config == dataclasses.replace(CONFIG, part="features", vision=model.config.vision)
    for i in range(3):
        expect(model, f"tower.blocks.{2 + i}.out.weight", f"layers.{i}.self_attn.out_proj.weight")
    expect_branch(model, 3)
    assert report.unused == ["model.vision_tower.balance1"], "tokens do not pass the output gate"
    with pytest.raises(ValueError, match="pass layers="):
        load_official(reserved, part="features")


def test_a_whole_file_into_a_part_keeps_the_original_indices():
    """The official loader puts CLIP's layers 0, 1, 2 over the reserved layers 2, 3, 4. Ours does not."""
    model, report = load_official(mma_file(), part="features")
    expect_backbone(model, range(2, 5))
    expect_branch(model, 3)
    assert "backbone.layers.0.mlp.fc1.weight" in report.unused and "backbone.layers.5.mlp.fc1.bias" in report.unused


def test_tuned_branch_on_a_clip():
    """The instruction-tuned file: 86 tensors of a 3-layer branch, no gates: they are 0.5, and the report says so."""
    tuned = state(*(k for k in tower(0, 3, head=False, embeddings=False, gates=False)), prefix="model.vision_tower.")
    assert len(tuned) == 86
    for told in ({}, {"gated": True, "allow_missing": ["temporal.branch.gate"]}):
        model, report = load_official(clip_keys(), tuned, part="tokens", hidden_act="quick_gelu", **told)
        assert (model.config.depth, model.config.gated, model.variant) == (4, True, "llava")
        assert report.missing == ["temporal.branch.gate"] and not model.temporal.branch.gate.any()
        assert "assumed temporal.branch.gate: 0.5 in every channel" in str(report)
    plain, report = load_official(clip_keys(), tuned, part="tokens", hidden_act="quick_gelu", gated=False)
    assert plain.temporal.branch.gate is None and not report.assumed
    with pytest.raises(ValueError, match='tuned branch.* part="tokens"'):
        load_official(clip_keys(), tuned, hidden_act="quick_gelu")
    expect_backbone(model, range(5))
    expect_branch(model, 3)
    assert sorted(report.left_out) == ["logit_scale", "text_model.final_layer_norm.weight"]
    assert model(torch.randn(1, 2, 3, 8, 8)).tokens.shape == (1, 5, 64)


def test_a_clip_brings_what_weights_do_not_tell():
    clip = ViT(dataclasses.replace(VISION, heads=4, hidden_act="gelu", eps=1e-6))
    tuned = state(*tower(0, 3, head=False, embeddings=False, gates=False))
    model, report = load_official(clip, tuned, part="tokens", gated=True, allow_missing=["temporal.branch.gate"])
    vision = model.config.vision
    assert (vision.heads, vision.hidden_act, vision.eps) == (4, "gelu", 1e-6)
    assert torch.equal(model.tower.blocks["2"].fc1.weight, clip.blocks["2"].fc1.weight)
    assert "projection.weight" in " ".join(report.unused)


def test_later_sources_replace():
    again = {"backbone.btadapter_time_embed.weight": torch.zeros(16, 64)}
    model, report = load_official(mma_file(), again)
    assert report.replaced == ["temporal.branch.time"] and model.temporal.branch.time.abs().max() == 0


def test_stan():
    keys = [k for k in tower(6, 4, gates=False, name="STAN") if k != "STAN_cls_token"]
    model, report = load_official(state(*keys))
    assert not report.missing and model.temporal.branch.gate is None
    assert torch.equal(model.temporal.branch.seed, value("class_embedding")), "the seed is CLIP's class token"


def test_nothing_random_is_left_in_silence():
    broken = mma_file()
    for key in [k for k in broken["state_dict"] if "T_layers.2" in k]:
        del broken["state_dict"][key]
    with pytest.raises(ValueError, match=r"nothing fills 8 parameters: temporal.branch.temporal.\*.fc"):
        load_official(broken)
    model, report = load_official(broken, allow_missing=["temporal.branch.temporal.2.*"])
    assert len(report.missing) == 8 and "missing 8" in str(report)
    with pytest.raises(ValueError, match="match no missing parameter: temporal.branch.temporal.3"):
        load_official(broken, allow_missing=["temporal.branch.temporal.2.*", "temporal.branch.temporal.3.*"])


def test_a_failed_load_changes_nothing():
    model = BTAdapter(CONFIG)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrong = mma_file()["state_dict"]
    wrong["backbone.position_embedding.weight"] = torch.zeros(10, 64)
    with pytest.raises(ValueError, match=r"tower.position is \(5, 64\), the file has \(10, 64\)"):
        load_weights(model, wrong)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.is_random


def test_reports_what_it_does_not_understand():
    odd = mma_file()
    odd["state_dict"] |= {"backbone.adapter.weight": torch.zeros(1), "backbone.layers.0.gamma": torch.zeros(1)}
    _, report = load_official(odd)
    assert report.unexpected == ["backbone.adapter.weight", "backbone.layers.0.gamma"]
    half = {k: v for k, v in mma_file()["state_dict"].items() if "layers.1.self_attn.k_proj.bias" not in k}
    with pytest.raises(ValueError, match="qkv.bias needs q, k and v, got only q, v"):
        load_official(half)
    with pytest.raises(ValueError, match="both mean tower.class_token"):
        rename({"class_embedding": torch.zeros(1), "backbone.class_embedding": torch.zeros(1)})
    with pytest.raises(ValueError, match="neither the 6 of the whole tower nor the 3 reserved"):
        load_weights(BTAdapter(CONFIG), state(*tower(2, 3, head=False, embeddings=False)))
    with pytest.raises(ValueError, match="no sizes without"):
        load_official(clip_keys())


def test_reading_files(tmp_path):
    weights = {"a": torch.ones(2)}
    save_file(weights, tmp_path / "w.safetensors")
    torch.save({"model": weights, "epoch": 3}, tmp_path / "w.bin")
    for name in ("w.safetensors", "w.bin"):
        assert torch.equal(read(tmp_path / name)["a"], weights["a"])

    torch.save({"state_dict": weights, "hook": dataclasses.replace}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="weights_only"):
        read(tmp_path / "code.pth")
    (tmp_path / "short.bin").write_bytes((tmp_path / "w.bin").read_bytes()[:200])
    with pytest.raises(ValueError, match="truncated"):
        read(tmp_path / "short.bin")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.bin")
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(ValueError, match="state dict"):
        read(tmp_path / "list.bin")


def test_converted_file_is_read_back(tmp_path):
    model, _ = load_official(mma_file())
    model.save(tmp_path)
    again = BTAdapter.from_pretrained(tmp_path)
    assert again.config == model.config and (again.compat, again.variant) == ("official", "mma")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))
