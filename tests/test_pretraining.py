"""BT-Adapter's pretraining: losses, masks, DropPath, and two processes against one."""

import dataclasses
import math

import pytest
import torch
from torch import distributed as dist

from pyvidx import temporal
from pyvidx.backbones import TextConfig, TextTower
from pyvidx.backbones.vit import ViT, ViTConfig
from pyvidx.models import BTAdapter, VideoEncoder
from pyvidx.models.losses import _unit, alignment, contrastive, gather
from pyvidx.models.pretraining import Pretraining
from pyvidx.temporal.bt_adapter import split_rows
from pyvidx.temporal.grouping import grouping
from pyvidx.temporal.masking import drop_path_draws, random_mask, tube_mask
from tests.test_models import CONFIG, P, clip, close, randomized
from tests.two import two_processes

TEXT = TextConfig(vocab=20, context=8, width=12, heads=2, layers=2, mlp_width=16, embed_dim=6)
IDS = torch.tensor([[1, 5, 19, 0, 0, 0], [1, 8, 3, 2, 19, 0], [1, 4, 4, 19, 0, 0], [1, 19, 0, 0, 0, 0]])


def build(compat="paper", **options):
    """A training step in float64, always with the same weights."""
    torch.manual_seed(1)
    step = randomized(Pretraining(BTAdapter(CONFIG, compat=compat), TextTower(TEXT), **options))
    return step.double()


def batch():
    torch.manual_seed(2)
    return clip(B=4), IDS, tube_mask(4, P)


def test_contrastive():
    a, b = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    p, q = (30 * cosines).softmax(dim=1), (30 * cosines).softmax(dim=0)
    close(contrastive(a, b, scale=30), -(p.diagonal().log() + q.diagonal().log()).mean())
    assert contrastive(a[:1], b[:1]) == 0
    assert contrastive(3 * a, b / 2).allclose(contrastive(a, b))
    for bad in (b[:4], b[:, :3], b[0]):
        with pytest.raises(ValueError, match=r"\[N, E\]"):
            contrastive(a, bad)


def test_alignment():
    a, b = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double().requires_grad_()
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (a, b)]
    close(alignment(a, b), (unit[0] - unit[1]).square().sum(dim=-1).mean())
    assert not alignment(a, b).requires_grad  # the teacher is not taught
    with pytest.raises(ValueError, match="one shape"):
        alignment(a, b[0])


def test_alignment_gradient():
    """Also of a student too short for its direction to count: it is divided by 1e-8 instead of its norm."""
    student, teacher = torch.randn(3, 4, 5).double(), torch.randn(3, 4, 5).double()
    student[0, 0] *= 1e-10
    student[0, 1] = 0
    teacher[0, 2] = 0
    grads = []
    for loss in (alignment, lambda a, b: (2 - 2 * (_unit(a) * _unit(b)).sum(-1)).mean()):
        leaf = student.clone().requires_grad_()
        grads.append(torch.autograd.grad(3 * loss(leaf, teacher), leaf)[0])
    for got, want in zip(*(g.flatten(0, 1) for g in grads)):  # each by its own size
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * want.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_wide(dtype):
    """Logits in float32: near a cosine of 0.3 float16 ones have steps of 0.02."""
    a, b = torch.randn(6, 64).to(dtype), torch.randn(6, 64).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        losses = contrastive(a, b), alignment(a, b)
    for loss, want in zip(losses, (contrastive(a.double(), b.double()), alignment(a.double(), b.double()))):
        assert loss.dtype == torch.float32
        close(loss, want, 1e-5)


def test_masks_remove_what_they_say():
    tubes, flat = tube_mask(500, 256), random_mask(50, 8, 256)
    assert tubes.shape == (500, 256) and (tubes.sum(1) == 179).all()  # int(0.7 * 256)
    assert flat.shape == (50, 2048) and (flat.sum(1) == 1433).all()
    often = tubes.float().mean(dim=0)  # every patch alike: 0.7 +- 0.02
    assert len(tubes.unique(dim=0)) == 500 and 0.6 < often.min() and often.max() < 0.8
    seeded = [tube_mask(3, 16, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*seeded)
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match="rate"):
            tube_mask(1, 4, rate)


