"""EVA's tower from LAVIS' names, from a folder of transformers, and as EVA-CLIP has it, with a head of its own."""

import dataclasses

import pytest
import torch
from torch import nn

from pyvidx.backbones import EVA_G
from pyvidx.models.malmm_config import MALMMConfig
from pyvidx.reference.malmm import ReferenceMALMM
from pyvidx.weights.towers import vision_tower
from tests.test_backbones import close, randomized
from tests.test_malmm_checkpoints import host
from tests.torchvision_shim import mend_torchvision

mend_torchvision()


def lavis():
    """MA-LMM in plain torch, whose k has no bias."""
    return randomized(ReferenceMALMM(MALMMConfig.tiny()))


@torch.no_grad()
def test_lavis():
    theirs, pixels = lavis(), torch.randn(2, 3, 42, 42)
    ours = vision_tower(theirs.state_dict(), heads=4)
    assert ours.config == MALMMConfig.tiny().vision  # "ln_vision" has another eps than the blocks
    trace = {}
    theirs.visual_encoder(pixels, trace)
    for i, got in enumerate(ours.run(ours.embed(pixels), range(2))):
        close(got, trace[f"block{i}"])
    close(ours.norm(ours(pixels)[0]), theirs.features(pixels))


@torch.no_grad()
def test_eva_clip():
    """The tower that BT-Adapter's EVA variant stands beside: a norm and a head with a bias, no ln_vision."""
    theirs, pixels = lavis().visual_encoder, torch.randn(2, 3, 42, 42)
    theirs.norm, theirs.head = randomized(nn.LayerNorm(48, eps=1e-6)), nn.Linear(48, 6)
    ours = vision_tower({f"visual.{k}": v for k, v in theirs.state_dict().items()}, heads=4)
    sizes = dict(image_size=42, width=48, heads=4, layers=2, mlp_width=96)
    assert ours.config == dataclasses.replace(EVA_G, **sizes, embed_dim=6, norm_eps=None, projection_bias=True)
    close(ours.embedding(ours(pixels)[0]), theirs.head(theirs.norm(theirs(pixels))[:, 0]))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["blip2", "instructblip"])
def test_folder_of_transformers(kind, tmp_path):
    theirs, pixels = host(kind), torch.randn(2, 3, 28, 28)
    theirs.save_pretrained(tmp_path)
    ours = vision_tower(tmp_path)
    found = theirs.vision_model(pixels, output_hidden_states=True)
    for got, want in zip((x := ours.embed(pixels), *ours.run(x, ours.layers)), found.hidden_states, strict=True):
        close(got, want)
    close(ours.norm(ours(pixels)[0]), found.last_hidden_state)
    oblong = torch.randn(2, 3, 42, 28)
    want = theirs.vision_model(oblong, interpolate_pos_encoding=True).last_hidden_state
    close(ours.norm(ours(oblong, interpolate=True)[0]), want)
