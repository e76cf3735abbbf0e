"""Pixels of another size than a tower was made for: the position table is resized, as transformers' CLIP does it."""

import dataclasses

import pytest
import torch

from pyvidx import temporal
from pyvidx.backbones import ViT
from pyvidx.hosts import huggingface
from pyvidx.layers.patch import resize_positions
from pyvidx.models import BTAdapter, VideoEncoder
from tests.test_backbones import SIZES, hf_config
from tests.test_models import CONFIG, VISION, close, randomized
from tests.torchvision_shim import mend_torchvision

mend_torchvision()

LARGER = dataclasses.replace(VISION, image_size=20)
OPTIONS = {"grid_pool": {"stride": 2}, "st_adapter": {"kernel": (3, 3, 3), "width": 4}}


def resized(model, other, name):
    """The weights of model in one that was made for larger images."""
    state = dict(model.state_dict())
    state[name] = resize_positions(state[name], 5, 5)
    other.load_state_dict(state)
    return other.to(state[name].dtype).eval()


@torch.no_grad()
@pytest.mark.parametrize("size", [(28, 28), (42, 42), (21, 35)])
def test_as_transformers_does(size):
    transformers = pytest.importorskip("transformers")
    theirs = randomized(transformers.CLIPVisionModel(hf_config(SIZES)))
    tower = huggingface.vision_tower(theirs)
    pixels = torch.randn(2, 3, *size)
    want = theirs(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-1]
    close(tower(pixels, interpolate=True)[0], want, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("compat, variant", [("paper", "mma"), ("official", "llava")])
def test_bt_adapter(compat, variant, folded):
    model = randomized(BTAdapter(CONFIG, compat=compat, variant=variant)).double()
    larger = BTAdapter(dataclasses.replace(CONFIG, vision=LARGER), compat=compat, variant=variant)
    resized(model, larger, "tower.position")
    model = model.fold() if folded else model
    pixels = torch.randn(2, 4, 3, 20, 20).double()
    got, want = model(pixels, interpolate=True), larger(pixels)
    close(got.tokens, want.tokens)
    close(got.pooled, want.pooled)
    xs = model.tower(pixels, range(CONFIG.fork - 1, VISION.layers), interpolate=True)
    close(model.from_features(xs[0], interpolate=True).pooled, want.pooled)
    close(model.from_layers(xs[1:], interpolate=True).tokens, want.tokens)
    with pytest.raises(ValueError, match="12x12.*interpolate=True"):
        model(pixels)
    with pytest.raises(ValueError, match="interpolate=True"):
        model.from_layers(xs[1:])


@torch.no_grad()
@pytest.mark.parametrize("name", temporal.names())
def test_temporal_modules(name):
    options = OPTIONS.get(name, {})
    model = randomized(VideoEncoder(ViT(VISION), temporal.create(name, VISION, **options))).double()
    larger = VideoEncoder(ViT(LARGER), temporal.create(name, LARGER, **options))
    resized(model, larger, "tower.position")
    pixels = torch.randn(2, 3, 3, 20, 20).double()
    mask = torch.tensor([[True, True, True], [True, False, True]])
    for real in (None, mask):
        got, want = model(pixels, frame_mask=real, interpolate=True), larger(pixels, frame_mask=real)
        close(got.tokens, want.tokens)
        close(got.pooled, want.pooled)
    with pytest.raises(ValueError, match="12x12.*interpolate=True"):
        model(pixels)
    oblong = pixels[..., :12, :]
    got = model(oblong, interpolate=True)
    assert got.pooled.isfinite().all() and got.tokens.isfinite().all()
    if model.temporal.reads_only:
        xs = model.layers(oblong, interpolate=True)
        close(model.from_layers(xs, interpolate=(3, 5)).tokens, got.tokens)
        close(
            model.from_layers(model.layers(pixels, interpolate=True), interpolate=True).tokens,
            model(pixels, interpolate=True).tokens,
        )
        with pytest.raises(ValueError, match=r"\(rows, columns\)"):
            model.from_layers(xs, interpolate=True)
        for grid in (3, (3, 5, 1), (-3, -5)):
            with pytest.raises(ValueError, match=r"interpolate must be a bool or \(rows, columns\)"):
                model.from_layers(xs, interpolate=grid)
