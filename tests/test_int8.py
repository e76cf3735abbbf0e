"""Linear layers in 8 bits: near to float32 in every tower and module, and refused where they cannot work."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.int8_retrieval import study
from pyvidx import temporal
from pyvidx.backbones import ViT, ViTConfig
from pyvidx.layers import int8
from pyvidx.layers.int8 import Int8Linear, quantize
from pyvidx.layers.linear import dense, dense_rows
from pyvidx.models import MALMM, BTAdapter, VideoEncoder, flops
from pyvidx.models.text_video import TextVideo

SIZES = {"image_size": 32, "patch_size": 16, "width": 64, "heads": 2, "layers": 4, "mlp_width": 256, "embed_dim": 32}
TOWERS = {
    "clip": ViTConfig(**SIZES),
    "eva": ViTConfig(**SIZES, hidden_act="gelu", norm_pre=False, patch_bias=True),
    "siglip": ViTConfig(**SIZES, hidden_act="gelu_tanh", pool="attention", norm_pre=False, patch_bias=True),
}  # fmt: skip


def cosine(a, b):
    """The least of all videos."""
    return F.cosine_similarity(a.flatten(1), b.flatten(1), dim=-1).min().item()


def layer(K=96, N=48, bias=True):
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=bias)


def kept_float(model):
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (5, 96), (2, 3, 7, 96), (0, 96), (2, 0, 96)], ids=str)
def test_layer(shape, bias):
    module = layer(bias=bias).requires_grad_(False)
    x = torch.randn(shape)
    want, got = module(x), Int8Linear(module)(x)
    assert got.shape == want.shape and got.dtype == want.dtype
    if x.numel():
        assert (got - want).norm() < (0.02 if int8.VNNI else 0.04) * want.norm()  # 8 or 7 bits


@torch.no_grad()
def test_rows_of_a_layer():
    module, x = layer(), torch.randn(5, 96)
    ours = Int8Linear(module)
    for rows in (slice(16), slice(16, None), slice(16, 32)):
        torch.testing.assert_close(dense_rows(x, ours, rows), dense(x, ours)[..., rows], atol=1e-5, rtol=1e-5)
    ours.register_forward_hook(lambda module, inputs, output: output * 0)
    assert not dense_rows(x, ours, slice(16)).any(), "a hook is not passed by"


@torch.no_grad()
def test_numbers_at_the_edge():
    """One scale per row of weights, zero rows, and views; what is no number stays none."""
    module = layer()
    module.weight[0], module.weight[1:4] = 0, module.weight[1:4] * 1e4
    x = torch.randn(96, 7).t()
    want, got = module(x), Int8Linear(module)(x)
    assert ((got - want).abs() <= 0.015 * torch.outer(x.norm(dim=1), module.weight.norm(dim=1))).all()
    for small in (0.0, 1e-45, 1e-40, 1e-38):
        torch.testing.assert_close(Int8Linear(module)(torch.full((2, 96), small)), module.bias.expand(2, -1))
    for bad in (float("nan"), float("inf")):
        assert not Int8Linear(module)(torch.full((2, 96), bad)).isfinite().any()


@torch.no_grad()
def test_operations_are_counted():
    module, x = layer(), torch.randn(5, 96)
    ours = Int8Linear(module)
    assert flops.count(lambda: ours(x)) == flops.count(lambda: module(x)) > 0


def test_copies():
    ours, x = Int8Linear(layer()), torch.randn(5, 96)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other(x).equal(ours(x))


def test_layer_refuses():
    ours, x = Int8Linear(layer()), torch.randn(5, 96)
    for bad in (x.double(), x.bfloat16(), x.to("meta")):
        with pytest.raises(ValueError, match="int8: layers in 8 bits take float32 on a CPU"):
            ours(bad)
    with pytest.raises(RuntimeError, match="no gradients"):
        ours(x.requires_grad_())
    with pytest.raises(ValueError, match=r"int8: the model must be float32 on a CPU, got .*float64"):
        quantize(nn.Sequential(layer().double()))
    broken = nn.Sequential(layer())
    with torch.no_grad():
        broken[0].weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="int8: weights must be finite, got NaN"):
        quantize(broken)


def test_shared_layers_and_those_to_keep():
    shared, kept = layer(), layer()
    model = nn.ModuleList([nn.Sequential(shared), nn.Sequential(shared), kept])
    quantize(model, keep=[kept])
    assert model[0][0] is model[1][0] and type(model[0][0]) is Int8Linear and model[2] is kept


@pytest.mark.parametrize("name", temporal.names())
@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_every_tower_and_module(tower, name):
    torch.manual_seed(1)
    vision = TOWERS[tower]
    model = VideoEncoder(ViT(vision), temporal.create(name, vision)).eval()
    for parameter in model.temporal.parameters():  # those that start at zero would hide what they add
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    pixels = torch.randn(2, 3, 3, 32, 32)
    ours = model.fold(precision="int8")
    reads_weights = [n for n in kept_float(ours) if not n.endswith("qkv")]
    assert not reads_weights and any(isinstance(m, Int8Linear) for m in ours.modules())
    mask = torch.tensor([[True, True, True], [True, True, False]])
    for options in ({}, {"frame_mask": mask}):
        want, got = model(pixels, **options), ours(pixels, **options)
        assert cosine(got.tokens, want.tokens) > 0.995 and cosine(got.pooled, want.pooled) > 0.995


def test_door():
    model = BTAdapter.default()
    ours = model.fold(precision="int8")
    for refused in (ours.train, ours.fold, lambda: ours.save("x"), lambda: ours.load_state_dict({})):
        with pytest.raises(RuntimeError, match="folded"):
            refused()
    with pytest.raises(ValueError, match="fold: precision must be one of float, int8, got 'int4'"):
        model.fold(precision="int4")
    with pytest.raises(ValueError, match="int8: the model must be float32 on a CPU, got .*bfloat16"):
        model.fold(torch.bfloat16, precision="int8")
    assert kept_float(model) and not any(isinstance(m, Int8Linear) for m in model.modules()), "a copy is changed"


@torch.no_grad()
def test_malmm():
    """A stream, a clip, and every frame by itself; the merges are taken of float32 rows."""
    model = MALMM.default()
    ours, c = model.fold(precision="int8"), model.config.vision
    torch.manual_seed(2)
    features = torch.randn(2, 7, 1 + c.patches, c.width)
    features = features + model.features(torch.randn(2, 7, 3, c.image_size, c.image_size))
    for options in ({"length": 3}, {"length": 3, "query": False}, {"length": 3, "visual": False}, {"length": 0}):
        want, got = model.encode(features, **options), ours.encode(features, **options)
        assert cosine(got, want) > 0.995, options
    memories = {m: m.start(m.prompt(batch=2), length=3) for m in (model, ours)}
    for t in range(7):
        memories = {m: m.push(state, features[:, t]) for m, state in memories.items()}
    assert cosine(*(m.project(m.ask(state)) for m, state in memories.items())) > 0.995
    first, second = memories.values()
    assert second.visual.bank.dtype == torch.float32 and second.visual.bank.equal(first.visual.bank)
    with pytest.raises(RuntimeError, match="folded"):
        ours.train()
    with pytest.raises(RuntimeError, match="folded"):
        ours.save("x")


def test_trained_weights():
    """Those that ship, and the bench of what 8 bits do to retrieval."""
    found = study(TextVideo.default(), singles=4, pairs=1)
    assert found["cosine"]["least"] > 0.995 and found["layers"]["int8"] > 40
    assert abs(found["int8"]["pair"] - found["float"]["pair"]) < 20
