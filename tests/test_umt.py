"""UMT: the student, what of a clip it sees, and that a frozen teacher teaches it."""

import dataclasses
import math

import pytest
import torch

from pyvidx import temporal
from pyvidx.backbones.vit import ViT, ViTConfig
from pyvidx.models import VideoEncoder
from pyvidx.models.umt import UMTConfig, UMTStudent, UnmaskedTeacher, class_attention

TEACHER = ViTConfig(image_size=12, patch_size=4, width=16, heads=2, layers=3, mlp_width=24, embed_dim=6)
STUDENT = UMTConfig(image_size=12, patch_size=4, width=20, heads=2, layers=3, mlp_width=40)
P = STUDENT.patches


def step(**options):
    return UnmaskedTeacher(UMTStudent(STUDENT), ViT(TEACHER), **{"taps": 2, "mask_ratio": 0.6, **options})


def clips(B=2, T=4):
    return torch.randn(B, T, 3, 12, 12)


def test_it_learns():
    """On one batch, from a fixed view: the loss halves, and the teacher stays as it was."""
    model, pixels = step(), clips()
    before = {k: v.clone() for k, v in model.teacher.state_dict().items()}
    visible = model.draw(torch.ones(2, 4, P))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model(pixels, visible=visible)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.state_dict().items())
    unread = ("student.norm_pool",)  # of use only after pretraining
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(n.startswith(unread) for n in lacking)


