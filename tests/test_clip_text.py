"""TextTower against transformers and open_clip, on tiny random towers."""

import pytest
import torch

from pyvidx.backbones import TextConfig, TextTower
from pyvidx.weights.text_towers import text_tower
from tests.test_backbones import close, randomized
from tests.torchvision_shim import mend_torchvision

mend_torchvision()

SIZES = TextConfig(vocab=30, context=10, width=24, heads=3, layers=3, mlp_width=96, embed_dim=20)
IDS = torch.tensor([[27, 4, 9, 29, 0, 0, 0], [27, 29, 3, 3, 3, 3, 3], [27, 5, 6, 7, 8, 2, 29]])


def of_transformers(act="quick_gelu"):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=30, hidden_size=24, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3,
        max_position_embeddings=10, projection_dim=20, hidden_act=act, bos_token_id=27, eos_token_id=29, pad_token_id=0,
    )  # fmt: skip
    return randomized(transformers.CLIPTextModelWithProjection(config))


@torch.no_grad()
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("wrapper", ["", "text_backbone.", "module.text_backbone."])
def test_equals_transformers(act, wrapper):
    theirs = of_transformers(act)
    ours = text_tower({wrapper + k: v for k, v in theirs.state_dict().items()}, heads=3, hidden_act=act)
    assert (ours.config.vocab, ours.config.context, ours.config.layers) == (30, 10, 3)
    for ids in (IDS, torch.cat([IDS, torch.zeros(3, 3, dtype=torch.int64)], dim=1)):
        close(ours(ids), theirs(ids).text_embeds)
    assert not any(p.requires_grad for p in ours.parameters())


@torch.no_grad()
@pytest.mark.parametrize("quick", [True, False], ids=["quick_gelu", "gelu"])
def test_equals_open_clip(quick):
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 7, "image_size": 28}
    text = {"context_length": 10, "vocab_size": 30, "width": 24, "heads": 3, "layers": 3}
    theirs = randomized(open_clip.model.CLIP(embed_dim=20, quick_gelu=quick, vision_cfg=vision, text_cfg=text))
    ours = text_tower(theirs.state_dict(), heads=3, hidden_act="quick_gelu" if quick else "gelu")
    ids = torch.cat([IDS, torch.zeros(3, 3, dtype=torch.int64)], dim=1)
    close(ours(ids), theirs.encode_text(ids))


@torch.no_grad()
def test_what_follows_the_end_has_no_effect():
    tower = randomized(TextTower(SIZES))
    other = IDS.clone()
    other[0, 4:] = torch.tensor([11, 12, 13])
    close(tower(other), tower(IDS))
    close(tower(IDS[1:2, :2]), tower(IDS)[1:2])
    other[0, 1] = 11
    assert (tower(other) - tower(IDS)).abs().max() > 1e-3


def test_wrong_weights_and_ids():
    state = {f"text_model.{k}": v for k, v in of_transformers().text_model.state_dict().items()}
    projection = {"text_projection.weight": torch.randn(20, 24)}
    with pytest.raises(ValueError, match="no sizes without projection.weight"):
        text_tower(state, heads=3)
    with pytest.raises(ValueError, match="not a multiple of 64"):
        text_tower(state | projection)
    with pytest.raises(ValueError, match="odd.weight is not understood"):
        text_tower(state | projection | {"odd.weight": torch.zeros(1)}, heads=3)
    gone = next(k for k in state if k.endswith("layers.1.self_attn.k_proj.bias"))
    with pytest.raises(ValueError, match=r"blocks\.1\.qkv\.bias needs q, k and v"):
        text_tower({k: v for k, v in (state | projection).items() if k != gone}, heads=3)
    gone = next(k for k in state if k.endswith("final_layer_norm.bias"))
    with pytest.raises(ValueError, match="missing.*norm.bias"):
        text_tower({k: v for k, v in (state | projection).items() if k != gone}, heads=3)
    tower = text_tower(state | projection, heads=3)
    for ids in (IDS[0], IDS.int(), torch.zeros(1, 11, dtype=torch.int64)):
        with pytest.raises(ValueError, match="ids must be int64"):
            tower(ids)


@torch.no_grad()
def test_a_head_of_the_image_tower_is_none_of_the_text():
    """EVA-CLIP's image tower has one, beside the text tower of a CLIP."""
    theirs = of_transformers().state_dict()
    whole = theirs | {"visual.head.weight": torch.zeros(20, 8), "visual.head.bias": torch.zeros(20)}
    ours = text_tower(whole, heads=3, hidden_act="quick_gelu")
    assert (ours.config.pool, ours.config.eps) == ("end", 1e-5)
    close(ours(IDS), text_tower(theirs, heads=3, hidden_act="quick_gelu")(IDS))
