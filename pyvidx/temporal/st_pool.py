"""The pooling of Video-ChatGPT (arXiv:2306.05424): every frame's mean over space, every patch's mean over time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvidx.backbones.vit import ViTConfig
from pyvidx.ops import st_pool
from pyvidx.sizes import check_counts
from pyvidx.temporal.module import Grid, TemporalModule
from pyvidx.temporal.registry import register


def space_time_means(x: Tensor, frame_mask: Tensor | None = None, rows: int | None = None) -> Tensor:
    """[mean over space of every frame; mean over time of every patch].

    Args:
        x: [B, T, P, C] patches.
        frame_mask: bool [B, T]; rows of frames that are not real are zero.
        rows: fill the first part up to this many rows with zeros; more frames stay as they are.

    Returns:
        [B, T + P, C], or [B, max(T, rows) + P, C].
    """
    over_time, over_space = st_pool(x, mask=frame_mask)
    if rows is not None:
        over_space = F.pad(over_space, (0, 0, 0, max(0, rows - x.shape[1])))
    return torch.cat([over_space, over_time], dim=1)


@register("st_pool")
class STPool(TemporalModule):
    """No parameters. tokens [B, max(T, rows) + P, C] of the last layer but one, no class token.

    Args:
        rows: of the frames' part, zeros where there are fewer frames, as the public code has it (zeros before the
            projection to the language model, which turns them into its bias). None: T.
    """

    class_row = True

    def __init__(self, vision: ViTConfig, *, rows: int | None = 100):
        super().__init__(vision)
        if rows is not None:
            check_counts("STPool", 0, rows=rows)
        self.rows = rows

    def pool(self, x: Tensor, frame_mask: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        return space_time_means(x[:, :, 1:], frame_mask, self.rows)