def test_mask_orders():
    """A tube said frame by frame is the tube; in the official order its groups are mixtures."""
    T, tube = 4, tube_mask(2, 16, 0.5)
    frame_major = tube.repeat(1, T)
    short, long = grouping(T, 16, mask=tube).keep, grouping(T, 16, mask=frame_major).keep
    assert torch.equal(torch.arange(T)[:, None] * 16 + short[:, None], long)
    official = grouping(T, 16, mask=frame_major, mask_order="official").keep
    assert torch.equal(official, grouping(T, 16, compat="official", mask=frame_major).keep)
    assert torch.equal(long, grouping(T, 16, compat="official", mask=frame_major, mask_order="tube").keep)
    assert not torch.equal(official, long)
    mixed = random_mask(2, T, 16, 0.5)
    kept = grouping(T, 16, mask=mixed).keep.flatten(1).sort(dim=1).values
    assert torch.equal(kept, (~mixed).nonzero()[:, 1].view(2, -1))  # just the tokens it names
    with pytest.raises(ValueError, match="mask_order"):
        grouping(T, 16, mask=tube, mask_order="frames")


def test_drop_path_draws():
    first, second, third = drop_path_draws(0.4, 3, 100, 8, 50, generator=torch.Generator().manual_seed(0))
    assert first is None
    for (time, space), rate in ((second, 0.2), (third, 0.4)):
        assert time.shape == (100, 50) and space.shape == (100, 8)
        assert time.unique().tolist() == space.unique().tolist() == pytest.approx([0, 1 / (1 - rate)])
        assert time.mean() == pytest.approx(1, abs=0.05) and space.mean() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("mask_order", ["tube", "official"])
def test_teachers(mask_order):
    """A kept token's teacher is the backbone's token of its own patch and frame; in the official order another's."""
    step, T = build(mask_order=mask_order), 4
    group = step.grouping(clip_tokens := torch.randn(2, T, 1 + P, CONFIG.vision.width).double(), tube_mask(2, P))
    keep = group.keep[:, None] + torch.arange(T)[:, None] * P if group.keep.dim() == 2 else group.keep
    full = step.model.tower.projection(step.model.tower.norm_post(clip_tokens[:, :, 1:])).flatten(1, 2)
    own = torch.stack([f[k] for f, k in zip(full, keep)])
    assert torch.allclose(step.teacher(clip_tokens, group), own) == (mask_order == "tube")


def test_only_branch_gates_and_head_train():
    step = build().train()
    step(*batch()[:2]).total.backward()
    trained = {n for n, p in step.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {n for n, p in step.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] + "." + n.split(".")[1] for n in trained} == {"model.temporal", "head.0", "head.1"}


def test_training_mode_drops_and_draws():
    pixels, ids, mask = batch()
    step = build(drop_path=0.5)
    still = [step(pixels, ids, mask=mask).total for _ in range(2)]
    assert still[0] == still[1]
    step.train()
    assert step(pixels, ids, mask=mask).total != step(pixels, ids, mask=mask).total
    again = [step(pixels, ids, generator=torch.Generator().manual_seed(5)).total for _ in range(2)]
    assert again[0] == again[1]
    drops = [None] * CONFIG.depth
    assert step(pixels, ids, mask=mask, drops=drops).total == still[0]


def test_cached_layers_are_the_same():
    pixels, ids, mask = batch()
    step = build()
    with torch.no_grad():
        xs = step.model.tower(pixels, range(CONFIG.fork, CONFIG.vision.layers))
        text = step.text(ids)
    assert step.from_layers(xs, text, mask=mask) == step(pixels, ids, mask=mask)
    with pytest.raises(ValueError, match="outputs of backbone layers"):
        step.from_layers(xs[1:], text, mask=mask)


def test_an_unmasked_step_embeds_as_the_model():
    """Rate 0 and no DropPath: the video embedding of the losses is the model's own."""
    pixels, ids, _ = batch()
    step = build(mask_rate=0.0)
    video = step.model(pixels, outputs=("pooled",)).pooled
    close(step(pixels, ids).vtc, contrastive(video, step.text(ids)))


