"""SigLIP's towers against transformers and open_clip, on tiny random ones: every hidden state, pooled, text."""

import json

import numpy as np
import pytest
import torch

from pyvidx.backbones import SIGLIP_B, ViT
from pyvidx.hosts import huggingface
from pyvidx.hosts import open_clip as open_clip_weights
from pyvidx.weights.state import state_of
from pyvidx.weights.text_towers import text_tower
from pyvidx.weights.towers import told_by_config, vision_tower
from tests.test_backbones import close, randomized
from tests.torchvision_shim import mend_torchvision

mend_torchvision()

L, C, CONTEXT = 3, 64, 7
SIZES = dict(hidden_size=C, intermediate_size=80, num_hidden_layers=L, num_attention_heads=4)
IDS = torch.randint(0, 30, (3, CONTEXT), generator=torch.Generator().manual_seed(0))


def of_transformers(image_size=30, **vision):  # 30 = 4 * 7 + 2, as 384 = 27 * 14 + 6
    transformers = pytest.importorskip("transformers")
    text = {"vocab_size": 30, "max_position_embeddings": CONTEXT, "projection_size": 48, **SIZES}
    vision = {"image_size": image_size, "patch_size": 7, **SIZES, **vision}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.SiglipConfig(text_config=text | special, vision_config=vision)
    return randomized(transformers.SiglipModel(config))


def check_vision(ours, theirs, pixels, **options):
    """Every hidden state, the last one normalized, and the embedding."""
    want = theirs(pixels, output_hidden_states=True, **options)
    interpolate = bool(options)
    x = ours.embed(pixels, interpolate=interpolate)
    for got, hidden in zip((x, *ours.run(x, range(L))), want.hidden_states, strict=True):
        close(got, hidden)
    last = ours(pixels, interpolate=interpolate)[0]
    close(ours.norm(ours.own(last)), want.last_hidden_state)
    if want.pooler_output is not None:
        close(ours.embedding(last), want.pooler_output)


@torch.no_grad()
def test_equals_transformers():
    theirs, pixels = of_transformers(), torch.randn(2, 3, 30, 30)
    ours = huggingface.vision_tower(theirs)
    assert (ours.config.image_size, ours.config.side, ours.config.pool) == (30, 4, "attention")
    check_vision(ours, theirs.vision_model, pixels)
    for size in ((30, 44), (21, 14)):
        check_vision(ours, theirs.vision_model, torch.randn(2, 3, *size), interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="30x30.*interpolate=True"):
        ours(torch.randn(1, 3, 42, 30))
    text = huggingface.text_tower(theirs)
    close(text(IDS), theirs.get_text_features(IDS).pooler_output)
    close(text(IDS[:, :4]), theirs.get_text_features(IDS[:, :4]).pooler_output)


@torch.no_grad()
def test_a_tower_without_its_head():
    """As language models carry it: the mean of the normalized tokens stands for the class token."""
    theirs, pixels = of_transformers(vision_use_head=False).vision_model, torch.randn(2, 3, 30, 30)
    ours = huggingface.vision_tower(theirs)
    assert ours.config.pool == "mean"
    check_vision(ours, theirs, pixels)
    close(ours.embedding(ours(pixels)[0]), theirs(pixels).last_hidden_state.mean(dim=1))


@torch.no_grad()
@pytest.mark.parametrize("shards", [False, True])
def test_folder_of_transformers(tmp_path, shards):
    theirs, pixels = of_transformers(), torch.randn(1, 3, 30, 30)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB" if shards else "1GB")
    assert shards == (tmp_path / "model.safetensors.index.json").exists()
    check_vision(vision_tower(tmp_path), theirs.vision_model, pixels)
    close(text_tower(tmp_path)(IDS), theirs.get_text_features(IDS).pooler_output)
    # Without a config sizes are the published ones of its kind: heads of 64 channels, whole patches.
    bare = theirs.state_dict()
    ours = vision_tower(bare, heads=4, image_size=30)
    assert ours.config == vision_tower(tmp_path).config
    assert vision_tower(bare).config.heads == 1 and vision_tower(bare).config.image_size == 28
    assert text_tower(bare, heads=4).config == text_tower(tmp_path).config


