"""BTAdapter: the fast path against the eager reference, and every shortcut against the long way."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from pyvidx.backbones.vit import ViTConfig
from pyvidx.models import BTAdapter, BTAdapterConfig
from pyvidx.reference.bt_adapter import ReferenceBTAdapter
from pyvidx.temporal.branch import fused_tokens
from pyvidx.temporal.grouping import grouping
from pyvidx.weights.bt_adapter import load_weights

VISION = ViTConfig(image_size=12, patch_size=4, width=16, heads=2, layers=5, mlp_width=24, embed_dim=6)
CONFIG = BTAdapterConfig(VISION, depth=3, time_length=8)
P = VISION.patches


def randomized(model):
    """Every parameter of ordinary size; gates such that sigmoid(scale * gate) is neither 0 nor 1."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = {"balance1": 1e-4, "output_gate": 1e-4, "balance2": 0.01, "branch.gate": 0.01}
            spread = spread.get(name.removeprefix("temporal."), 0.2)
            p.add_(torch.randn_like(p), alpha=spread)
    return model.eval()


def pair(variant="mma", dtype=torch.float64, **changes):
    """A reference and a fast model with its weights."""
    config = dataclasses.replace(CONFIG, **changes)
    if variant == "llava":
        config = dataclasses.replace(config, vision=dataclasses.replace(VISION, embed_dim=None))
    reference = randomized(ReferenceBTAdapter(config, variant)).to(dtype)
    model = BTAdapter(config, compat="official", variant=variant).to(dtype)
    load_weights(model, reference.state_dict())
    return reference, model


def clip(B=2, T=4, dtype=torch.float64):
    return torch.randn(B, T, 3, VISION.image_size, VISION.image_size, dtype=dtype)


def close(got, want, tolerance=1e-9):
    assert got.shape == want.shape
    assert (got.double() - want.double()).abs().max() <= tolerance * max(1.0, want.abs().max().item())


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("T", [1, 2, 5, 8])
def test_mma_tower(T, gated, dtype):
    reference, model = pair(dtype=dtype, gated=gated)
    pixels = clip(T=T, dtype=dtype)
    with torch.no_grad():
        close(model(pixels).pooled, reference(pixels), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "T", [2, 3, 4, 7, 8, 10, 16], ids=lambda T: f"T{T}"
)  # 7 // 2 divides P; 10 and 16 are averaged
def test_llava_tower(T, dtype):
    reference, model = pair("llava", dtype)
    pixels = clip(T=T, dtype=dtype)
    if T == 3:
        pixels = pixels.transpose(1, 2)  # or it is read channel-first
    with torch.no_grad():
        hidden, pooler = reference(pixels)
        got = model(pixels)
    close(got.tokens, hidden[-2], TOLERANCE[dtype])
    close(got.pooled, pooler.view(2, T, -1).mean(1), TOLERANCE[dtype])


@pytest.mark.parametrize("T, works", [(1, False), (5, False), (9, False), (18, False), (16, True)])
def test_llava_frame_counts(T, works):
    """T // 2 must divide T * P up to the time table's 8 rows (5 // 2 does not); above, T is even and at most 16."""
    reference, model = pair("llava")
    for tower in (model, reference):
        if works:
            tower(clip(T=T))
        else:
            with pytest.raises(ValueError, match=rf"got (T = )?{T}"):
                tower(clip(T=T))


def test_features_part_and_gradients():
    """Stored features: tokens and every gradient as in the reference; the backbone asks for none."""
    config = dataclasses.replace(CONFIG, depth=4, part="features")
    reference = randomized(ReferenceBTAdapter(config, "llava")).double()
    model = BTAdapter(config, compat="official", variant="llava").double()
    load_weights(model, reference.state_dict())
    features, cotangent = torch.randn(2, 4, 1 + P, 16).double(), torch.randn(2, 1 + P, 16).double()
    tokens, want = model(features).tokens, reference(features)[0][-1]
    close(tokens, want)
    (tokens * cotangent).sum().backward()
    (want * cotangent).sum().backward()
    theirs = dict(reference.named_parameters())
    close(model.temporal.branch.gate.grad, theirs["balance2"].grad)
    close(model.temporal.branch.seed.grad, theirs["btadapter_cls_token"].grad[0, 0])
    close(model.temporal.branch.time.grad, theirs["btadapter_time_embed.weight"].grad)
    for j in range(3):
        close(
            model.temporal.branch.temporal[j].fc.weight.grad, theirs[f"btadapter_T_layers.{j}.temporal_fc.weight"].grad
        )
        close(model.temporal.branch.spatial[j].fc1.weight.grad, theirs[f"btadapter_S_layers.{j}.mlp.fc1.weight"].grad)
        thirds = [theirs[f"btadapter_S_layers.{j}.self_attn.{n}_proj.weight"].grad for n in "qkv"]
        close(model.temporal.branch.spatial[j].qkv.weight.grad, torch.cat(thirds))
    assert all(p.grad is None for p in model.tower.parameters())


