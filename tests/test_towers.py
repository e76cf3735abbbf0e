"""Every temporal module on every tower: CLIP's, EVA's, SigLIP's and SigLIP's without its head. CLIP's are held to more
properties in test_temporal."""

import dataclasses
import math

import pytest
import torch

from pyvidx import temporal
from pyvidx.backbones import EVA_G, SIGLIP_B, ViT, ViTConfig
from pyvidx.layers.patch import resize_positions
from pyvidx.models import VideoEncoder
from tests.test_models import close, randomized

SMALL = dict(image_size=12, patch_size=4, width=16, heads=2, layers=3, mlp_width=24)
TOWERS = {
    "clip": ViTConfig(**SMALL, embed_dim=6),
    "eva": dataclasses.replace(EVA_G, **SMALL, embed_dim=6, projection_bias=True),
    "siglip": dataclasses.replace(SIGLIP_B, **SMALL | {"image_size": 13}),  # a row of pixels is left over
    "mean": dataclasses.replace(SIGLIP_B, **SMALL, pool="mean"),
}
OPTIONS = {"st_adapter": {"width": 4, "kernel": (3, 3, 3)}, "branch": {"depth": 2}, "bt_adapter": {"depth": 2},
           "stan": {"depth": 2, "per_frame": True}}  # fmt: skip
PAIRS = [(kind, name, OPTIONS.get(name, {})) for kind in TOWERS for name in temporal.names()]
PAIRS += [("siglip", "joint", {"class_token": False}), ("siglip", "clip_vip", {"proxies": 1})]
MASK = torch.tensor([[True] * 4, [True, False, True, False]])

every = pytest.mark.parametrize("kind, name, options", PAIRS, ids=lambda v: v if isinstance(v, str) else "")


def encoder(kind, name, options):
    vision = TOWERS[kind]
    return randomized(VideoEncoder(ViT(vision), temporal.create(name, vision, **options))).double()


def clips(kind, B=2, T=4):
    size = TOWERS[kind].image_size
    return torch.randn(B, T, 3, size, size, dtype=torch.float64)


def same(got, want, tolerance=1e-11):
    close(got.tokens, want.tokens, tolerance)
    close(got.pooled, want.pooled, tolerance)


@every
@torch.no_grad()
def test_masks_and_batches(kind, name, options):
    """A clip gives what it gives alone, whatever is beside it in the batch and stands in its padding."""
    model, pixels = encoder(kind, name, options), clips(kind)
    pixels[1, [1, 3]] = math.nan
    got, full = model(pixels, frame_mask=MASK), model(pixels[:1])
    close(got.pooled[:1], full.pooled, 1e-11)
    close(got.tokens[:1], full.tokens, 1e-11)
    other = torch.where(MASK[..., None, None, None], pixels, math.inf)
    same(model(other, frame_mask=MASK), got)
    pixels[1, [1, 3]] = pixels[1, [0, 2]]
    cut = MASK.clone()
    cut[1] = torch.tensor([True, True, False, False])
    got, alone = model(pixels, frame_mask=cut), model(pixels[1:, :2])
    pooled = got.pooled[1:, :2] if got.pooled.dim() == 3 else got.pooled[1:]
    close(pooled, alone.pooled, 1e-11)
    close(got.tokens[1:, : alone.tokens.shape[1]], alone.tokens, 1e-11)


@every
@torch.no_grad()
def test_stored_layers_and_features(kind, name, options):
    model, pixels = encoder(kind, name, options), clips(kind)
    if not model.temporal.reads_only:
        with pytest.raises(ValueError, match="works inside the tower"):
            model.layers(pixels)
        return
    want, xs = model(pixels, frame_mask=MASK), model.layers(pixels, frame_mask=MASK)
    assert all(x.shape == (2, 4, 1 + model.tower.config.patches, 16) for x in xs)
    same(model.from_layers(xs, frame_mask=MASK), want)
    first = model.temporal.reads[0]
    before = model.tower(pixels, [first - 1])[0] if first else model.tower.with_class(model.tower.embed(pixels))
    same(model.from_features(before, frame_mask=MASK), want)
    own = model.tower.run(model.tower.embed(pixels), model.temporal.reads)
    for x, mine in zip(model.layers(pixels), own):
        assert torch.equal(model.tower.own(x), mine), "the tower's own numbers"