def of_open_clip(act):
    open_clip, timm = pytest.importorskip("open_clip"), pytest.importorskip("timm")
    name = f"vit_{act}_siglip_of_pyvidx"

    def tiny(num_classes, global_pool, **_):
        sizes = dict(img_size=30, patch_size=7, embed_dim=C, depth=L, num_heads=4, mlp_ratio=1.25)
        kind = dict(class_token=False, act_layer=act, num_classes=num_classes, global_pool=global_pool)
        return timm.models.vision_transformer.VisionTransformer(**sizes, **kind)

    tiny.__name__, tiny.__module__ = name, "timm.models.vision_transformer"
    if not timm.is_model(name):
        timm.models.register_model(tiny)
    vision = {"image_size": 30, "timm_model_name": name, "timm_pool": "map", "timm_proj": "none"}
    text = {
        "context_length": CONTEXT, "vocab_size": 30, "width": C, "heads": 4, "layers": L, "mlp_ratio": 1.25,
        "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
    }  # fmt: skip
    text |= {"act_kwargs": {"approximate": "tanh"}} if act == "gelu_tanh" else {}
    config = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}
    model = open_clip.model.CustomTextCLIP(**config, init_logit_bias=-10.0)
    return randomized(model), {"model_cfg": config | {"custom_text": True}}


@torch.no_grad()
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
def test_equals_open_clip(act, tmp_path):
    theirs, config = of_open_clip(act)
    pixels = torch.randn(2, 3, 30, 30)
    ours, text = open_clip_weights.vision_tower(theirs), open_clip_weights.text_tower(theirs)
    assert ours.config.hidden_act == text.config.hidden_act == act and ours.config.pool == "attention"
    _, found = theirs.visual.trunk.forward_intermediates(pixels, norm=False, output_fmt="NLC")
    for got, want in zip(ours.run(ours.embed(pixels)), found[-1:], strict=True):
        close(got, want)
    close(ours.embedding(ours(pixels)[0]), theirs.encode_image(pixels))
    close(text(IDS), theirs.encode_text(IDS))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    read = vision_tower(tmp_path, heads=4, hidden_act=act)
    assert read.config == ours.config and text_tower(tmp_path).config == text.config
    close(read(pixels)[0], ours(pixels)[0])


def test_open_clip_refuses_what_differs():
    theirs, _ = of_open_clip("gelu")
    theirs.visual.trunk.fc_norm = torch.nn.LayerNorm(C)
    with pytest.raises(ValueError, match="another end or beginning"):
        open_clip_weights.vision_tower(theirs)
    theirs.text.pool_type = "first"
    with pytest.raises(ValueError, match="pooling 'first'"):
        open_clip_weights.text_tower(theirs)


@torch.no_grad()
def test_a_pool_that_must_be_called():
    """An adapter in the pool's projection takes effect."""
    ours, pixels = huggingface.vision_tower(of_transformers()), torch.randn(2, 3, 30, 30)
    mask = torch.rand(2, 16) < 0.7
    want, masked = ours(pixels)[0], ours.with_class(ours.run(ours.embed(pixels))[0], mask)
    ours.pool.qkv = torch.nn.Sequential(ours.pool.qkv)
    close(ours(pixels)[0], want)
    close(ours.with_class(ours.run(ours.embed(pixels))[0], mask), masked)
    assert (masked[:, 0] - want[:, 0]).abs().max() > 1e-3 and torch.equal(masked[:, 1:], want[:, 1:])


def test_published_sizes():
    with torch.device("meta"):
        tower = ViT(SIGLIP_B)
    assert sum(p.numel() for p in tower.parameters()) == 92_884_224


