"""ST-Adapter (arXiv:2206.13559): bottlenecks with a depthwise convolution over time inside the tower's blocks."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvidx.backbones.vit import ViT, ViTConfig
from pyvidx.layers.block import Block
from pyvidx.layers.linear import dense
from pyvidx.ops import temporal_scale
from pyvidx.sizes import check_counts
from pyvidx.temporal.encoding import Encoding
from pyvidx.temporal.frames import frame_mean, real_only
from pyvidx.temporal.module import OUTPUTS, Grid, TemporalModule
from pyvidx.temporal.registry import register

PLACES = ("both", "attention", "mlp")


class Adapter(nn.Module):
    """up(conv(down x)) on the patches; the class token passes by. Zero at first: the convolution starts at zero.

    The public code has no activation; neither has this.
    """

    def __init__(self, width: int, hidden: int, kernel: tuple[int, int, int], before: int = 1):
        super().__init__()
        self.before = before
        self.down = nn.Linear(width, hidden)
        self.weight = nn.Parameter(torch.zeros(hidden, *kernel))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.up = nn.Linear(hidden, width)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, frame_mask: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """x [B, T, before+P, C], a class token first or none -> x + what the adapter makes of its patches."""
        patches = x[:, :, self.before :]
        y = patches + dense(self._conv(dense(patches, self.down), frame_mask, grid), self.up)
        return torch.cat([x[:, :, : self.before], y], dim=2)

    def _conv(self, y: Tensor, frame_mask: Tensor | None, grid: Grid | None) -> Tensor:  # [B, T, P, A] -> the same
        # Padding is to the convolution what lies beyond the ends: zero after `down`, whose bias is not.
        A, *kernel = self.weight.shape
        if kernel[1:] == [1, 1]:
            return temporal_scale(y, self.weight.view(A, -1), self.bias, mask=frame_mask)
        sides = grid or (math.isqrt(y.shape[2]),) * 2
        patches = real_only(y, frame_mask).unflatten(2, sides).permute(0, 4, 1, 2, 3)  # [B, A, T, rows, columns]
        z = F.conv3d(patches, self.weight[:, None], self.bias, padding=[k // 2 for k in kernel], groups=A)
        return z.permute(0, 2, 3, 4, 1).flatten(2, 3)


@register("st_adapter")
class STAdapter(TemporalModule):
    """Adapters before the attention and before the MLP of the tower's blocks; as they start, they change nothing.

    pooled: projection(LN(mean over the frames of the class tokens)).

    Args:
        layers: in the last this many layers of the tower; None: in all.
        width: of the bottleneck.
        kernel: of the convolution over (time, rows, columns), odd. (3, 1, 1), that of the published scripts, sees time
            only.
        places: "both", "attention" (before it) or "mlp".
    """

    reads_only = False

    def __init__(
        self,
        vision: ViTConfig,
        *,
        layers: int | None = None,
        width: int = 384,
        kernel: Sequence[int] = (3, 1, 1),
        places: str = "both",
    ):
        super().__init__(vision)
        layers, kernel = vision.layers if layers is None else layers, tuple(kernel)
        check_counts("STAdapter", layers=layers, width=width)
        if not 1 <= layers <= vision.layers:
            raise ValueError(f"STAdapter: layers must be in [1, {vision.layers}], got {layers}")
        if len(kernel) != 3 or any(type(k) is not int or k < 1 or k % 2 == 0 for k in kernel):
            raise ValueError(f"STAdapter: kernel must be three odd whole numbers, got {kernel}")
        if places not in PLACES:
            raise ValueError(f"STAdapter: places must be one of {PLACES}, got {places!r}")
        self.first, self.sees_parts = vision.layers - layers, kernel[1:] == (1, 1)

        def adapters(place: str) -> nn.ModuleList | None:
            if places not in ("both", place):
                return None
            return nn.ModuleList(Adapter(vision.width, width, kernel, self.before) for _ in range(layers))

        self.attention, self.mlp = adapters("attention"), adapters("mlp")

    def block(
        self, i: int, block: Block, x: Tensor, frame_mask: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        j = i - self.first
        if j < 0:
            return block(x)
        if self.attention is not None:
            x = self.attention[j](x, frame_mask, grid)
        x = x + block.attend(x)
        if self.mlp is not None:
            x = self.mlp[j](x, frame_mask, grid)
        return block.feed_forward(x)

    def encode(
        self,
        xs: Sequence[Tensor],
        tower: ViT,
        frame_mask: Tensor | None = None,
        outputs: Sequence[str] = OUTPUTS,
        grid: Grid | None = None,
    ) -> Encoding:
        tokens = self.pool(xs[-2], frame_mask, grid) if "tokens" in outputs else None
        pooled = tower.embedding(frame_mean(xs[-1][:, :, :1], frame_mask)) if "pooled" in outputs else None
        return Encoding(tokens, pooled)
