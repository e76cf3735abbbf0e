"""CLIP-ViP (arXiv:2209.06430): a few proxy tokens of the clip see all frames, and every frame sees them."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvidx.backbones.vit import ViT, ViTConfig
from pyvidx.layers.block import Block
from pyvidx.layers.linear import dense
from pyvidx.layers.plain import held
from pyvidx.ops import bank_attention
from pyvidx.ops.bank_attention import MAX_WIDTH
from pyvidx.sizes import check_counts
from pyvidx.temporal.encoding import Encoding
from pyvidx.temporal.frames import frame_mean, token_mask
from pyvidx.temporal.module import OUTPUTS, Grid, TemporalModule
from pyvidx.temporal.registry import register


def proxy_attention(qkv: Tensor, proxies: int, frames: int, frame_mask: Tensor | None = None) -> Tensor:
    """Proxies attend to everything; a patch to the proxies and its own frame, in one softmax.

    qkv [B, M + T*P, 3, H, D] of M proxies and T frames, frame_mask bool [B, T] -> [B, M + T*P, H * D].
    """
    B, L, _, H, D = qkv.shape
    M, T, P = proxies, frames, (L - proxies) // frames
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, L, D] each
    head = F.scaled_dot_product_attention(q[:, :, :M], k, v, attn_mask=token_mask(frame_mask, M, P))
    # Without a gradient on a CPU, keys are read where they lie: 1.05 to 1.3 times as fast. bank_attention's gradient is
    # plain torch, one frame at a time, and on a GPU nobody has measured it against torch's attention.
    fits = qkv.device.type == "cpu" and D % 8 == 0 and D <= MAX_WIDTH
    of_frames = _by_table if fits and not (torch.is_grad_enabled() and qkv.requires_grad) else _by_copies
    return torch.cat([head.transpose(1, 2).reshape(B, M, H * D), of_frames(qkv, M, T, P)], dim=1)


def _by_table(qkv: Tensor, M: int, T: int, P: int) -> Tensor:
    """The patches' attention: the keys of a frame are rows of one memory, the proxies among them. [B, T * P, H * D]"""
    B, L, _, H, _ = qkv.shape
    own = torch.arange(M, L, dtype=torch.int32, device=qkv.device).view(T, P)
    table = torch.cat([torch.arange(M, dtype=torch.int32, device=qkv.device).expand(T, M), own], dim=1)
    q = qkv[:, M:, 0].unflatten(1, (T, P)).flatten(3)
    rows = qkv[:, :, 1:].flatten(2)[:, :, None]  # [B, L, 1, 2 * H * D]
    return bank_attention(q, rows, table[:, None].expand(B, T, 1, M + P), H).flatten(1, 2)


def _by_copies(qkv: Tensor, M: int, T: int, P: int) -> Tensor:
    """The same with torch's attention, which takes no two lists of keys: the M proxies are copied in front of every
    frame's P keys. That costs a pass over keys and values, where writing scores out would cost one over [T*P, M + P]
    for every head."""
    B, _, _, H, D = qkv.shape
    rows = qkv[:, M:].unflatten(1, (T, P))  # [B, T, P, 3, H, D]
    shared = qkv[:, None, :M, 1:].expand(B, T, M, 2, H, D)
    k, v = torch.cat([shared, rows[:, :, :, 1:]], dim=2).permute(3, 0, 1, 4, 2, 5).flatten(1, 2)  # [B * T, H, M + P, D]
    q = rows[:, :, :, 0].flatten(0, 1).transpose(1, 2)  # [B * T, H, P, D]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T * P, H * D)


@register("clip_vip")
class CLIPViP(TemporalModule):
    """The tower's own weights, with attention blocked by frame but for the proxies. Between `embed` and `rows` the
    tokens are one sequence [B, M + T*P, C]: the class token, M - 1 added proxies, then frame after frame. In a tower
    without a class token all M are added, and what stands for it is the pooling probe's of the whole sequence.

    The paper trains CLIP as well. tokens: the class token last, the added proxies left out.

    Args:
        proxies: M, the class token included where there is one.
        time_length: rows of the time table, zero at first; resized linearly to the number of (real) frames.
    """

    reads_only = False

    def __init__(self, vision: ViTConfig, *, proxies: int = 4, time_length: int = 12):
        super().__init__(vision)
        check_counts("CLIPViP", proxies=proxies, time_length=time_length)
        C = vision.width
        self.proxies, added = proxies, proxies - self.before
        self.added = nn.Parameter(torch.randn(added, C) * C**-0.5) if added else None
        self.time = nn.Parameter(torch.zeros(time_length, C))

    def embed(self, x: Tensor, tower: ViT, frame_mask: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        B, T, _, C = x.shape
        if frame_mask is None:
            frame_mask = torch.ones(1, T, dtype=torch.bool, device=x.device)
        patches = x[:, :, self.before :] + self.times(frame_mask)[:, :, None]
        added = []
        if self.added is not None:
            side = tower.config.side
            at_class_token = tower.positions(side, side)[0]
            added = [(held(self, "added") + at_class_token).expand(B, -1, C)]
        return torch.cat([x[:, 0, : self.before], *added, patches.flatten(1, 2)], dim=1)

    def times(self, frame_mask: Tensor) -> Tensor:
        """Rows of the time table, resized for the n real frames of each clip. [B, T] -> [B, T, C]."""
        table, rows, n = held(self, "time"), len(self.time), frame_mask.sum(dim=1, keepdim=True).double()
        place = frame_mask.cumsum(dim=1).double() - 1  # among the real frames
        at = ((place + 0.5) * (rows / n) - 0.5).clamp(0, rows - 1)
        low = at.long()
        return torch.lerp(table[low], table[(low + 1).clamp_max(rows - 1)], (at - low)[..., None].to(table))

    def block(
        self, i: int, block: Block, x: Tensor, frame_mask: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        return block.feed_forward(x + dense(self.attention(block, x, frame_mask, grid), block.out))

    def attention(self, block: Block, x: Tensor, frame_mask: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """What the block's `out` projects: its attention of LN x [B, M + T*P, C], blocked by frame."""
        B, L, C = x.shape
        M, P = self.proxies, self._count(grid)
        qkv = dense(block.norm1(x), block.qkv).view(B, L, 3, block.heads, C // block.heads)
        return proxy_attention(qkv, M, (L - M) // P, frame_mask)

    def rows(self, x: Tensor, tower: ViT, frame_mask: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """[B, M + T*P, C], with what stands for a class token in front where there is none."""
        mask = token_mask(frame_mask, self.proxies, self._count(grid))
        return tower.with_class(x, None if mask is None else mask[:, 0, 0])

    def patches(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        return x[:, self.proxies :].unflatten(1, (-1, self._count(grid)))

    def encode(
        self,
        xs: Sequence[Tensor],
        tower: ViT,
        frame_mask: Tensor | None = None,
        outputs: Sequence[str] = OUTPUTS,
        grid: Grid | None = None,
    ) -> Encoding:
        tokens = None
        if "tokens" in outputs:
            x = xs[-2]
            patches = x[:, self.proxies + 1 - self.before :].unflatten(1, (-1, self._count(grid)))
            tokens = torch.cat([frame_mean(patches, frame_mask), x[:, :1]], dim=1)
        return Encoding(tokens, tower.embedding(xs[-1]) if "pooled" in outputs else None)

    def _count(self, grid: Grid | None) -> int:  # P
        return self.vision.patches if grid is None else math.prod(grid)