def test_pooled_gradients():
    """The class-token shortcut has the gradients of the long way."""
    reference, model = pair()
    pixels, cotangent = clip(), torch.randn(2, 6).double()
    (model(pixels).pooled * cotangent).sum().backward()
    (reference(pixels) * cotangent).sum().backward()
    theirs = dict(reference.named_parameters())
    close(model.temporal.output_gate.grad, theirs["balance1"].grad)
    for j in range(3):
        thirds = [theirs[f"btadapter_S_layers.{j}.self_attn.{n}_proj.weight"].grad for n in "qkv"]
        close(model.temporal.branch.spatial[j].qkv.weight.grad, torch.cat(thirds))
        close(
            model.temporal.branch.temporal[j].out.weight.grad,
            theirs[f"btadapter_T_layers.{j}.self_attn.out_proj.weight"].grad,
        )


@pytest.mark.parametrize("T", [4, 16], ids=["T4", "T16_in_pairs"])
@pytest.mark.parametrize("compat, variant", [("paper", "mma"), ("official", "llava")])
@torch.no_grad()
def test_what_is_not_asked_for_changes_nothing(compat, variant, T):
    model = randomized(BTAdapter(CONFIG, compat=compat, variant=variant)).double()
    pixels = clip(T=T)
    both = model(pixels)
    close(model(pixels, outputs=("tokens",)).tokens, both.tokens)
    close(model(pixels, outputs=("pooled",)).pooled, both.pooled)
    assert model(pixels, outputs=("tokens",)).pooled is None and model(pixels, outputs=("pooled",)).tokens is None
    xs = model.tower(pixels, range(CONFIG.fork, VISION.layers))
    group = model.temporal.grouping(T, P)
    states = model.temporal.branch(xs, model.tower.position, group)  # every layer in full
    close(both.tokens, fused_tokens(xs[-2], group.patch_mean(states[-2][0]), states[-2][1]))
    frames = model.tower.projection(model.temporal.frame_vectors(xs[-1], states[-1][1], model.tower))
    close(both.pooled, frames.mean(1))
    close(model.temporal.encode(xs, model.tower, outputs=("pooled",), per_frame=True).pooled, frames)
    close(model.from_layers(xs).pooled, both.pooled)
    features = model.tower(pixels, [CONFIG.fork - 1])[0]
    close(model.from_features(features).pooled, both.pooled)


@torch.no_grad()
def test_parts_hold_what_they_need():
    full = randomized(BTAdapter(CONFIG)).double()
    pixels = clip()
    want = full(pixels).tokens
    for part in ("tokens", "features"):
        model = BTAdapter(dataclasses.replace(CONFIG, part=part)).double()
        model.load_state_dict({k: v for k, v in full.state_dict().items() if k in model.state_dict()})
        source = pixels if part == "tokens" else full.tower(pixels, [CONFIG.fork - 1])[0]
        close(model(source).tokens, want)
        with pytest.raises(ValueError, match="outputs must be"):
            model(source, outputs=("pooled",))


@torch.no_grad()
def test_paper_mode_sees_time():
    """Groups are whole clips: reversing the frames of T <= 64 matters, and so does a frame of the other half."""
    model = randomized(BTAdapter(CONFIG)).double()
    with_half = randomized(BTAdapter(CONFIG, compat="official", variant="llava")).double()
    with_half.load_state_dict(model.state_dict())
    pixels = clip(B=1)
    assert (model(pixels).tokens - model(pixels.flip(1)).tokens).abs().max() > 1e-3
    assert (model(pixels).tokens - with_half(pixels).tokens).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("compat, variant", [("paper", "mma"), ("official", "mma"), ("official", "llava")])