def test_draws():
    """V of P in every frame, ascending; a patch without attention is not drawn where there are others."""
    model, generator = step(), torch.Generator().manual_seed(3)
    attention = torch.rand(2, 4, P)
    attention[..., :5] = 0
    visible = model.draw(attention, generator)
    assert visible.shape == (2, 4, 4)  # 9 - int(0.6 * 9)
    assert (visible // P == torch.arange(4)[:, None]).all() and (visible % P >= 5).all()
    assert (visible.diff(dim=-1) > 0).all()
    peaked = torch.full((500, 1, P), 0.1)
    peaked[..., 2] = 1.0
    share = [(model.draw(peaked, generator) == p).any(-1).float().mean() for p in (2, 3)]
    assert share[0] > 0.9 > share[1]
    pixels = clips()
    same = [model(pixels, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*same)


@torch.no_grad()
def test_class_attention():
    tower, x = ViT(TEACHER), torch.randn(2, 4, 1 + P, 16)
    block = tower.blocks["2"]
    q, k, _ = block.qkv(block.norm1(x)).view(2, 4, 1 + P, 3, 2, 8).permute(3, 0, 1, 4, 2, 5)
    want = ((q @ k.transpose(-1, -2)) / math.sqrt(8)).softmax(-1)[..., 0, 1:].mean(2)
    torch.testing.assert_close(class_attention(tower, x, x), want)


@torch.no_grad()
def test_student_frame_masks():
    model, pixels = UMTStudent(STUDENT).double(), clips(T=5).double()
    alone, mask = model(pixels[1:, :3]), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    pixels[1, 3:] = math.nan
    got, per_frame = model(pixels, frame_mask=mask), model(pixels, frame_mask=mask, per_frame=True).pooled
    torch.testing.assert_close(got.pooled[1:], alone.pooled)
    torch.testing.assert_close(got.tokens[1:, : 3 * P], alone.tokens)
    assert not got.tokens[1, 3 * P :].any() and not per_frame[1, 3:].any() and per_frame.shape == (2, 5, 20)


@torch.no_grad()
def test_seeing_all_is_the_whole_clip():
    model, pixels = UMTStudent(STUDENT).double(), clips().double()
    everything = torch.arange(4 * P).view(1, 4, P).expand(2, -1, -1).contiguous()
    torch.testing.assert_close(model.run(pixels, everything)[0], model.run(pixels)[0])


@torch.no_grad()
def test_save_and_load(tmp_path):
    model, pixels = UMTStudent(STUDENT).eval(), clips()
    again = UMTStudent.from_pretrained(model.save(tmp_path / "student"))
    assert again.config == STUDENT and torch.equal(again(pixels).pooled, model(pixels).pooled)


def test_errors():
    for options in ({"taps": 4}, {"taps": 0}, {"mask_ratio": 1.0}):
        with pytest.raises(ValueError, match="taps must be in"):
            step(**options)
    with pytest.raises(ValueError, match="teacher must be whole.* with 9 patches"):
        UnmaskedTeacher(UMTStudent(STUDENT), ViT(dataclasses.replace(TEACHER, patch_size=6)))
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size"):
        dataclasses.replace(STUDENT, patch_size=5)
    with pytest.raises(ValueError, match="width must be a multiple of heads"):
        dataclasses.replace(STUDENT, heads=STUDENT.width - 1)
    for pixels in (clips()[0], clips()[..., :8], clips()[:, :0], clips()[:, :, :2], torch.zeros(3)):
        with pytest.raises(ValueError, match="pixels must be"):
            UMTStudent(STUDENT)(pixels)


SIGLIP = dataclasses.replace(
    TEACHER, embed_dim=None, hidden_act="gelu_tanh", eps=1e-6, pool="attention", norm_pre=False, patch_bias=True
)


@pytest.mark.parametrize("vision", [TEACHER, SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize("name", temporal.names())
def test_any_encoder_is_taught(name, vision):
    """Steps on one batch lower the loss; a module without parameters has to have its tower trained."""
    torch.manual_seed(0)
    options = {"depth": 2} if name in ("branch", "bt_adapter", "stan") else {}
    encoder, teacher, pixels = VideoEncoder(ViT(vision), temporal.create(name, vision, **options)), ViT(vision), clips()
    if not list(encoder.temporal.parameters()):
        with pytest.raises(ValueError, match=f"{name} beside a frozen tower"):
            UnmaskedTeacher(encoder, teacher, taps=2)
        encoder.tower.requires_grad_(True)
    model = UnmaskedTeacher(encoder, teacher, taps=2, mask_ratio=0.6)
    visible = model.draw(model.attention(model.taught(pixels)))
    assert visible.shape == (2, 4, 4) and (visible == visible[:, :1] + P * torch.arange(4)[:, None]).all()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = [p.clone() for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(pixels, visible=visible)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert any(not torch.equal(a, b) for a, b in zip(before, (p for p in encoder.parameters() if p.requires_grad)))
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    with pytest.raises(ValueError, match="the same patches of every frame"):
        model(pixels, visible=visible + torch.arange(4)[:, None])


@pytest.mark.parametrize("name, options", [("joint", {"sincos": True}), ("st_adapter", {"kernel": (3, 3, 3)})])
def test_modules_that_need_all_patches(name, options):
    encoder = VideoEncoder(ViT(TEACHER), temporal.create(name, TEACHER, **options))
    with pytest.raises(ValueError, match=f"{name} of these options needs all patches"):
        UnmaskedTeacher(encoder, ViT(TEACHER))


@torch.no_grad()
@pytest.mark.parametrize("name", temporal.names())
def test_hidden_layers_of_all_patches(name):
    """With nothing left out they are what the encoder's own forward pass goes through."""
    options = {"depth": 2} if name in ("branch", "bt_adapter", "stan") else {}
    encoder = VideoEncoder(ViT(TEACHER), temporal.create(name, TEACHER, **options))
    pixels, module = clips(), encoder.temporal
    (last,) = encoder.hidden(pixels, torch.arange(P).expand(2, -1), 1)
    if module.reads_only and not hasattr(module, "branch"):
        want = encoder.tower(pixels)[0][:, :, 1:]
    elif module.reads_only:
        xs = encoder.layers(pixels, outputs=("pooled",))
        rows = module.branch.rows(
            xs, module.positions(encoder.tower), module.grouping(4, P), seed=module.seed(encoder.tower)
        )
        want = rows[-1][:, :, 1:]
    else:
        x = encoder.tower.norm_pre(module.embed(encoder.tower.tokens(pixels), encoder.tower))
        for i in encoder.tower.layers:
            x = module.block(i, encoder.tower.blocks[str(i)], x)
        want = module.patches(x)
    torch.testing.assert_close(last, want)


@torch.no_grad()
def test_attention_of_a_pooling_probe():
    """A tower without a class token: what its probe attends to after the last layer."""
    tower, x = ViT(SIGLIP), torch.randn(2, 4, 1 + P, 16)
    tokens, head = tower.norm(x[:, :, 1:]), tower.pool
    q, k = head.qkv(head.probe)[:16].view(2, 8), head.qkv(tokens)[..., 16:32].view(2, 4, P, 2, 8)
    want = (torch.einsum("hd,btnhd->bthn", q, k) / math.sqrt(8)).softmax(-1).mean(2)
    torch.testing.assert_close(class_attention(tower, x, x), want)
    mean = ViT(dataclasses.replace(tower.config, pool="mean"))
    assert torch.equal(class_attention(mean, x, x), torch.full_like(want, 1 / want.shape[-1]))
