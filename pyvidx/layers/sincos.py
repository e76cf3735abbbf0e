"""The fixed position table of the transformer (arXiv:1706.03762)."""

import torch
from torch import Tensor


def sincos_table(positions: int, width: int, like: Tensor) -> Tensor:
    """[positions, width] of the dtype and device of `like`: sin in even channels, cos in odd ones.

    table[p, j] = sin or cos of p / 10000^(2 floor(j / 2) / width), computed in float64.
    """
    j = torch.arange(width, device=like.device)
    rate = 10000.0 ** (-2.0 * (j // 2).double() / width)
    angle = torch.arange(positions, dtype=torch.float64, device=like.device)[:, None] * rate
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).to(like.dtype)