def test_batch_rows_are_independent(compat, variant):
    model = randomized(BTAdapter(CONFIG, compat=compat, variant=variant)).double()
    pixels = clip(B=3)
    whole = model(pixels)
    for b in range(3):
        single = model(pixels[b : b + 1])
        close(single.tokens, whole.tokens[b : b + 1])
        close(single.pooled, whole.pooled[b : b + 1])


@torch.no_grad()
def test_masks():
    """A tube equals the reference with its mask put in order; the official order equals the reference as it is."""
    reference, model = pair()
    paper = BTAdapter(CONFIG).double()
    paper.load_state_dict(model.state_dict())
    pixels, T = clip(), 4
    tube = torch.stack([torch.randperm(P) < 6 for _ in range(2)])
    patch_major = tube.repeat_interleave(T, dim=1)  # what the official code would need to be given for a tube
    close(paper(pixels, mask=tube, outputs=("pooled",)).pooled, reference(pixels, patch_major))
    frame_major = tube.repeat(1, T)
    want = reference(pixels, frame_major)
    close(model(pixels, mask=frame_major, outputs=("pooled",)).pooled, want)
    assert (want - reference(pixels, patch_major)).abs().max() > 1e-3
    for bad in (tube[:, :-1], torch.tensor([[True] * 2 + [False] * 7, [True] * 3 + [False] * 6]), torch.ones(P).bool()):
        with pytest.raises(ValueError, match="mask"):
            paper(pixels, mask=bad, outputs=("pooled",))
    for other in (tube.float(), torch.arange(P)):
        with pytest.raises(ValueError, match="mask must be bool, True = removed"):
            paper(pixels, mask=other, outputs=("pooled",))
    with pytest.raises(ValueError, match="tokens need all patches"):
        paper(pixels, mask=tube)
    with pytest.raises(ValueError, match="no mask"):
        grouping(4, P, compat="official", variant="llava", mask=frame_major)


