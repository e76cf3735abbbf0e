"""UMT (arXiv:2303.16058): a video transformer taught by a frozen CLIP that sees all tokens, while it sees few of them.

    student   x = patches W + b + sincos(t, p), joint attention over the visible tokens of all frames
    teacher   u_k = projection(LN(tokens of layer L - K + k)), of every frame by itself
    loss      mean over k and visible tokens of 2 - 2 cos(LN(W_k (LN(x_k) + sincos)), u_k), x_k of the student's layers

Which tokens are visible is drawn, frame by frame, by the attention of the teacher's class token. UMTStudent is the
paper's; any VideoEncoder can be taught as well, by the tokens of its own last layers.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pyvidx.backbones.vit import ViT
from pyvidx.layers.block import Block, run_blocks
from pyvidx.layers.linear import dense
from pyvidx.layers.patch import patch_rows
from pyvidx.layers.plain import held
from pyvidx.layers.sincos import sincos_table
from pyvidx.models import files
from pyvidx.models.config import known
from pyvidx.models.losses import alignment
from pyvidx.models.video_encoder import VideoEncoder
from pyvidx.ops import token_gather
from pyvidx.ops._library import require_tensors
from pyvidx.sizes import check
from pyvidx.temporal.encoding import Encoding
from pyvidx.temporal.frames import check_frame_mask, frame_mean, real_only, token_mask


@dataclass(frozen=True)
class UMTConfig:
    """Sizes of the student.

    Attributes:
        image_size, patch_size: pixels; images are square.
        width, heads, layers, mlp_width: as in a CLIP tower.
        eps: of every LayerNorm.
    """

    image_size: int
    patch_size: int
    width: int
    heads: int
    layers: int
    mlp_width: int
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check(self)
        if self.width % self.heads:
            raise ValueError(f"UMTConfig: width must be a multiple of heads, got {self.width} and {self.heads}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"UMTConfig: image_size must be a multiple of patch_size, got {self.image_size} and {self.patch_size}"
            )

    @property
    def patches(self) -> int:
        """P, patches of a frame."""
        return (self.image_size // self.patch_size) ** 2


class UMTStudent(nn.Module):
    """A ViT over all tokens of a clip: no class token, a fixed sin-cos table over the T*P positions, GELU.

    The public code gives queries and values a bias and keys none. Ours have one, zero at first, which changes nothing:
    it adds the same to all scores of a query, and softmax takes that away.
    """

    def __init__(self, config: UMTConfig):
        super().__init__()
        self.config, self.layers = config, config.layers
        C, p = config.width, config.patch_size
        self.patch = nn.Parameter(torch.randn(C, 3, p, p) * (3 * p * p) ** -0.5)
        self.patch_bias = nn.Parameter(torch.zeros(C))
        self.blocks = nn.ModuleList(
            Block(C, config.heads, config.mlp_width, "gelu", config.eps) for _ in range(config.layers)
        )
        for block in self.blocks:
            nn.init.zeros_(block.qkv.bias)
        self.norm = nn.LayerNorm(C, eps=config.eps)
        self.norm_pool = nn.LayerNorm(C, eps=config.eps)

    def forward(self, pixels: Tensor, *, frame_mask: Tensor | None = None, per_frame: bool = False) -> Encoding:
        """Encode videos.

        Args:
            pixels: [B, T, 3, h, w], normalized; cast to the model's dtype.
            frame_mask: bool [B, T], True = a real frame; the others have no influence. Default: all are real.
            per_frame: pooled is [B, T, C], zero where a frame is not real.

        Returns:
            tokens [B, T*P, C], frame after frame, zero where a frame is not real; pooled [B, C], LN of their mean.

        Raises:
            ValueError: pixels or frame_mask do not fit.
        """
        self._check(pixels)
        real = check_frame_mask("UMTStudent", frame_mask, *pixels.shape[:2], pixels.device)
        (x,) = self.run(real_only(pixels, real), frame_mask=real)
        x = real_only(self.norm(x), real)  # [B, T, P, C]
        frames = x.mean(dim=2)
        pooled = real_only(self.norm_pool(frames), real) if per_frame else self.norm_pool(frame_mean(frames, real))
        return Encoding(x.flatten(1, 2), pooled)

    def run(
        self, pixels: Tensor, visible: Tensor | None = None, *, taps: int = 1, frame_mask: Tensor | None = None
    ) -> list[Tensor]:
        """Outputs of the last `taps` layers, before any norm.

        visible: as token_gather takes it, int64 [B, T, V], which tokens are seen (flat indices t * P + p); None: all.
        Returns [B, T, V, C] each.
        """
        self._check(pixels)
        B, T, P = *pixels.shape[:2], self.config.patches
        x, _, _ = patch_rows("UMTStudent", pixels, self.patch, self.patch_bias)
        x = x.view(B, T, P, self.config.width) + positions(T, P, x)
        x = (x if visible is None else token_gather(x, visible)).flatten(1, 2)
        last = range(len(self.blocks))[-taps:]
        found = run_blocks(self.blocks, x, last, token_mask(frame_mask, 0, P))
        return [x.unflatten(1, (T, -1)) for x in found]

    def _check(self, pixels: Tensor) -> None:
        require_tensors("UMTStudent", pixels=pixels)
        size = self.config.image_size
        if pixels.dim() != 5 or pixels.shape[2:] != (3, size, size) or not pixels.shape[1]:
            raise ValueError(f"UMTStudent: pixels must be [B, T, 3, {size}, {size}], T > 0, got {tuple(pixels.shape)}")

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, configuration included. A path without that ending is a folder."""
        return files.write(path, "umt", self, {"config": dataclasses.asdict(self.config)})

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "UMTStudent":
        """Load what `save` wrote, a file or its folder, in eval mode and with the dtypes of the file.

        Raises:
            FileNotFoundError, ValueError: see pyvidx.models.files.load.
        """
        return files.load(path, "umt", lambda header: cls(UMTConfig(**known(UMTConfig, header["config"]))))[0]


