"""MA-LMM's weights under the names of LAVIS and of transformers, both ways, and transformers' models as the judge."""

import re

import pytest
import torch
from torch import nn

from pyvidx.hosts import huggingface
from pyvidx.models.malmm import MALMM
from pyvidx.weights.malmm import export_malmm, load_malmm, load_malmm_weights
from pyvidx.weights.malmm_keys import rename
from tests.torchvision_shim import mend_torchvision

SIZES = {"vision_heads": 4, "heads": 4}


def randomized(model):
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    for block in model.vision.blocks.values():  # k has no bias in LAVIS
        block.qkv.bias.data.chunk(3)[1].zero_()
    return model


@pytest.fixture
def model():
    return randomized(MALMM.default())


def same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("naming", ["lavis", "huggingface"])
def test_there_and_back(model, naming):
    found, report = load_malmm(export_malmm(model, naming), **SIZES)
    assert same(found, model) and not found.is_random and not report.unexpected and not report.left_out
    assert found.config.qformer == model.config.qformer and len(report.loaded) == len(found.state_dict())
    assert found.config.vision.norm_eps == (1e-5 if naming == "lavis" else 1e-6)


def test_names_are_those_of_the_published_files(model):
    """The list of spec section 11, with the layers of the small model."""
    layer = [
        f"attention.{part}.{leaf}"
        for part in ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
        for leaf in ("weight", "bias")
    ]
    cross = ["cross" + name for name in layer]
    feed = [
        f"{part}{suffix}.{inner}.{leaf}"
        for suffix in ("", "_query")
        for part, inner in (("intermediate", "dense"), ("output", "dense"), ("output", "LayerNorm"))
        for leaf in ("weight", "bias")
    ]
    block = ["attn.qkv.weight", "attn.q_bias", "attn.v_bias"] + [
        f"{name}.{leaf}"
        for name in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for leaf in ("weight", "bias")
    ]
    embeddings = "Qformer.bert.embeddings."
    want = {"query_tokens", "image_pe.weight", "visual_encoder.cls_token", "visual_encoder.pos_embed"}
    want |= {embeddings + name for name in ("word_embeddings.weight", "position_embeddings.weight")}
    for name in ("ln_vision", "llm_proj", "visual_encoder.patch_embed.proj", embeddings + "LayerNorm"):
        want |= {name + ".weight", name + ".bias"}
    for i in range(4):
        names = layer + feed + (cross if i % 2 == 0 else [])
        want |= {f"Qformer.bert.encoder.layer.{i}.{name}" for name in names}
    want |= {f"visual_encoder.blocks.{i}.{name}" for i in range(2) for name in block}
    state = export_malmm(model, "lavis")
    assert {*state} == want
    assert state["query_tokens"].shape == (1, 8, 32) and state["visual_encoder.pos_embed"].shape == (1, 10, 48)
    assert state["visual_encoder.blocks.0.attn.qkv.weight"].shape == (144, 48)
    assert state["Qformer.bert.encoder.layer.2.crossattention.self.key.weight"].shape == (32, 48)