def test_grouping_is_a_permutation():
    for T in (2, 3, 4, 7, 8):
        group = grouping(T, P, compat="official", variant="llava", time_length=8)
        assert group.keep.shape == (1, T // 2, P * T // (T // 2))
        assert sorted(group.keep.flatten().tolist()) == list(range(T * P))
        z = torch.arange(T * P).view(1, T * P, 1)[:, group.keep.flatten()].view(1, *group.keep.shape[1:], 1).double()
        want = torch.arange(T * P).view(1, T, P, 1).double().mean(1)
        close(group.patch_mean(z), want)


@torch.no_grad()
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_fold(hidden_act):
    model = randomized(
        BTAdapter(dataclasses.replace(CONFIG, vision=dataclasses.replace(VISION, hidden_act=hidden_act)))
    )
    model = model.double()
    pixels, before = clip(), {k: v.clone() for k, v in model.state_dict().items()}
    want, folded = model(pixels), model.fold()
    got = folded(pixels)
    close(got.tokens, want.tokens)
    close(got.pooled, want.pooled)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model itself is unchanged"
    assert not any(p.requires_grad for p in folded.parameters())
    assert folded.tower.position.data_ptr() == model.tower.position.data_ptr(), "what stays the same is shared"
    half = model.fold(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for refused in (folded.train, folded.fold, lambda: folded.save("x"), lambda: folded.load_state_dict(before)):
        with pytest.raises(RuntimeError, match="folded"):
            refused()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """At most twice the error of the reference in the same dtype, plus one rounding."""
    reference, model = pair()
    pixels = clip()
    want = reference(pixels)
    plain = (reference.to(dtype)(pixels.to(dtype)).double() - want).abs().max()
    got = model.to(dtype)(pixels)
    assert got.pooled.dtype == dtype
    scale = want.abs().max()
    assert (got.pooled.double() - want).abs().max() <= 2 * plain + torch.finfo(dtype).eps * scale


@torch.no_grad()
def test_save_and_load(tmp_path):
    model = BTAdapter(BTAdapterConfig.named("tiny")).eval()
    assert model.is_random
    assert model.save(tmp_path / "m").name == "model.safetensors"
    loaded = BTAdapter.from_pretrained(tmp_path / "m")
    assert loaded.is_random and not loaded.training and loaded.config == model.config
    pixels = torch.randn(1, 2, 3, 224, 224)
    for name in ("tokens", "pooled"):
        assert torch.equal(getattr(loaded(pixels), name), getattr(model(pixels), name))
    assert not loaded.tower.position.requires_grad and loaded.temporal.branch.time.requires_grad
    other = BTAdapter.from_pretrained(tmp_path / "m" / "model.safetensors", compat="official", variant="llava")
    assert (other.compat, other.variant) == ("official", "llava")
    with pytest.raises(FileNotFoundError):
        BTAdapter.from_pretrained(tmp_path / "nothing")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="did not write.*load_official"):
        BTAdapter.from_pretrained(tmp_path / "other.safetensors")


def test_configs():
    assert BTAdapterConfig.names() == ["clip-b-16", "clip-l-14", "tiny"]
    for name in BTAdapterConfig.names():
        config = BTAdapterConfig.named(name)
        assert BTAdapterConfig.from_dict(config.to_dict()) == config
    large = BTAdapterConfig.named("clip-l-14", part="features")
    assert large.vision.patches == 256 and list(large.backbone_layers) == [20, 21, 22] and large.branch_layers == 3
    with torch.device("meta"):
        model = BTAdapter(BTAdapterConfig.named("clip-l-14"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 71_453_696, "the branch of the paper's size (the MBTA head is apart)"
    for wrong in ({"part": "half"}, {"depth": 9}, {"depth": 1, "part": "tokens"}):
        with pytest.raises(ValueError, match="BTAdapterConfig"):
            dataclasses.replace(CONFIG, **wrong)
    with pytest.raises(ValueError, match="unknown fields"):
        BTAdapterConfig.from_dict({**CONFIG.to_dict(), "width": 3})
    with pytest.raises(ValueError, match="no size named"):
        BTAdapterConfig.named("clip-h")


def test_init_from_the_tower():
    model = BTAdapter(CONFIG)
    model.temporal.init_from(model.tower)
    for j in range(3):
        theirs = model.tower.blocks[str(CONFIG.fork + j)].state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in model.temporal.branch.spatial[j].state_dict().items())


def test_inputs_are_checked():
    paper = BTAdapter(CONFIG)
    frames = torch.zeros(2, 4, 3, 12, 12)
    with pytest.raises(ValueError, match=r"transpose\(1, 2\)"):
        paper(frames.transpose(1, 2))
    for bad in (frames[0], frames[:, :, :2], frames[0, 0]):
        with pytest.raises(ValueError, match="pixels must be"):
            paper(bad)
    with pytest.raises(ValueError, match="normalized"):
        paper(frames.byte())
    with pytest.raises(ValueError, match="12x12"):
        paper(torch.zeros(1, 2, 3, 16, 16))
    with pytest.raises(ValueError, match="got 17"):
        paper(torch.zeros(1, 17, 3, 12, 12))
    for outputs in ((), ("pool",), ("tokens", "x")):
        with pytest.raises(ValueError, match="outputs must be"):
            paper(frames, outputs=outputs)
    with pytest.raises(ValueError, match="compat must be"):
        BTAdapter(CONFIG, compat="exact")
    with pytest.raises(ValueError, match=r"backbone tokens must be \[B, T, 10, 16\]"):
        paper.from_features(torch.zeros(2, 4, 10, 8))
    with pytest.raises(ValueError, match="backbone layers"):
        paper.from_layers([torch.zeros(2, 4, 10, 16)])
    official = BTAdapter(CONFIG, compat="official", variant="llava")
    with pytest.raises(ValueError, match="3 frames"):
        official.from_features(torch.zeros(2, 3, 10, 16))


@torch.no_grad()
def test_times_pass_through():
    times = torch.tensor([[0.0, 0.5]])
    assert BTAdapter(CONFIG)(clip(1, 2, torch.float32), times=times).times is times


def test_autocast():
    """Mixed precision: float32 parameters and residual streams, bfloat16 products, gradients in float32."""
    model = randomized(BTAdapter(CONFIG))
    pixels = clip(dtype=torch.float32)
    with torch.no_grad():
        want = model(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(pixels)
        got.pooled.float().square().sum().backward()
    for name in ("tokens", "pooled"):
        a, b = getattr(got, name).float(), getattr(want, name)
        assert (a - b).norm() < 0.03 * b.norm()
    assert model.temporal.branch.time.grad.dtype == torch.float32 and model.temporal.branch.time.grad.isfinite().all()


@torch.no_grad()
def test_compiles_without_breaks():
    model = randomized(BTAdapter(CONFIG))
    pixels = clip(dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(pixels).pooled, model(pixels).pooled, 1e-6)
    close(compiled(pixels).tokens, model(pixels).tokens, 1e-6)
