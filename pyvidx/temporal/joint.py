"""Joint space-time attention: all tokens of a clip in one sequence, as in UMT (arXiv:2303.16058)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyvidx.backbones.vit import ViT, ViTConfig
from pyvidx.layers.block import Block
from pyvidx.layers.plain import held
from pyvidx.layers.sincos import sincos_table
from pyvidx.sizes import check_counts
from pyvidx.temporal.encoding import Encoding
from pyvidx.temporal.frames import frame_mean, token_mask
from pyvidx.temporal.module import OUTPUTS, Grid, TemporalModule
from pyvidx.temporal.registry import register


@register("joint")
class Joint(TemporalModule):
    """Every layer attends over the whole clip: attention costs T times as much. Between `embed` and `rows` the tokens
    are one sequence [B, M + T*P, C], frame after frame, M = 1 with a class token of the clip. What stands for that in a
    tower without one is the pooling probe's of the whole sequence.

    Meant for a tower that is trained as well: a frozen one has never seen such sequences.

    Args:
        time_length: rows of the learned time table, zero at first; unused with sincos.
        sincos: a fixed table over all T*P positions instead, added to the tower's own positions.
        class_token: False: none, as in UMT; pooled is then the tower's embedding of one token, the mean of all, and
            tokens are [B, P, C].
    """

    reads_only = False

    def __init__(
        self,
        vision: ViTConfig,
        *,
        time_length: int = 64,
        sincos: bool = False,
        class_token: bool = True,
    ):
        super().__init__(vision)
        check_counts("Joint", time_length=time_length)
        self.class_token = class_token
        self.leading = int(class_token and vision.class_token)  # M
        self.sees_parts = not sincos  # the table is over all positions
        self.time = None if sincos else nn.Parameter(torch.zeros(time_length, vision.width))

    def check(self, T: int, P: int, frame_mask: Tensor | None = None) -> None:
        if self.time is not None and T > len(self.time):
            raise ValueError(f"Joint: T must be at most {len(self.time)}, the rows of the time table, got {T}")

    def embed(self, x: Tensor, tower: ViT, frame_mask: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        B, T, N, C = x.shape
        patches = x[:, :, self.before :]
        if self.time is None:
            P = N - self.before
            patches = patches + sincos_table(T * P, C, x).view(T, P, C)
        else:
            patches = patches + held(self, "time")[:T, None]
        # The class rows of all frames are the same here.
        return torch.cat([x[:, 0, : self.leading], patches.flatten(1, 2)], dim=1)

    def block(
        self, i: int, block: Block, x: Tensor, frame_mask: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        return block(x, self._mask(frame_mask, grid))

    def rows(self, x: Tensor, tower: ViT, frame_mask: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """[B, M + T*P, C] -> [B, 1 + T*P, C], or [B, T*P, C] without a class token of the clip."""
        mask = self._mask(frame_mask, grid)
        return tower.with_class(x, None if mask is None else mask[:, 0, 0]) if self.class_token else x

    def patches(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        return x[:, self.leading :].unflatten(1, (-1, self._count(grid)))

    def encode(
        self,
        xs: Sequence[Tensor],
        tower: ViT,
        frame_mask: Tensor | None = None,
        outputs: Sequence[str] = OUTPUTS,
        grid: Grid | None = None,
    ) -> Encoding:
        tokens = pooled = None
        if "tokens" in outputs:
            x = xs[-2]
            cls = x[:, : int(self.class_token)]
            tokens = torch.cat([frame_mean(self._patches(x, grid), frame_mask), cls], dim=1)
        if "pooled" in outputs:
            x = xs[-1]
            if not self.class_token:
                mean = frame_mean(self._patches(x, grid), frame_mask).mean(dim=1, keepdim=True)
                x = tower.with_class(mean)
            pooled = tower.embedding(x)
        return Encoding(tokens, pooled)

    def _mask(self, frame_mask: Tensor | None, grid: Grid | None) -> Tensor | None:
        return token_mask(frame_mask, self.leading, self._count(grid))

    def _patches(self, x: Tensor, grid: Grid | None) -> Tensor:  # [B, (1 +) T*P, C] -> [B, T, P, C]
        return x[:, int(self.class_token) :].unflatten(1, (-1, self._count(grid)))

    def _count(self, grid: Grid | None) -> int:  # P
        return self.vision.patches if grid is None else math.prod(grid)