@every
@torch.no_grad()
def test_saved_and_interpolated(kind, name, options, tmp_path):
    model, pixels = encoder(kind, name, options), clips(kind)
    again = VideoEncoder.from_pretrained(model.save(tmp_path / "m"))
    assert again.tower.config == TOWERS[kind]
    same(again(pixels), model(pixels), 0)
    vision = dataclasses.replace(TOWERS[kind], image_size=TOWERS[kind].image_size + 8)
    larger = VideoEncoder(ViT(vision), temporal.create(name, vision, **options))
    state = dict(model.state_dict())
    state["tower.position"] = resize_positions(state["tower.position"], 5, 5, before=vision.before)
    larger.load_state_dict(state)
    larger = larger.double().eval()
    pixels = torch.randn(2, 4, 3, vision.image_size, vision.image_size).double()
    same(model(pixels, frame_mask=MASK, interpolate=True), larger(pixels, frame_mask=MASK))
    oblong = model(pixels[..., :12, :], interpolate=True)
    assert oblong.pooled.isfinite().all() and oblong.tokens.isfinite().all()
    with pytest.raises(ValueError, match="interpolate=True"):
        model(pixels)


@every
def test_gradients(kind, name, options):
    """They reach all of the module, and nothing of the tower."""
    model = encoder(kind, name, options)
    found = model(clips(kind))
    parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert all(n.startswith("temporal.") for n, _ in parameters)
    if not parameters:
        return
    (found.tokens.square().sum() + found.pooled.square().sum()).backward()
    # The last layer's MLP adapter works on patches: with a class token nothing of them is read any more.
    unread = "temporal.mlp.2." if name == "st_adapter" and model.tower.config.class_token else "none"
    lacking = [n for n, p in parameters if not n.startswith(unread) and (p.grad is None or not p.grad.any())]
    assert not lacking


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_what_changes_nothing_at_first(kind):
    """Modules that start without effect give the tower's own embedding."""
    vision, pixels = TOWERS[kind], clips(kind).float()
    tower = randomized(ViT(vision))
    frames = tower.embedding(tower(pixels)[0])
    rows = tower(pixels, [1])[0].mean(dim=1)
    for name in ("mean", "st_pool", "grid_pool", "separate", "st_adapter"):
        model = VideoEncoder(tower, temporal.create(name, vision, **OPTIONS.get(name, {}))).eval()
        want = frames.mean(dim=1)
        if name == "st_adapter":  # its head is of the mean of the frames' class rows
            want = tower.embedding(tower(pixels)[0].mean(dim=1))
        close(model(pixels).pooled, want, 1e-5)
        if name in ("mean", "separate", "st_adapter"):
            close(model(pixels).tokens, rows.roll(-1, dims=1), 1e-5)
    # One frame, one sequence: joint attention is the frame's.
    model = VideoEncoder(tower, temporal.create("joint", vision)).eval()
    close(model(pixels[:, :1]).pooled, frames[:, 0], 1e-5)


@pytest.mark.parametrize("kind", ["siglip", "mean"])
def test_no_class_token_of_the_clip(kind):
    with pytest.raises(ValueError, match="class_token must be 'frame'"):
        temporal.create("separate", TOWERS[kind], class_token="clip")


@torch.no_grad()
def test_bt_adapter_of_eva():
    """The public EVA variant: plain sums, the tower's own position table, and a head after the norm of both."""
    vision, pixels = TOWERS["eva"], clips("eva")
    model = randomized(VideoEncoder(ViT(vision), temporal.create("bt_adapter", vision, depth=2, gated=False))).double()
    tower, branch = model.tower, model.temporal.branch
    xs = tower(pixels, range(1, 3))
    # The branch as pyvidx.reference has it, in plain torch.
    group = model.temporal.grouping(4, 9)
    states = branch(xs, tower.position, group)
    want = tower.norm_post(xs[-1][:, :, 0] + states[-1][1][:, None]) @ tower.projection.weight.T + tower.projection.bias
    close(model(pixels).pooled, want.mean(dim=1), 1e-11)