def test_three_files(model, tmp_path):
    """eva_vit_g, then InstructBLIP, then what was fine-tuned: later ones win, and what is of no use is reported."""
    state = export_malmm(model, "lavis")
    eva = {k.removeprefix("visual_encoder."): v for k, v in state.items() if k.startswith("visual_encoder.")}
    eva |= {"blocks.2.norm1.weight": torch.zeros(48), "norm.weight": torch.zeros(48), "head.bias": torch.zeros(3)}
    blip = {k: torch.zeros_like(v) for k, v in state.items() if not k.startswith("visual_encoder.") and "pe" not in k}
    blip |= {"Qformer.cls.predictions.bias": torch.zeros(9), "Qformer.bert.embeddings.position_ids": torch.zeros(1, 9)}
    tuned = {k: v for k, v in state.items() if not k.startswith("visual_encoder.")}
    tuned["llm_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    torch.save({"model": tuned, "epoch": 3}, tmp_path / "tuned.pth")
    torch.save(eva, tmp_path / "eva.pth")
    sources = (tmp_path / "eva.pth", {"model": blip}, tmp_path / "tuned.pth")
    found, report = load_malmm(*sources, layers=2, **SIZES)
    assert same(found, model) and not report.unexpected
    assert report.unused == ["blocks.2.norm1.weight"] and len(report.left_out) == 5
    assert "qformer.query_tokens" in report.replaced and "vision.position" not in report.replaced
    blank, report = load_malmm(eva, blip, layers=2, **SIZES)
    assert blank.time is None and blank.config.time_length == 0


def test_errors(model):
    state = export_malmm(model, "lavis")
    with pytest.raises(ValueError, match="pass vision_heads="):
        load_malmm(state)
    with pytest.raises(ValueError, match="pass heads="):
        load_malmm(state, vision_heads=4)
    lacking = {k: v for k, v in state.items() if "layer.2.crossattention.self.value.bias" not in k}
    with pytest.raises(ValueError, match="needs 4 parts"):
        load_malmm(lacking, **SIZES)
    lacking = {k: v for k, v in state.items() if not k.startswith("llm_proj.bias")}
    with pytest.raises(ValueError, match="nothing fills 1 parameters: projection"):
        load_malmm_weights(model, lacking)
    with pytest.raises(ValueError, match="both mean"):
        rename(state | {"module.query_tokens": state["query_tokens"]})
    with pytest.raises(ValueError, match="naming must be"):
        export_malmm(model, "open_clip")
    for copy in (model.fold(), model.fold(precision="int8")):
        with pytest.raises(RuntimeError, match="folded copy"):
            export_malmm(copy, "lavis")
        with pytest.raises(RuntimeError, match="folded copy"):
            load_malmm_weights(copy, state)
    for sizes in ({"heads": 0}, {"image_size": 0}):
        with pytest.raises(ValueError, match=rf"{next(iter(sizes))} must be in"):
            load_malmm(state, **SIZES | sizes)
    no_table = {k: v for k, v in state.items() if k != "image_pe.weight"}
    report = load_malmm_weights(model, no_table, allow_missing=["time"])
    assert report.missing == ["time"]


def test_position_table_of_another_grid(model):
    state = export_malmm(model, "lavis")
    state["visual_encoder.pos_embed"] = torch.randn(1, 26, 48)
    found, report = load_malmm(state, image_size=42, **SIZES)
    assert found.vision.position.shape == (10, 48) and report.reshaped == [("vision.position", (26, 48), (10, 48))]
    assert torch.equal(found.vision.position[0], state["visual_encoder.pos_embed"][0, 0])


def host(kind):
    mend_torchvision()
    transformers = pytest.importorskip("transformers")
    config, build = {
        "instructblip": (transformers.InstructBlipConfig, "InstructBlipForConditionalGeneration"),
        "instructblipvideo": (transformers.InstructBlipVideoConfig, "InstructBlipVideoForConditionalGeneration"),
        "blip2": (transformers.Blip2Config, "Blip2ForConditionalGeneration"),
    }[kind]
    model = getattr(transformers, build)(
        config(
            vision_config=dict(
                hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28,
                patch_size=14,
            ),
            qformer_config=dict(
                vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
                max_position_embeddings=32, encoder_hidden_size=48,
            ),
            text_config=dict(
                model_type="opt", vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=1,
                num_attention_heads=4, word_embed_proj_dim=32,
            ),
            num_query_tokens=8,
        )
    ).eval()  # fmt: skip
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("kind", ["instructblip", "instructblipvideo", "blip2"])
@torch.no_grad()
def test_transformers(kind):
    """Vision model, Q-Former without memory, projection, against transformers; then the weights back into it."""
    theirs = host(kind)
    ours, pixels = huggingface.malmm(theirs), torch.randn(3, 3, 28, 28)
    features = theirs.vision_model(pixels).last_hidden_state
    for source in (theirs, theirs.vision_model):
        tower = huggingface.vision_tower(source)
        torch.testing.assert_close(tower.norm(tower(pixels)[0]), features, atol=2e-5, rtol=1e-5)
    query = theirs.query_tokens.expand(3, -1, -1)
    if kind == "blip2":
        text, want = (), theirs.qformer(query_embeds=query, encoder_hidden_states=features).last_hidden_state
    else:
        ids, mask = torch.randint(1, 100, (3, 5)), torch.tensor([[1] * 5, [1] * 5, [1, 1, 1, 0, 0]])
        text, both = (ids, mask), torch.cat([torch.ones(3, 8, dtype=torch.long), mask], dim=1)
        want = theirs.qformer(
            input_ids=ids, attention_mask=both, query_embeds=query, encoder_hidden_states=features
        ).last_hidden_state[:, :8]
    got = ours.encode(features[:, None], ours.prompt(*text, batch=3), length=5)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(ours.project(got), theirs.language_projection(want), atol=2e-5, rtol=1e-5)
    back = export_malmm(ours, "huggingface")
    language_model = re.compile(r"language_model\.|(.*\.)?position_ids$")
    assert {*back} == {k for k in theirs.state_dict() if not language_model.match(k)}
    assert all(torch.equal(theirs.state_dict()[k], v) for k, v in back.items())


def test_transformers_refused():
    with pytest.raises(ValueError, match="must be an InstructBLIP or BLIP-2"):
        huggingface.malmm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must be one of transformers"):
        huggingface.vision_tower(nn.Linear(2, 2))