def test_splitting_the_class_row_off_is_exact():
    torch.manual_seed(3)
    x = torch.randn(2, 3, 5, 4).double().requires_grad_()
    for mean in (False, True):
        parts = split_rows(x, mean=mean)
        assert torch.autograd.gradcheck(lambda x, mean=mean: split_rows(x, mean=mean), [x])
        for i in range(len(parts)):  # what is not used gives nothing
            assert torch.autograd.gradcheck(lambda x, i=i, mean=mean: split_rows(x, mean=mean)[i], [x])
    torch.testing.assert_close(parts[2], x[:, :, 1:].mean((1, 2)))


def test_autocast_joins_in_the_wider_dtype():
    step = build().float().train()
    pixels, ids, mask = batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = step(pixels.float(), ids, mask=mask, generator=torch.Generator().manual_seed(1))
    losses.total.backward()
    grads = {n: p.grad for n, p in step.named_parameters() if p.requires_grad}
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads.values())
    exact = build().train()
    exact(pixels, ids, mask=mask, generator=torch.Generator().manual_seed(1)).total.backward()
    near = {n: torch.cosine_similarity(grads[n].double().flatten(), p.grad.flatten(), dim=0)
            for n, p in exact.named_parameters() if p.requires_grad}  # fmt: skip
    assert torch.stack(list(near.values())).median() > 0.98


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """How many values are kept for a backward pass."""

    def __init__(self):
        super().__init__(self.keep, lambda tensor: tensor)
        self.total = 0

    def keep(self, tensor):
        self.total += tensor.numel()
        return tensor