class EncoderStudent(nn.Module):
    """A VideoEncoder of any tower and module as a student: what it makes of the visible patches, in its last layers.

    Args:
        encoder: whose module can work on some of the patches.

    Raises:
        ValueError: it cannot, or nothing of it asks for a gradient.
    """

    def __init__(self, encoder: VideoEncoder):
        super().__init__()
        if not encoder.temporal.sees_parts:
            raise ValueError(f"UMT: {encoder.temporal.name} of these options needs all patches")
        if encoder.folded or not any(p.requires_grad for p in encoder.parameters()):
            raise ValueError(
                f"UMT: the encoder must not be folded and have something to train; {encoder.temporal.name} beside a "
                "frozen tower has nothing: let the tower's parameters ask for gradients"
            )
        self.encoder = encoder
        c = encoder.tower.config
        self.norm = nn.LayerNorm(c.width, eps=c.eps)
        self.config, self.layers = c, encoder.hidden_layers

    def run(self, pixels: Tensor, visible: Tensor, *, taps: int = 1) -> list[Tensor]:
        """As UMTStudent.run; visible has the same patches of every frame, so that time is seen in one place."""
        T, P = pixels.shape[1], self.config.patches
        keep = visible[:, 0]
        if not torch.equal(visible, tube(keep, T, P)):
            raise ValueError("UMT: visible must be the same patches of every frame for a video encoder")
        return self.encoder.hidden(pixels, keep, taps)


def positions(T: int, P: int, like: Tensor) -> Tensor:
    """The table over all tokens of a clip, [T, P, C], of the width C, dtype and device of like [..., C]."""
    return sincos_table(T * P, like.shape[-1], like).unflatten(0, (T, P))


def tube(keep: Tensor, T: int, P: int) -> Tensor:
    """Patches [B, V] of every frame as flat indices t * P + p, [B, T, V]."""
    return keep[:, None] + P * torch.arange(T, device=keep.device)[:, None]


