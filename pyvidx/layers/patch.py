"""From pixels to patch rows, and position tables for another grid: what all ViTs share."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvidx.layers.linear import linear
from pyvidx.ops._library import require_tensors


def patch_rows(
    name: str, pixels: Tensor, weight: Tensor, bias: Tensor | None = None, *, whole: bool = True
) -> tuple[Tensor, int, int]:
    """The patch embedding of a ViT, W patch + bias.

    Args:
        name, pixels, whole: as in patch_grid; pixels are cast to the dtype of weight.
        weight: [C, 3, p, p], bias [C].

    Returns:
        x [images, rows * columns, C], and the patch grid: rows, columns.

    Raises:
        ValueError: as in patch_grid.
    """
    p = weight.shape[-1]
    rows, columns = patch_grid(name, pixels, p, whole=whole)
    pixels = pixels[..., : rows * p, : columns * p]
    # The patch convolution as one GEMM: any dtype on any device, faster than a strided convolution of 3 channels.
    x = pixels.to(weight.dtype).reshape(-1, 3, rows, p, columns, p)
    x = x.permute(0, 2, 4, 1, 3, 5).reshape(-1, rows * columns, 3 * p * p)
    return linear(x, weight.flatten(1), bias), rows, columns


def patch_grid(name: str, pixels: Tensor, p: int, *, whole: bool = True) -> tuple[int, int]:
    """Rows and columns of patches of p x p pixels.

    Args:
        name: of the model, for messages.
        pixels: [..., 3, h, w], floating, normalized.
        whole: h and w must be multiples of p; otherwise what is left over at the right and below is left out.

    Raises:
        ValueError: pixels do not fit, or hold no whole patch.
    """
    require_tensors(name, pixels=pixels)
    if not pixels.is_floating_point() or pixels.dim() < 4 or pixels.shape[-3] != 3:
        raise ValueError(
            f"{name}: pixels must be floating, normalized, [..., 3, h, w], got {tuple(pixels.shape)} {pixels.dtype}"
        )
    h, w = pixels.shape[-2:]
    if (h % p or w % p) if whole else min(h, w) < p:
        what = "multiples of" if whole else "at least"
        raise ValueError(f"{name}: height and width must be {what} the patch size {p}, got {h}x{w}")
    return h // p, w // p


def resize_positions(table: Tensor, rows: int, columns: int, *, before: int = 1) -> Tensor:
    """A position table [before + side * side, C] for another patch grid, bicubic; the rows `before`, the class token's,
    are kept."""
    side = math.isqrt(table.shape[0] - before)
    grid = table[before:].view(1, side, side, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    return torch.cat([table[:before], grid.flatten(2)[0].T.to(table.dtype)])
