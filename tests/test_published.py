"""Each published file as its owner has it, loaded by the documented call, against numbers of the public code."""

import pytest
import torch

from pyvidx.hosts.open import open_model
from pyvidx.weights.bt_adapter import load_official
from pyvidx.weights.malmm import load_malmm
from pyvidx.weights.projector import load_projector
from tests.golden.vectors import FOLDER, VectorFile

BOUND = 2e-5  # of max(1, largest), as in tests/golden


def vectors(name):
    path = FOLDER / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return VectorFile(path)


def close(got, want):
    error = (got.detach().double() - want.double()).abs().max().item()
    assert got.shape == want.shape and error <= BOUND * max(1.0, want.abs().max().item()), error


def pretraining_file(path, weights):
    """As mmengine saves it: the tower under `backbone.`, with text tower, training head and bookkeeping beside it."""
    state = {f"backbone.{name}": value for name, value in weights.items()}
    state |= {"extra_proj.0.weight": torch.zeros(2), "text_backbone.text_projection.weight": torch.zeros(2, 2)}
    torch.save({"meta": {"epoch": 1, "experiment_name": "webvid"}, "state_dict": state}, path)
    return path


def test_pretraining_file(tmp_path):
    """Retrieval: with its gates, and without them, as the public zero-shot configurations run it."""
    file = vectors("bt_adapter/mma_eval")
    path = pretraining_file(tmp_path / "pretrain_btadapter_weight.pth", file.part("weights."))
    model, report = load_official(path, heads=4)
    assert (model.compat, model.variant) == ("official", "mma") and not report.missing and not report.unexpected
    video = file.tensors["in.T8_B2.video"]
    close(model(video).pooled, file.tensors["out.T8_B2.gated.embed"])
    close(open_model(path, gated=False, heads=4)[0](video).pooled, file.tensors["out.T8_B2.ungated.embed"])


def test_pretraining_file_as_a_chat_tower(tmp_path):
    """Parts of the pretraining file are the chat tower: from pixels and from stored features."""
    file = vectors("bt_adapter/llava_infer")
    weights = file.part("weights.")
    weights["visual_projection.weight"] = torch.randn(8, 64)  # which made the retrieval tower of it
    path = pretraining_file(tmp_path / "pretrain_btadapter_weight.pth", weights)
    model, report = load_official(path, part="tokens", heads=4)
    assert model.variant == "llava" and not report.assumed
    for run in ("T8", "T66", "B2_T8"):
        close(model(file.tensors[f"in.{run}.pixels"]).tokens, file.tensors[f"out.{run}.llm_tokens"])
    model, _ = load_official(path, part="features", heads=4)
    close(model(file.tensors["out.T4.hidden.3"]).tokens, file.tensors["out.T4.llm_tokens"])


def chat_files(folder, file):
    """A folder of transformers' CLIP, the tuned branch, and the projector, whose weights are returned."""
    clip = folder / "clip-vit-large-patch14"
    clip.mkdir()
    torch.save(file.part("clip."), clip / "pytorch_model.bin")
    (clip / "config.json").write_text('{"vision_config": {"num_attention_heads": 2, "hidden_act": "quick_gelu"}}')
    torch.save(file.part("sft."), folder / "sft_btadapter_weight.bin")
    published = {"model.mm_projector.weight": torch.randn(48, 32), "model.mm_projector.bias": torch.randn(48)}
    torch.save(published | {"model.embed_tokens.weight": torch.zeros(4, 48)}, folder / "sft_mm_projector.bin")
    return published


def test_tuned_files(tmp_path):
    """The chat model's vision side from a folder of transformers, the tuned branch and the projector."""
    file = vectors("bt_adapter/llava_sft")
    published = chat_files(tmp_path, file)
    folder = tmp_path / "clip-vit-large-patch14"

    model, report = load_official(folder, tmp_path / "sft_btadapter_weight.bin", part="tokens")
    projector = load_projector(tmp_path / "sft_mm_projector.bin")
    tokens = projector(model(file.tensors["pixels_8"]).tokens)

    weight, bias = published.values()
    close(tokens, file.tensors["tokens_8"] @ weight.T + bias)
    assert not any(p.requires_grad for p in projector.parameters())
    together = file.part("sft.") | published  # a whole chat model's file
    _, report = load_official(folder, together, part="tokens")
    assert {*published} <= {*report.left_out} and not report.unexpected


def test_projector_errors(tmp_path):
    whole = {"model.mm_projector.weight": torch.randn(48, 32), "model.mm_projector.bias": torch.randn(48)}
    torch.save(whole, tmp_path / "sft_mm_projector.bin")
    data = (tmp_path / "sft_mm_projector.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(data[:4096])  # as the public copy seems to be
    with pytest.raises(ValueError, match=r"cut\.bin is damaged or truncated.*16,777,216 is cut"):
        load_projector(tmp_path / "cut.bin")
    with pytest.raises(ValueError, match="mm_projector.weight and mm_projector.bias"):
        load_projector({"mm_projector.0.weight": torch.zeros(2, 2), "mm_projector.2.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="shapes differ: bias"):
        load_projector(whole | {"model.mm_projector.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="must be floating"):
        load_projector({name: value.int() for name, value in whole.items()})


def test_malmm_files(tmp_path):
    """MA-LMM: the image tower, InstructBLIP, and what was fine-tuned, which replaces the untuned."""
    file = vectors("ma_lmm/qformer_b1_t9_m4")
    weights = file.part("weights.")
    tower = {k.removeprefix("visual_encoder."): v for k, v in weights.items() if k.startswith("visual_encoder.")}
    tuned = {k: v for k, v in weights.items() if not k.startswith("visual_encoder.")}
    untuned = {k: torch.zeros_like(v) for k, v in tuned.items() if k != "image_pe.weight"}
    tuned["llm_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    torch.save(tower, tmp_path / "eva_vit_g.pth")
    torch.save({"model": untuned}, tmp_path / "instruct_blip_vicuna7b_trimmed.pth")
    torch.save(
        {"model": tuned, "optimizer": {"state": {}}, "config": {}, "scaler": {}, "epoch": 3}, tmp_path / "ft.pth"
    )
    names = ("eva_vit_g.pth", "instruct_blip_vicuna7b_trimmed.pth", "ft.pth")

    model, report = load_malmm(*(tmp_path / name for name in names), vision_heads=4, heads=4)

    assert not report.missing and not report.unexpected and "qformer.query_tokens" in report.replaced
    text = file.tensors["in.text_ids"], file.tensors["in.text_mask"]
    with torch.no_grad():
        features = model.features(file.tensors["in.image"].transpose(1, 2))
        tokens = model.project(model.encode(features, model.prompt(*text), length=file.meta["M"]))
    close(tokens, file.tensors["out.inputs_llm"])
