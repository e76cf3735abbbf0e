"""What every temporal module of the registry must hold, then what is particular to some."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pyvidx import temporal
from pyvidx.backbones.vit import ViT, ViTConfig
from pyvidx.models import BTAdapter, BTAdapterConfig, VideoEncoder
from pyvidx.models.flops import count
from pyvidx.temporal.bt_adapter import TemporalLayer
from pyvidx.temporal.clip_vip import proxy_attention
from pyvidx.temporal.grid_pool import grid_pool, with_newlines

VISION = ViTConfig(image_size=12, patch_size=4, width=16, heads=2, layers=5, mlp_width=24, embed_dim=6)
P, C, E = VISION.patches, VISION.width, VISION.embed_dim
VARIANTS = [
    *((name, {"width": 8} if name == "st_adapter" else {}) for name in temporal.names()),
    ("branch", {"interact": False, "gated": False}),
    ("branch", {"interact": False, "depth": 2}),
    ("joint", {"class_token": False, "sincos": True}),
    ("separate", {"layers": 2, "every": True, "fc": False}),
    ("separate", {"class_token": "clip"}),
    ("st_adapter", {"kernel": (3, 3, 3), "layers": 2, "places": "mlp", "width": 8}),
    ("clip_vip", {"proxies": 1}),
]


def over(variants):
    def label(v):
        return v if isinstance(v, str) else "-".join(map(str, v.values())) or "default"

    return pytest.mark.parametrize("name, options", variants, ids=label)


every = over(VARIANTS)
# As they start: the frames' own numbers.
UNCHANGED = [
    (name, options)
    for name, options in VARIANTS
    if name in ("mean", "separate", "st_adapter", "st_pool", "grid_pool")
    and options.get("fc") is not False
    and options.get("class_token") != "clip"
]


def tower():
    return ViT(VISION).eval()


def encoder(name, options, randomize=True):
    model = VideoEncoder(tower(), temporal.create(name, VISION, **options)).double().eval()
    with torch.no_grad():
        for parameter_name, p in model.temporal.named_parameters() if randomize else ():
            p.add_(torch.randn_like(p), alpha={"output_gate": 1e-4, "branch.gate": 1e-2}.get(parameter_name, 0.3))
    return model


def clips(B=2, T=4):
    return torch.randn(B, T, 3, VISION.image_size, VISION.image_size, dtype=torch.float64)


def close(got, want, tolerance=1e-12):
    assert got.shape == want.shape and got.isfinite().all()
    assert (got - want).abs().max() <= tolerance * max(1.0, want.abs().max().item())


@every
@torch.no_grad()
def test_shapes_and_what_is_asked_for(name, options):
    model, pixels, times = encoder(name, options), clips(), torch.zeros(2, 4)
    both = model(pixels, times=times)
    rows = {"st_pool": 100 + P, "grid_pool": 4}.get(name, P if options.get("class_token") is False else 1 + P)
    assert both.tokens.shape == (2, rows, C) and both.pooled.shape == (2, E) and both.times is times
    for output in ("tokens", "pooled"):
        one = model(pixels, outputs=(output,))
        close(getattr(one, output), getattr(both, output))
        assert getattr(one, "pooled" if output == "tokens" else "tokens") is None


@every
@torch.no_grad()
def test_padding_has_no_influence(name, options):
    """A short clip in a batch, padded with NaN, gives what it gives alone; so does the full clip beside it."""
    model, pixels = encoder(name, options), clips(T=5)
    short, mask = pixels[1:, :3].clone(), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    pixels[1, 3:] = math.nan
    got, full, alone = model(pixels, frame_mask=mask), model(pixels[:1]), model(short)
    close(got.pooled, torch.cat([full.pooled, alone.pooled]))
    close(got.tokens[:1], full.tokens)
    close(got.tokens[1:, : alone.tokens.shape[1]], alone.tokens)
    assert not got.tokens[1:, alone.tokens.shape[1] :].any()
    if model.temporal.reads_only:
        xs = [torch.where(mask[..., None, None], x, math.nan) for x in model.layers(pixels, frame_mask=mask)]
        close(model.from_layers(xs, frame_mask=mask).pooled, got.pooled)
        close(model.from_layers(xs, frame_mask=mask).tokens, got.tokens)


@every
@torch.no_grad()
def test_a_mask_of_all_frames_changes_nothing(name, options):
    model, pixels = encoder(name, options), clips()
    want, got = model(pixels), model(pixels, frame_mask=torch.ones(2, 4, dtype=torch.bool))
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.pooled, want.pooled)


@every
@torch.no_grad()
def test_batch_rows_are_independent(name, options):
    model, pixels = encoder(name, options), clips(B=3)
    whole = model(pixels)
    for b in range(3):
        single = model(pixels[b : b + 1])
        close(single.tokens, whole.tokens[b : b + 1])
        close(single.pooled, whole.pooled[b : b + 1])


@every
@torch.no_grad()
def test_stored_layers(name, options):
    model, pixels = encoder(name, options), clips()
    if not model.temporal.reads_only:
        for refused in (lambda: model.layers(pixels), lambda: model.from_layers([pixels])):
            with pytest.raises(ValueError, match=f"{name} works inside the tower"):
                refused()
        return
    want, xs = model(pixels), model.layers(pixels)
    for i, x in zip(model.temporal.reads, xs, strict=True):
        assert torch.equal(x, model.tower(pixels, [i])[0]), "the tower runs untouched"
    got = model.from_layers(xs)
    assert torch.equal(got.tokens, want.tokens)
    close(got.pooled, want.pooled)  # of class rows alone `forward` makes them another way
    with pytest.raises(ValueError, match="need the outputs of backbone layers"):
        model.from_layers(xs[1:])
    with pytest.raises(ValueError, match="backbone tokens must be"):
        model.from_layers((*xs[:-1], xs[-1][:, :2]))


@every
@torch.no_grad()
def test_stored_features(name, options):
    """The input of the first layer that is read, for a module that only reads."""
    model, pixels = encoder(name, options), clips()
    if not model.temporal.reads_only:
        with pytest.raises(ValueError, match="works inside the tower"):
            model.from_features(pixels[..., 0])
        return
    first, mask = model.temporal.reads[0], torch.tensor([[True] * 4, [True, True, False, False]])
    (x,) = model.tower(pixels, [first - 1])
    close(model.from_features(x).pooled, model(pixels).pooled)
    close(model.from_features(x.float(), frame_mask=mask).tokens, model(pixels, frame_mask=mask).tokens, 1e-5)
    close(
        model.from_layers(model.layers(pixels, outputs=("tokens",)), outputs=("tokens",)).tokens, model(pixels).tokens
    )


@every
@torch.no_grad()
def test_fold(name, options):
    """The same numbers, the model itself as it was, and a copy that is for inference alone."""
    model, pixels = encoder(name, options), clips()
    before, want, folded = {k: v.clone() for k, v in model.state_dict().items()}, model(pixels), model.fold()
    close(folded(pixels).tokens, want.tokens)
    close(folded(pixels).pooled, want.pooled)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(layer.fc is None for layer in folded.modules() if isinstance(layer, TemporalLayer))
    assert {b.hidden_act for b in folded.tower.blocks.values()} == {"silu"}
    assert not any(p.requires_grad for p in folded.parameters())
    assert {p.dtype for p in model.fold(torch.bfloat16).parameters()} == {torch.bfloat16}
    for refused in (folded.train, folded.fold, lambda: folded.save("x"), lambda: folded.load_state_dict(before)):
        with pytest.raises(RuntimeError, match="fold"):
            refused()


@every
@torch.no_grad()
def test_patches_removed_from_a_branch(name, options):
    model, pixels, tube = encoder(name, options), clips(), torch.arange(P) % 2 == 0
    if not model.temporal.masks:
        with pytest.raises(ValueError, match=f"{name} has no branch"):
            model(pixels, mask=tube, outputs=("pooled",))
        return
    got = model(pixels, mask=tube, outputs=("pooled",)).pooled
    assert (got - model(pixels).pooled).abs().max() > 1e-6
    close(model.from_layers(model.layers(pixels), mask=tube, outputs=("pooled",)).pooled, got)
    with pytest.raises(ValueError, match="tokens need all patches"):
        model(pixels, mask=tube)


@torch.no_grad()
def test_class_rows_alone():
    """The last layer works for the one row that is read, and for all where somebody listens to it."""
    model, pixels, heard = encoder("mean", {}), clips(), []
    want = model.from_layers(model.layers(pixels)).pooled
    close(model(pixels).pooled, want)
    assert count(lambda: model(pixels)) < 0.85 * count(lambda: model.layers(pixels))
    model.tower.blocks["4"].qkv.register_forward_hook(lambda module, given, found: heard.append(found.numel()))
    close(model(pixels).pooled, want)
    assert heard == [pixels.shape[:2].numel() * (1 + P) * 3 * C]


@torch.no_grad()
def test_no_work_for_padding():
    """A tower that is only read runs on real frames alone."""
    model, pixels, mask = encoder("mean", {}), clips(), torch.tensor([[True] * 4, [True, True, False, False]])
    one = count(lambda: model.layers(pixels[:1, :1]))
    assert one > 0 and count(lambda: model.layers(pixels, frame_mask=mask)) == 6 * one


@pytest.mark.parametrize("name", ["branch", "bt_adapter", "stan"])
@torch.no_grad()
def test_time_attention_adds_nothing_at_first(name):
    layers = encoder(name, {}, randomize=False).temporal.branch.temporal
    assert not any(layer(torch.randn(2, 4, P, C).double()).any() for layer in layers)


@over(UNCHANGED)
@torch.no_grad()
def test_as_it_starts(name, options):
    """Modules that promise it change nothing at first."""
    model, mean, pixels = encoder(name, options, randomize=False), encoder("mean", {}), clips()
    mean.tower.load_state_dict(model.tower.state_dict())
    if name in ("mean", "separate", "st_adapter"):
        close(model(pixels).tokens, mean(pixels).tokens)
    want = mean(pixels).pooled
    if name == "st_adapter":  # whose head takes the mean before the norm
        want = mean.tower.embedding(mean.tower(pixels)[0].mean(dim=1))
    close(model(pixels).pooled, want)


@every
@torch.no_grad()
def test_order_of_frames(name, options):
    """Only modules without a sense of time give the same for a clip played backwards."""
    model, pixels = encoder(name, options), clips()
    moved = (model(pixels).pooled - model(pixels.flip(1)).pooled).abs().max()
    assert moved < 1e-12 if name in ("mean", "st_pool", "grid_pool") else moved > 1e-6


@every
def test_gradients(name, options):
    """The frozen tower gets none; every parameter of the module gets one."""
    model, pixels = encoder(name, options), clips()
    encoding = model(pixels)
    wants = [p for p in model.parameters() if p.requires_grad]
    assert len(wants) == len(list(model.temporal.parameters()))
    if not wants:
        assert encoding.tokens.grad_fn is None and encoding.pooled.grad_fn is None
        return
    (encoding.tokens.square().sum() + encoding.pooled.square().sum()).backward()
    assert all(p.grad is None for p in model.tower.parameters())
    # The last layer's MLP adapter works on patches, of which nothing is read any more: so in the original.
    unread = f"mlp.{len(model.temporal.mlp) - 1}." if name == "st_adapter" else "none"
    named = [(n, p) for n, p in model.temporal.named_parameters() if not n.startswith(unread)]
    lacking = [n for n, p in named if p.grad is None or not p.grad.any()]
    assert not lacking, f"no gradient for {lacking}"
    if model.temporal.reads_only:
        assert all(x.grad_fn is None for x in model.layers(pixels)), "no graph of the tower"


@over([v for v in VARIANTS if v[0] not in ("mean", "st_pool", "grid_pool") and "sincos" not in v[1]])
def test_masked_gradients(name, options):
    """What padding holds reaches no gradient."""
    model, pixels, mask = encoder(name, options), clips(), torch.tensor([[True] * 4, [True, True, False, False]])
    parameters = list(model.temporal.parameters())

    def gradients(fill):
        encoding = model(torch.where(mask[..., None, None, None], pixels, fill), frame_mask=mask)
        return torch.autograd.grad(encoding.tokens.square().sum() + encoding.pooled.square().sum(), parameters)

    for got, want in zip(gradients(math.nan), gradients(0.0)):
        close(got, want)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(name, options, dtype):
    """Weights of half precision, with and without a mask: off by some roundings of a few layers."""
    model, pixels, mask = encoder(name, options), clips(), torch.tensor([[True] * 4, [True, True, False, False]])
    want, masked = model(pixels), model(pixels, frame_mask=mask)
    model, pixels = model.to(dtype), pixels.to(dtype)
    for got, exact in ((model(pixels), want), (model(pixels, frame_mask=mask), masked)):
        for output in ("tokens", "pooled"):
            a, b = getattr(got, output), getattr(exact, output)
            assert a.dtype == dtype
            assert (a.double() - b).norm() < 12 * torch.finfo(dtype).eps * b.norm()


@every
def test_autocast(name, options):
    """Mixed precision: float32 parameters, bfloat16 products, float32 gradients."""
    model, pixels = encoder(name, options).float(), clips().float()
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    with torch.no_grad():
        want = model(pixels, frame_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(pixels, frame_mask=mask)
    for output in ("tokens", "pooled"):
        a, b = getattr(got, output).float(), getattr(want, output)
        assert (a - b).norm() < 0.05 * b.norm()
    if any(p.requires_grad for p in model.parameters()):
        (got.tokens.float().square().sum() + got.pooled.float().square().sum()).backward()
    for p in model.temporal.parameters():
        assert p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("stan", "clip_vip") else pytest.mark.slow) for n in temporal.names()]
)
@torch.no_grad()
def test_compiles_without_breaks(name):
    model, pixels = encoder(name, {}), clips()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(pixels).pooled, model(pixels).pooled)
    close(compiled(pixels).tokens, model(pixels).tokens)


@every
@torch.no_grad()
def test_save_and_load(name, options, tmp_path):
    model, pixels = encoder(name, options), clips()
    again = VideoEncoder.from_pretrained(model.save(tmp_path / "m"))
    assert again.temporal.spec["name"] == name and again.is_random and not again.training
    assert not any(p.requires_grad for p in again.tower.parameters())
    assert all(p.requires_grad for p in again.temporal.parameters())
    assert torch.equal(again(pixels).pooled, model(pixels).pooled)
    assert torch.equal(again(pixels).tokens, model(pixels).tokens)


@every
def test_errors(name, options):
    model, pixels = encoder(name, options), clips()
    for bad in (pixels[0], pixels.transpose(1, 2), pixels[:, :0]):
        with pytest.raises(ValueError, match="pixels must be"):
            model(bad)
    for bad in (torch.ones(2, 4), torch.ones(2, 3).bool(), torch.tensor([[True] * 4, [False] * 4])):
        with pytest.raises(ValueError, match="frame_mask must"):
            model(pixels, frame_mask=bad)
    for outputs in ((), ("pool",)):
        with pytest.raises(ValueError, match="outputs must be some of"):
            model(pixels, outputs=outputs)
    with pytest.raises(ValueError, match=f"options do not fit '{name}'"):
        temporal.create(name, VISION, colour=3)


@every
@torch.no_grad()
def test_no_clips(name, options):
    model, frame_mask = encoder(name, options), torch.ones(0, 4, dtype=torch.bool)
    want = model(clips())
    for found in (model(clips(0)), model(clips(0), frame_mask=frame_mask)):
        assert found.tokens.shape == (0, *want.tokens.shape[1:]) and found.pooled.shape == (0, E)


def test_registry_errors():
    with pytest.raises(ValueError, match="name must be one of .*bt_adapter.*'avg'"):
        temporal.create("avg", VISION)
    refused = [
        ("branch", {"depth": 0}), ("branch", {"depth": 6}), ("separate", {"layers": 0}), ("clip_vip", {"proxies": 0}),
        ("separate", {"class_token": "none"}), ("st_adapter", {"kernel": (2, 1, 1)}), ("st_adapter", {"places": "x"}),
        ("st_adapter", {"layers": 9}), ("grid_pool", {"mode": "min"}), ("grid_pool", {"stride": 4}),
        ("grid_pool", {"stride": 1.5}), ("clip_vip", {"proxies": 2.0}), ("st_adapter", {"width": 0}),
        ("st_adapter", {"kernel": (3.0, 1, 1)}), ("st_pool", {"rows": -4}), ("st_pool", {"rows": "a"}),
        *((name, {"time_length": n}) for name in ("branch", "stan", "clip_vip", "joint", "separate") for n in (0, 2.5)),
    ]  # fmt: skip
    for name, options in refused:
        with pytest.raises(ValueError, match="must be"):
            temporal.create(name, VISION, **options)
    with pytest.raises(ValueError, match="at least 2 layers"):
        temporal.create("mean", replace(VISION, layers=1))
    with pytest.raises(ValueError, match="sizes the module was made for"):
        VideoEncoder(tower(), temporal.create("mean", replace(VISION, layers=4)))
    with pytest.raises(ValueError, match="made by pyvidx.temporal.create"):
        VideoEncoder(tower(), temporal.Mean(VISION))


@pytest.mark.parametrize("name", ["joint", "separate", "bt_adapter"])
def test_more_frames_than_the_time_table(name):
    with pytest.raises(ValueError, match="got .*6"):
        encoder(name, {"time_length": 2})(clips(T=6))


@pytest.mark.parametrize("T", [1, 4, 10], ids=["T1", "T4", "T10_in_pairs"])
@torch.no_grad()
def test_bt_adapter_is_the_model(T):
    """models.BTAdapter is this encoder, with the same numbers and names of weights."""
    model = encoder("bt_adapter", {"depth": 3, "time_length": 8})
    other = BTAdapter(BTAdapterConfig(VISION, depth=3, time_length=8)).double().eval()
    other.load_state_dict(model.state_dict())
    pixels = clips(T=T)
    close(model(pixels).tokens, other(pixels).tokens)
    close(model(pixels).pooled, other(pixels).pooled)


@pytest.mark.parametrize("compat", ["paper", "official"])
@torch.no_grad()
def test_frame_masks_of_the_bt_adapter_model(compat):
    """Pixels, stored layers and stored features; with patches removed as well; folded."""
    config = BTAdapterConfig(VISION, depth=3, time_length=8)
    model, pixels = BTAdapter(config, compat=compat).double().eval(), clips(T=4)
    for p in model.temporal.branch.parameters():
        p.add_(torch.randn_like(p), alpha=0.3)
    real = torch.tensor([[True] * 4, [True, True, False, False]])
    alone = model(pixels[1:, :2])
    pixels[1, 2:] = math.nan
    xs = model.tower(pixels, range(config.fork - 1, VISION.layers))
    ways = {
        "pixels": lambda m: m(pixels, frame_mask=real),
        "layers": lambda m: m.from_layers(xs[1:], frame_mask=real),
        "features": lambda m: m.from_features(xs[0], frame_mask=real),
    }
    for m in (model, model.fold()):
        for way, run in ways.items():
            assert run(m).tokens.isfinite().all(), way
            close(run(m).tokens[1:], alone.tokens)
            close(run(m).pooled[1:], alone.pooled)
    if compat == "paper":
        tube, pooled = torch.arange(P) < 5, {"outputs": ("pooled",)}
        got = model(pixels, mask=tube, frame_mask=real, **pooled).pooled[1:]
        close(got, model(pixels[1:, :2], mask=tube, **pooled).pooled)
    mixed = [(BTAdapter(config, compat="official", variant="llava").double(), 4)]
    mixed += [(model, 10)] if compat == "paper" else []  # in pairs
    for refused, T in mixed:
        with pytest.raises(ValueError, match="frame_mask needs slots that are frames"):
            refused(clips(1, T), frame_mask=torch.arange(T)[None] < 2)


@every
@torch.no_grad()
def test_masks_may_have_gaps(name, options):
    """Padding may stand anywhere, and nothing of it is seen."""
    model, pixels = encoder(name, options), clips(B=1, T=4)
    mask = torch.tensor([[True, False, True, True]])
    other = pixels.clone()
    other[:, 1] = math.inf
    want, got = model(pixels, frame_mask=mask), model(other, frame_mask=mask)
    assert torch.equal(got.pooled, want.pooled) and torch.equal(got.tokens, want.tokens)
    assert (got.pooled - model(pixels).pooled).abs().max() > 1e-6


@torch.no_grad()
def test_stan_per_frame():
    model, each, pixels = encoder("stan", {}), encoder("stan", {"per_frame": True}), clips()
    each.load_state_dict(model.state_dict())
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    rows, want = each(pixels, frame_mask=mask).pooled, model(pixels, frame_mask=mask).pooled
    assert rows.shape == (2, 4, E) and not rows[1, 2:].any()
    close(rows.sum(1) / mask.sum(1, keepdim=True), want)


def test_branch_copies_the_tower():
    model = encoder("branch", {})
    model.temporal.init_from(model.tower)
    for i, layer in zip(model.temporal.reads, model.temporal.branch.spatial):
        assert torch.equal(layer.fc1.weight, model.tower.blocks[str(i)].fc1.weight)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("D", [4, 8])
def test_proxy_attention(D, gradient):
    """One softmax over proxies and own frame: the full attention with all else masked. By slot table (D = 8, without a
    gradient) and by copies."""
    B, M, T, n, H = 2, 3, 4, 5, 2
    qkv = torch.randn(B, M + T * n, 3, H, D, dtype=torch.float64, requires_grad=gradient)
    frame = torch.cat([torch.full((M,), -1), torch.arange(T).repeat_interleave(n)])
    sees = (frame[:, None] == frame) | (frame[:, None] == -1) | (frame == -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    want = ((q @ k.transpose(-1, -2)) * D**-0.5).masked_fill(~sees, -math.inf).softmax(-1) @ v
    close(proxy_attention(qkv, M, T), want.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("T", [3, 5, 12])
@torch.no_grad()
def test_clip_vip_times(T):
    module = encoder("clip_vip", {"time_length": 5}).temporal
    want = F.interpolate(module.time.T[None], size=T, mode="linear", align_corners=False)[0].T
    close(module.times(torch.ones(1, T, dtype=torch.bool))[0], want)


@torch.no_grad()
def test_grid_pool():
    x = torch.arange(2 * 9.0).view(2, 9, 1)
    assert grid_pool(x).flatten().tolist() == [2.0, 11.0]  # the third row and column are left over
    assert grid_pool(x, "max").flatten().tolist() == [4.0, 13.0]
    assert grid_pool(x, "bilinear").shape == (2, 4, 1)
    newline = torch.tensor([-1.0])
    assert with_newlines(x, newline).flatten()[9] == -1 and with_newlines(x, newline).shape == (20, 1)
    assert (with_newlines(x, newline, "row").flatten() == -1).nonzero().flatten().tolist() == [3, 7, 11, 15, 19, 23]
    with pytest.raises(ValueError, match="every must be"):
        with_newlines(x, newline, "clip")
    wide = torch.arange(6.0).view(1, 6, 1)
    assert (with_newlines(wide, newline, "row", (2, 3)).flatten() == -1).nonzero().flatten().tolist() == [3, 7]
    with pytest.raises(ValueError, match=r"must be a square; .* got 6"):
        with_newlines(wide, newline, "row")
