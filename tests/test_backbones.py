"""ViT against transformers and open_clip, on tiny random towers."""

import dataclasses

import pytest
import torch

from pyvidx.backbones.vit import ViT, ViTConfig
from pyvidx.hosts import huggingface
from pyvidx.hosts import open_clip as open_clip_weights
from tests.torchvision_shim import mend_torchvision

mend_torchvision()

SIZES = ViTConfig(
    image_size=28, patch_size=7, width=32, heads=4, layers=3, mlp_width=64, embed_dim=24, hidden_act="quick_gelu"
)


@pytest.fixture(params=["quick_gelu", "gelu"])
def sizes(request):
    return dataclasses.replace(SIZES, hidden_act=request.param)


@pytest.fixture
def pixels():
    return torch.randn(4, 3, SIZES.image_size, SIZES.image_size)


def hf_config(sizes):
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPVisionConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        hidden_act=sizes.hidden_act,
        projection_dim=sizes.embed_dim,
    )


def hf_clip(sizes):
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 9, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    vision = hf_config(sizes).to_dict()
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=sizes.embed_dim)
    )


def randomized(model):
    """Every parameter of ordinary size, so that none hides behind its initial zeros or ones."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1.0, want.abs().max().item()))


@torch.no_grad()
def test_equals_transformers(sizes, pixels):
    theirs = randomized(hf_clip(sizes))
    ours = huggingface.vision_tower(theirs)
    assert ours.config == sizes
    hidden = theirs.vision_model(pixels, output_hidden_states=True).hidden_states
    for got, want in zip(ours(pixels, range(sizes.layers)), hidden[1:]):
        close(got, want)
    close(ours.embed(pixels), hidden[0])
    features = theirs.get_image_features(pixel_values=pixels)
    close(ours.embedding(ours(pixels)[0]), getattr(features, "pooler_output", features))


@torch.no_grad()
@pytest.mark.parametrize("name", ["CLIPVisionModel", "CLIPVisionModelWithProjection"])
def test_equals_transformers_vision_models(name, pixels):
    transformers = pytest.importorskip("transformers")
    theirs = randomized(getattr(transformers, name)(hf_config(SIZES)))
    ours = huggingface.vision_tower(theirs)
    result = theirs(pixels)
    close(ours(pixels)[0], result.last_hidden_state)
    projected = name.endswith("Projection")
    assert (ours.projection is not None) == projected
    close(ours.embedding(ours(pixels)[0]), result.image_embeds if projected else result.pooler_output)


@torch.no_grad()
def test_another_image_size_as_transformers(pixels):
    theirs = randomized(hf_clip(SIZES)).vision_model
    ours = huggingface.vision_tower(theirs)
    wide = torch.randn(2, 3, 35, 42)
    close(ours(wide, interpolate=True)[0], theirs(wide, interpolate_pos_encoding=True).last_hidden_state)
    with pytest.raises(ValueError, match="28x28.*interpolate"):
        ours(wide)


@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False], ids=["CLIP", "tower"])
def test_equals_open_clip(sizes, pixels, whole):
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 3, "width": 32, "head_width": 8, "patch_size": 7, "image_size": 28, "mlp_ratio": 2.0}
    text = {"context_length": 8, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1}
    quick = sizes.hidden_act == "quick_gelu"
    theirs = randomized(open_clip.model.CLIP(embed_dim=24, quick_gelu=quick, vision_cfg=vision, text_cfg=text))
    ours = open_clip_weights.vision_tower(theirs if whole else theirs.visual)
    assert ours.config == sizes
    found = theirs.visual.forward_intermediates(
        pixels, indices=[0, 1, 2], normalize_intermediates=False, output_fmt="NLC", output_extra_tokens=True
    )
    for got, patches, cls in zip(
        ours(pixels, range(3)), found["image_intermediates"], found["image_intermediates_prefix"]
    ):
        close(got, torch.cat([cls, patches], dim=1))
    close(ours.embedding(ours(pixels)[0]), theirs.encode_image(pixels))


def test_open_clip_refuses_what_differs():
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 1, "width": 32, "head_width": 8, "patch_size": 7, "image_size": 28, "ls_init_value": 0.1}
    text = {"context_length": 8, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1}
    with pytest.raises(ValueError, match="layer scale"):
        open_clip_weights.vision_tower(open_clip.model.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text))
    with pytest.raises(ValueError, match="VisionTransformer"):
        open_clip_weights.vision_tower(torch.nn.Linear(2, 2))


def test_the_activation_matters(pixels):
    """Same names, same shapes, other numbers: why every source must say its activation."""
    quick, plain = ViT(SIZES), ViT(dataclasses.replace(SIZES, hidden_act="gelu"))
    plain.load_state_dict(quick.state_dict())
    assert (quick(pixels)[0] - plain(pixels)[0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="hidden_act"):
        dataclasses.replace(SIZES, hidden_act="relu")


def test_layers_and_leading_axes(pixels):
    tower = ViT(SIZES)
    video = pixels.view(2, 2, 3, 28, 28)
    first, last = tower(video, [0, 2])
    assert first.shape == last.shape == (2, 2, 17, 32)
    close(last.flatten(0, 1), tower(pixels)[0])
    close(tower.run(first, [1])[0] * 0 + tower.run(tower.embed(video), [2])[0], last)
    for wrong in ([], [2, 0], [3], [-1]):
        with pytest.raises(ValueError, match="layers"):
            tower(pixels, wrong)


def test_a_part_of_the_tower():
    tower = ViT(SIZES, layers=range(1, 3), embeddings=False, head=False)
    whole = ViT(SIZES)
    tower.load_state_dict({k: v for k, v in whole.state_dict().items() if k in tower.state_dict()})
    x = torch.randn(2, 17, 32)
    close(tower.run(x)[0], whole.blocks["2"](whole.blocks["1"](x)))
    with pytest.raises(ValueError, match="head"):
        tower.embedding(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, pixels):
    tower = ViT(SIZES)
    want = tower(pixels)[0]
    got = tower.to(dtype)(pixels)[0]
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=0, atol=0.06 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize(
    "shape, dtype", [((2, 3, 28), torch.float32), ((2, 1, 28, 28), torch.float32), ((2, 3, 28, 28), torch.uint8)]
)
def test_rejects(shape, dtype):
    with pytest.raises(ValueError, match="pixels must be"):
        ViT(SIZES)(torch.zeros(shape, dtype=dtype))
