"""The temporal embedding table of MA-LMM, read at whole and at fractional rows."""

from collections.abc import Sequence

import torch
from torch import Tensor


def rows_at(table: Tensor, positions: Tensor | Sequence[float]) -> Tensor:
    """Rows at float positions [t] of a table [n, C], linear between neighbors -> [t, C]; differentiable in the table.

    Raises:
        ValueError: positions are not [t] or leave [0, n - 1].
    """
    at = torch.as_tensor(positions, dtype=torch.float32, device=table.device)
    last = len(table) - 1
    if at.dim() != 1 or not bool(((at >= 0) & (at <= last)).all()):
        raise ValueError(f"temporal table: positions must be [t], each in [0, {last}], got {positions}")
    low = at.floor().long()
    return torch.lerp(table[low], table[(low + 1).clamp_max(last)], (at - low)[:, None].to(table.dtype))