def of_big_vision(theirs, stacked):
    """The weights in the layout of the official files."""
    H, arrays = 4, {"params/t": np.zeros(1, np.float32), "params/b": np.zeros(1, np.float32)}
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}

    def linear(place, key, heads=None):
        weight, bias = state[f"{key}.weight"].T, state[f"{key}.bias"]
        if heads == "in":
            weight, bias = weight.reshape(C, H, -1), bias.reshape(H, -1)
        elif heads == "out":
            weight = weight.reshape(H, -1, C)
        arrays[f"params/{place}/kernel"], arrays[f"params/{place}/bias"] = weight, bias

    def norm(place, key):
        arrays[f"params/{place}/scale"], arrays[f"params/{place}/bias"] = state[f"{key}.weight"], state[f"{key}.bias"]

    for place, key in (("img/Transformer", "vision_model"), ("txt/Encoder_0", "text_model")):
        for i in range(L):
            to, of = f"{place}/encoderblock_{i}", f"{key}.encoder.layers.{i}"
            norm(f"{to}/LayerNorm_0", f"{of}.layer_norm1")
            norm(f"{to}/LayerNorm_1", f"{of}.layer_norm2")
            for name in ("query", "key", "value"):
                linear(f"{to}/MultiHeadDotProductAttention_0/{name}", f"{of}.self_attn.{name[0]}_proj", "in")
            linear(f"{to}/MultiHeadDotProductAttention_0/out", f"{of}.self_attn.out_proj", "out")
            linear(f"{to}/MlpBlock_0/Dense_0", f"{of}.mlp.fc1")
            linear(f"{to}/MlpBlock_0/Dense_1", f"{of}.mlp.fc2")
    if stacked:
        for key in [k for k in arrays if "encoderblock_0" in k]:
            parts = [arrays.pop(key.replace("encoderblock_0", f"encoderblock_{i}")) for i in range(L)]
            arrays[key.replace("encoderblock_0", "encoderblock")] = np.stack(parts)
    norm("img/Transformer/encoder_norm", "vision_model.post_layernorm")
    norm("txt/Encoder_0/encoder_norm", "text_model.final_layer_norm")
    linear("txt/head", "text_model.head")
    head = "vision_model.head"
    for i, name in enumerate(("query", "key", "value")):
        for leaf in ("weight", "bias"):
            state[f"{name}.{leaf}"] = np.split(state[f"{head}.attention.in_proj_{leaf}"], 3)[i]
        linear(f"img/MAPHead_0/MultiHeadDotProductAttention_0/{name}", name, "in")
    linear("img/MAPHead_0/MultiHeadDotProductAttention_0/out", f"{head}.attention.out_proj", "out")
    norm("img/MAPHead_0/LayerNorm_0", f"{head}.layernorm")
    linear("img/MAPHead_0/MlpBlock_0/Dense_0", f"{head}.mlp.fc1")
    linear("img/MAPHead_0/MlpBlock_0/Dense_1", f"{head}.mlp.fc2")
    embeddings = {k.rpartition("embeddings.")[2]: v for k, v in state.items() if k.startswith("vision_model.emb")}
    arrays["params/img/embedding/kernel"] = embeddings["patch_embedding.weight"].transpose(2, 3, 1, 0)
    arrays["params/img/embedding/bias"] = embeddings["patch_embedding.bias"]
    arrays["params/img/pos_embedding"] = embeddings["position_embedding.weight"][None]
    arrays["params/img/MAPHead_0/probe"] = state[f"{head}.probe"]
    arrays["params/txt/Embed_0/embedding"] = state["text_model.embeddings.token_embedding.weight"]
    arrays["params/txt/pos_embedding"] = state["text_model.embeddings.position_embedding.weight"][None]
    return arrays


@torch.no_grad()
@pytest.mark.parametrize("stacked", [False, True])
def test_official_files(stacked, tmp_path):
    """big_vision's .npz, layers one by one or stacked."""
    theirs, pixels = of_transformers(), torch.randn(2, 3, 30, 30)
    np.savez(tmp_path / "webli.npz", **of_big_vision(theirs, stacked))
    check_vision(vision_tower(tmp_path / "webli.npz", heads=4, image_size=30), theirs.vision_model, pixels)
    close(text_tower(tmp_path / "webli.npz", heads=4)(IDS), theirs.get_text_features(IDS).pooler_output)
    np.savez(tmp_path / "webli.npz", **of_big_vision(theirs, stacked) | {"params/img/odd": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match="params/img/odd"):
        vision_tower(tmp_path / "webli.npz", heads=4)
    (tmp_path / "webli.npz").write_bytes((tmp_path / "webli.npz").read_bytes()[:-400])
    with pytest.raises(ValueError, match=r"webli\.npz.*damaged"):
        vision_tower(tmp_path / "webli.npz")


def test_official_files_of_other_axes():
    pool = "params/img/MAPHead_0/MultiHeadDotProductAttention_0"
    arrays = {f"{pool}/{name}/kernel": torch.zeros(4, 2, 2) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match="in_proj_weight needs parts of one shape"):
        state_of(arrays | {f"{pool}/value/kernel": torch.zeros(3, 2, 2)})
    with pytest.raises(ValueError, match="needs parts of one shape"):
        state_of(dict.fromkeys(arrays, torch.tensor(1.0)))
    with pytest.raises(ValueError, match="must have an axis for the layers"):
        state_of({"params/img/Transformer/encoderblock/LayerNorm_0/scale": torch.tensor(1.0)})


def test_what_a_config_tells():
    """transformers leaves out its own defaults, and writes some sizes as height and width."""
    told = told_by_config({"model_type": "siglip_vision_model", "image_size": [30, 30]})
    assert told == (12, "gelu_tanh", 1e-6, 30)
    assert told_by_config({"model_type": "clip", "text_config": {}}, "text") == (8, "quick_gelu", 1e-5, None)
    with pytest.raises(ValueError, match="must be square"):
        told_by_config({"model_type": "siglip_vision_model", "image_size": [30, 20]})
    with pytest.raises(ValueError, match="got 'siglip2'"):
        told_by_config({"model_type": "siglip2"})
    naflex = {"vision_model.embeddings.patch_embedding.weight": torch.zeros(64, 147)}
    naflex |= {"vision_model.embeddings.position_embedding.weight": torch.zeros(16, 64)}
    naflex |= {"vision_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(80, 64)}
    with pytest.raises(ValueError, match="NaFlex"):
        vision_tower(naflex)