class UnmaskedTeacher(nn.Module):
    """The first stage of UMT's training: student, frozen teacher, and one head per aligned layer, thrown away later.

    Args:
        student: of the same image size and number of patches as the teacher; of a VideoEncoder, whatever asks for
            gradients is trained, and the same patches are visible in every frame of a clip.
        teacher: a whole image tower.
        taps: K, the last layers of both that are aligned.
        mask_ratio: int(mask_ratio * P) patches of every frame are left out.

    Raises:
        ValueError: sizes or an option do not fit.
    """

    def __init__(self, student: UMTStudent | VideoEncoder, teacher: ViT, *, taps: int = 6, mask_ratio: float = 0.8):
        super().__init__()
        self.by_clip = isinstance(student, VideoEncoder)
        student = EncoderStudent(student) if self.by_clip else student
        s, t = student.config, teacher.config
        if teacher.norm_post is None or t.layers < 2 or (s.image_size, s.patches) != (t.image_size, t.patches):
            raise ValueError(
                f"UnmaskedTeacher: teacher must be whole, of 2 layers or more, with {s.patches} patches of "
                f"{s.image_size} pixels, got {t}"
            )
        most = min(student.layers, t.layers)
        if not 1 <= taps <= most or not 0 <= mask_ratio < 1:
            raise ValueError(
                f"UnmaskedTeacher: taps must be in [1, {most}] and mask_ratio in [0, 1), got {taps} and {mask_ratio}"
            )
        self.student, self.teacher, self.mask_ratio = student, teacher, mask_ratio
        self.teacher.requires_grad_(False)
        E = t.width if teacher.projection is None else t.embed_dim
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(s.width, E), nn.LayerNorm(E, eps=s.eps)) for _ in range(taps)
        )

    def forward(
        self, pixels: Tensor, *, visible: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            pixels: [B, T, 3, h, w], normalized as the teacher's.
            visible: int64 [B, T, V] instead of a draw, flat indices t * P + p ascending.
            generator: of the draw.
        """
        xs = self.taught(pixels)
        if visible is None:
            visible = self.draw(self.attention(xs), generator)
        return self.loss(pixels, xs, visible)

    @torch.no_grad()
    def taught(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """The teacher's last layers, [B, T, 1+P, C] each: those aligned, and two at least."""
        layers = self.teacher.config.layers
        return self.teacher(pixels, range(layers - max(len(self.heads), 2), layers))

    @torch.no_grad()
    def attention(self, xs: Sequence[Tensor]) -> Tensor:
        """Of `taught`, what visible patches are drawn by, [B, T, P]."""
        return class_attention(self.teacher, *xs[-2:])

    def loss(self, pixels: Tensor, xs: Sequence[Tensor], visible: Tensor) -> Tensor:
        """The loss of what `taught` gave and these visible tokens."""
        return alignment(self.predict(pixels, visible), self.targets(xs[-len(self.heads) :], visible))

    def predict(self, pixels: Tensor, visible: Tensor) -> Tensor:
        """The heads' outputs, [K, B, T, V, E]."""
        found = self.student.run(pixels, visible, taps=len(self.heads))
        B, T = pixels.shape[:2]
        table = token_gather(positions(T, self.student.config.patches, found[0]).expand(B, -1, -1, -1), visible)
        return torch.stack(
            [norm(dense(self.student.norm(x) + table, first)) for (first, norm), x in zip(self.heads, found)]
        )

    @torch.no_grad()
    def targets(self, xs: Sequence[Tensor], visible: Tensor) -> Tensor:
        """projection(LN(tokens)) of the visible patches of teacher layers [B, T, 1+P, C] -> [K, B, T, V, E]."""
        tokens = torch.stack([self.teacher.norm(token_gather(x[:, :, 1:], visible)) for x in xs])
        return self.teacher.project(tokens)

    def draw(self, attention: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Visible tokens, drawn without replacement in proportion to the attention they get; for a video encoder in all
        frames of a clip together.

        attention [B, T, P], not negative -> int64 [B, T, V], V = P - int(mask_ratio * P), flat indices t * P + p.
        """
        B, T, P = attention.shape
        count = P - int(self.mask_ratio * P)
        if self.by_clip:
            weights = attention.float().sum(dim=1)
            return tube(torch.multinomial(weights, count, generator=generator).sort(dim=1).values, T, P)
        drawn = torch.multinomial(attention.float().flatten(0, 1), count, generator=generator).sort(dim=1).values
        return drawn.view(B, T, count) + P * torch.arange(T, device=drawn.device)[:, None]


def class_attention(tower: ViT, before: Tensor, after: Tensor) -> Tensor:
    """What the last layer's class token attends to among the patches, averaged over the heads; in a tower without one
    what its pooling probe attends to, or all alike where their mean stands for it.

    before, after: the last layer's input and output, [..., 1+P, C] -> [..., P].
    """
    if tower.config.class_token:
        block, H = tower.blocks[str(tower.layers[-1])], tower.config.heads
        q, k = dense(block.norm1(before), block.qkv).chunk(3, dim=-1)[:2]
        q = q[..., 0, :]
    elif tower.pool is None:
        return torch.full_like(after[..., 1:, 0], 1 / (after.shape[-2] - 1))
    else:
        H, x = tower.pool.heads, tower.norm(tower.own(after))
        q = dense(held(tower.pool, "probe"), tower.pool.qkv).chunk(3, dim=-1)[0].expand(*x.shape[:-2], -1)
        k = dense(x, tower.pool.qkv).chunk(3, dim=-1)[1]
    q, k = q.unflatten(-1, (H, -1)), k.unflatten(-1, (H, -1))  # [..., H, D], [..., N, H, D]
    scores = torch.einsum("...hd,...nhd->...hn", q, k) / math.sqrt(q.shape[-1])
    return scores.softmax(dim=-1)[..., tower.config.before :].mean(dim=-2)