@pytest.mark.parametrize("mask_order", ["tube", "official"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_are_the_batch(mask_order, checkpointing):
    """Losses and gradients, of parts that do not divide it; what is kept for the backward pass is less."""
    pixels, ids, mask = batch()
    K, draws = int((~mask[0]).sum()), torch.Generator().manual_seed(3)
    drops = drop_path_draws(0.5, CONFIG.depth, 4, pixels.shape[1], K, generator=draws)
    results, kept = [], []
    for micro_batch in (None, 4, 3, 1):
        step = build(mask_order=mask_order, checkpointing=checkpointing, micro_batch=micro_batch).train()
        with (sizes := Kept()):
            losses = step(pixels, ids, mask=mask, drops=drops)
        kept.append(sizes.total)
        results.append((losses, gradients(step, losses.total)))
        with torch.no_grad():
            close(torch.stack(step(pixels, ids, mask=mask, drops=drops)), torch.stack(losses))
    for losses, grads in results[1:]:
        close(torch.stack(losses), torch.stack(results[0][0]))
        assert grads.keys() == results[0][1].keys()
        for name, want in results[0][1].items():
            close(grads[name], want, 1e-10)
    if not checkpointing:
        assert kept[0] == kept[1] > 3 * kept[2] and kept[2] >= kept[3]


def test_options_are_checked():
    for wrong, message in (
        ({"micro_batch": 0}, "micro_batch must be at least 1 or None, got 0"), ({"micro_batch": 1.5}, "got 1.5"),
        ({"mask_rate": 1.0}, r"must be in \[0, 1\)"),
        ({"drop_path": -0.1}, r"must be in \[0, 1\)"), ({"weights": (1.0, 1.0)}, "weights must be 3 finite numbers"),
        ({"weights": (1.0, math.nan, 1.0)}, "weights must be 3"), ({"scale": math.inf}, "and scale one"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            build(**wrong)


def test_wrong_input():
    step = build()
    pixels, ids, mask = batch()
    with pytest.raises(ValueError, match="mask"):
        step(pixels, ids, mask=mask[:2])
    with pytest.raises(ValueError, match="rows of the time table"):
        step(clip(B=4, T=16), ids)
    with pytest.raises(ValueError, match="ids must be"):
        step(pixels, ids.float())
    with pytest.raises(ValueError, match="folded"):
        Pretraining(step.model.fold(), step.text)
    with pytest.raises(ValueError, match="mask_order"):
        build(mask_order="frames")
    with pytest.raises(ValueError, match="gradient"):
        gather(pixels, gradient="half")


def gradients(step, loss):
    step.zero_grad()
    loss.backward(retain_graph=True)
    return {n: p.grad.clone() for n, p in step.named_parameters() if p.grad is not None}


def half(both, folder):
    """Half of the batch, as DistributedDataParallel would run it: the mean of the processes' gradients."""
    pixels, ids, mask = (x[2 * both.rank : 2 * both.rank + 2] for x in batch())
    results = {}
    for gradient in ("global", "official"):
        step = build(gradient=gradient)
        ddp = torch.nn.parallel.DistributedDataParallel(step)
        losses = ddp(pixels, ids, mask=mask)
        total = losses.total.detach().clone()
        dist.all_reduce(total)
        losses.total.backward()
        results[gradient] = total / 2, {n: p.grad.clone() for n, p in step.named_parameters() if p.grad is not None}
        for name in ("vtc", "mbca", "mbta"):
            own = gradients(step, getattr(step(pixels, ids, mask=mask), name))
            for g in own.values():
                dist.all_reduce(g)
            results[gradient, name] = {n: g / 2 for n, g in own.items()}
    if both.first:
        torch.save(results, folder / "results.pt")


def test_two_processes_are_one(tmp_path):
    two_processes(half, tmp_path)
    results = torch.load(tmp_path / "results.pt")
    pixels, ids, mask = batch()
    step = build()
    losses = step(pixels, ids, mask=mask)
    whole = gradients(step, losses.total)
    total, halves = results["global"]
    close(total, losses.total.detach(), 1e-5)
    assert halves.keys() == whole.keys()
    for name, want in whole.items():
        close(halves[name], want, 1e-5)
    assert results["official"][0] == total  # the values are the same
    for name, share in (("vtc", 0.5), ("mbca", 0.5), ("mbta", 1.0)):
        for parameter, want in gradients(step, getattr(losses, name)).items():
            close(results["global", name][parameter], want, 1e-5)
            close(results["official", name][parameter], share * want, 1e-5)


SIGLIP = ViTConfig(
    12, 4, 16, 2, 5, 24, hidden_act="gelu_tanh", eps=1e-6, pool="attention", norm_pre=False, patch_bias=True
)


@pytest.mark.parametrize("vision", [CONFIG.vision, SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize("name", temporal.names())
def test_every_module_learns(name, vision):
    """Steps on one batch lower the loss; the frozen text tower and, if not asked for, the image tower stay."""
    torch.manual_seed(0)
    encoder = VideoEncoder(ViT(vision), temporal.create(name, vision))
    text = TextTower(dataclasses.replace(TEXT, embed_dim=vision.embed_dim or vision.width))
    trained = bool(list(encoder.temporal.parameters()))
    if not trained:
        with pytest.raises(ValueError, match=f"{name} has no parameters to train"):
            Pretraining(encoder, text)
    step = Pretraining(encoder, text, train_tower=not trained, scale=10.0).train()
    fixed = {n: p.clone() for n, p in step.named_parameters() if not p.requires_grad}
    assert any(n.startswith("text") for n in fixed) and any(n.startswith("model.tower") for n in fixed) == trained
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=3e-3)
    pixels, mask = clip(B=4).float(), tube_mask(4, P) if step.has_branch else None
    totals = []
    for _ in range(6):
        losses = step(pixels, IDS, mask=mask)
        assert list(losses.named) == (["vtc", "mbca", "mbta"] if step.has_branch else ["vtc"])
        totals.append(losses.total.item())
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert min(totals[-2:]) < totals[0]
    assert all(torch.equal(p, fixed[n]) for n, p in step.named_parameters() if n in fixed)
    if not step.has_branch:
        with pytest.raises(ValueError, match="no branch for a mask"):
            step(pixels, IDS, mask=tube_mask(4, P))


@pytest.mark.parametrize("name", ["joint", "stan"])
def test_parts_of_a_batch_give_the_same_gradients_of_any_module(name):
    def gradients(micro_batch):
        torch.manual_seed(0)
        encoder = VideoEncoder(ViT(CONFIG.vision), temporal.create(name, CONFIG.vision))
        step = Pretraining(encoder, TextTower(TEXT), train_tower=True, drop_path=0.0, micro_batch=micro_batch).double()
        torch.manual_seed(2)
        losses = step(clip(B=4), IDS, mask=torch.arange(P).expand(4, P) < 4 if step.has_branch else None)
        losses.total.backward()
        return [losses.total, *(p.grad for p in step.parameters() if p.grad is not None)]

    for got, want in zip(gradients(3), gradients(None), strict=True):
        close(got, want, 1e-9)
