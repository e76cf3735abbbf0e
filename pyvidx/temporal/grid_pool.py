"""Fewer tokens of every frame, frames kept apart: LLaVA-NeXT-Video's pooling of the patch grid."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvidx.backbones.vit import ViTConfig
from pyvidx.sizes import check_counts
from pyvidx.temporal.frames import real_only
from pyvidx.temporal.module import Grid, TemporalModule
from pyvidx.temporal.registry import register

MODES = ("average", "max", "bilinear")


def grid_pool(x: Tensor, mode: str = "average", stride: int = 2, grid: Grid | None = None) -> Tensor:
    """The patch grid of every frame, smaller by `stride`.

    [..., P, C] of a grid (rows, columns), by default a square -> [..., fewer, C]; a side becomes floor(side / stride)
    for "average" and "max", which drop what is left over, and ceil for "bilinear" (align_corners=False).

    Raises:
        ValueError: the patches are no such grid, the mode is unknown, or the stride is larger than a side.
    """
    (*leading, _, C), sides = x.shape, _sides("grid_pool", x, grid)
    check_counts("grid_pool", stride=stride)
    if mode not in MODES or stride > min(sides):
        raise ValueError(
            f"grid_pool: mode must be one of {MODES} and stride in [1, {min(sides)}], got {mode!r} and {stride}"
        )
    patches = x.reshape(math.prod(leading), *sides, C).permute(0, 3, 1, 2)
    if mode == "bilinear":
        size = [-(-side // stride) for side in sides]
        patches = F.interpolate(patches, size=size, mode="bilinear", align_corners=False)
    else:
        patches = (F.avg_pool2d if mode == "average" else F.max_pool2d)(patches, stride)
    return patches.flatten(2).transpose(1, 2).reshape(*leading, math.prod(patches.shape[2:]), C)


def with_newlines(x: Tensor, newline: Tensor, every: str = "frame", grid: Grid | None = None) -> Tensor:
    """A learned row after every "frame", or after every "row" of its grid. [..., T, P, C], [C] -> [..., tokens, C].

    For the rows a language model gets, after its projection. grid: (rows, columns) of the P, by default a square.

    Raises:
        ValueError: the patches are no such grid, or `every` is unknown.
    """
    if every not in ("frame", "row"):
        raise ValueError(f"with_newlines: every must be frame or row, got {every!r}")
    (*leading, T, P, C) = x.shape
    rows, columns = (1, P) if every == "frame" else _sides("with_newlines", x, grid)
    lines = x.reshape(*leading, T * rows, columns, C)
    ends = newline.to(x).expand(*lines.shape[:-2], 1, -1)
    return torch.cat([lines, ends], dim=-2).flatten(-3, -2)


def _sides(op: str, x: Tensor, grid: Grid | None) -> Grid:
    """Rows and columns of the patches of x [..., P, C]."""
    side = math.isqrt(x.shape[-2])
    rows, columns = grid or (side, side)
    if rows * columns != x.shape[-2]:
        wanted = f"a grid of {rows} x {columns}" if grid else "a square; of another grid pass grid=(rows, columns)"
        raise ValueError(f"{op}: the patches must be {wanted}, got {x.shape[-2]} of them")
    return rows, columns


@register("grid_pool")
class GridPool(TemporalModule):
    """No parameters. tokens [B, T * side * side, C], frame after frame, no class token; zero where a frame is not real.

    Args:
        mode, stride: as in `grid_pool`.
    """

    class_row = True

    def __init__(self, vision: ViTConfig, *, mode: str = "average", stride: int = 2):
        super().__init__(vision)
        grid_pool(torch.zeros(vision.patches, 1, device="meta"), mode, stride)  # refuses what does not fit
        self.mode, self.stride = mode, stride

    def pool(self, x: Tensor, frame_mask: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        pooled = grid_pool(x[:, :, 1:], self.mode, self.stride, grid)  # [B, T, side * side, C]
        return real_only(pooled, frame_mask).flatten(1, 2)
