"""Token merging (ToMe, arXiv:2210.09461, section 3) as a bank policy: over time at each position, or within a frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyvidx.memory.bank import Bank
from pyvidx.memory.policies import Fifo
from pyvidx.memory.policy import Policy
from pyvidx.memory.registry import register
from pyvidx.memory.slots import full, join_, wide
from pyvidx.ops._library import require
from pyvidx.ops.memory_merge import EPS


def match(x: Tensor) -> Tensor:
    """Cosines between the even tokens (A) and the odd ones (B): x [..., n, C] -> [..., ceil(n/2), floor(n/2)].

    A zero vector is unlike everything (0), where a plain division gives NaN.
    """
    x = wide(x)
    a, b = x[..., 0::2, :], x[..., 1::2, :]
    norm = x.norm(dim=-1).clamp_min(EPS)
    return a @ b.transpose(-1, -2) / norm[..., 0::2, None] / norm[..., None, 1::2]


def merge_tokens(x: Tensor, sizes: Tensor, r: int, metric: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One round of bipartite soft matching: the r tokens of A that are most like a token of B are merged into it.

    Args:
        x: [B, n, C] floating. sizes: [B, n], what each token counts in a mean. r: 1 to floor(n / 2).
        metric: [B, n, D], whose cosines say what is alike (attention keys, say). None: x.

    Returns:
        x [B, n-r, C] and sizes [B, n-r]: the kept tokens of A, by falling similarity, then all of B; and holder
        [B, n] int64, the output token that holds each input token. The first of equals wins.
    """
    B, n, C = x.shape
    require(1 <= r <= n // 2, f"merge_tokens: r must be 1 to floor(n / 2) = {n // 2}, got {r}")
    # For each of A, how like it is to the best of B, and which that is: [B, ceil(n/2)].
    best, b = match(x if metric is None else metric).max(dim=2)
    by_likeness = best.argsort(dim=1, descending=True, stable=True)
    gone, kept = by_likeness[:, :r], by_likeness[:, r:]
    into = b.gather(1, gone)
    y = wide(x)
    count = sizes.to(y.dtype)
    # A product with zeros and ones instead of scatter_add, whose order of additions varies on CUDA.
    share = (into[:, None] == torch.arange(n // 2, device=x.device)[:, None]) * count[:, 0::2].gather(1, gone)[:, None]
    merged = y[:, 0::2].gather(1, gone[..., None].expand(-1, -1, C))
    sums = y[:, 1::2] * count[:, 1::2, None] + share @ merged
    counts = count[:, 1::2] + share.sum(2)
    rows = y[:, 0::2].gather(1, kept[..., None].expand(-1, -1, C))
    rows = torch.cat([rows, sums / counts[..., None]], dim=1).to(x.dtype)
    places = torch.arange(n - r, device=x.device).expand(B, -1)
    holder = places.new_empty(B, n)
    first_b = kept.shape[1]
    holder[:, 1::2] = places[:, first_b:]
    holder[:, 0::2] = (
        into.new_zeros(B, best.shape[1]).scatter(1, gone, into + first_b).scatter(1, kept, places[:, :first_b])
    )
    out_sizes = torch.cat([sizes[:, 0::2].gather(1, kept), counts.to(sizes.dtype)], dim=1)
    return rows, out_sizes, holder


def reduce_tokens(x: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of a frame merged down to a few, by rounds that halve their number at most.

    Args:
        x: [B, N, C] floating; every round rounds to its dtype. tokens: q, at least 1; N <= q leaves x as it is.

    Returns:
        x [B, q, C], sizes int32 [B, q] (their sum is N), and holder [B, N] int64, the output token that holds each.
    """
    B, N, _ = x.shape
    sizes = torch.ones(B, N, dtype=torch.int32, device=x.device)
    holder = torch.arange(N, device=x.device).expand(B, N)
    while (n := x.shape[1]) > tokens:
        x, sizes, of = merge_tokens(x, sizes, min(n - tokens, n // 2))
        holder = of.gather(1, holder)
    return x, sizes, holder


@register("tome")
def tome(axis: str = "time", **options: Any) -> Policy:
    """Token merging; axis: "time" (ToMeTime) or "space" (ToMeSpace), with the options of that class."""
    require(axis in ("time", "space"), f"tome: axis must be 'time' or 'space', got {axis!r}")
    return (ToMeTime if axis == "time" else ToMeSpace)(**options)


@dataclass(frozen=True)
class ToMeTime(Policy):
    """At each position merge two entries, not necessarily neighbors: one at an even place in time order (A) into the
    one at an odd place (B) that it is most like, as the size-weighted mean. Entries stay in the order of their earliest
    frames, so the spans first..last of two entries may overlap.
    """

    name = "tome"
    chosen = ("axis",)
    whole_frame = False
    capacity: int = 20
    axis: str = field(default="time", init=False)

    def _shrink_(self, bank: Bank, active: Tensor | None) -> None:
        B, S, G = bank.rows.shape[:3]
        batch, position = (torch.arange(n, device=bank.rows.device) for n in (B, G))
        rows = bank.rows[batch[:, None, None], bank.order.long(), position[:, None]]  # [B, G, S, W]
        best = match(rows).flatten(2).argmax(2)  # [B, G], of A * B pairs
        a, b = best // (S // 2) * 2, best % (S // 2) * 2 + 1
        join_(bank, torch.minimum(a, b), torch.maximum(a, b), full(bank, active), how="weighted")


@dataclass(frozen=True)
class ToMeSpace(Policy):
    """Merge each frame's tokens down to `tokens`; keep all frames, or with a capacity the last ones.

    Sizes count the tokens of a frame; their sum over an entry is the N of the frames pushed. The merged tokens of two
    frames do not correspond to each other, so they are not merged over time, and attached rows are refused.
    """

    name = "tome"
    chosen = ("axis",)
    whole_frame = False
    endless = True
    tokens: int = 2
    axis: str = field(default="space", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tokens >= 1, f"tome: tokens must be at least 1, got {self.tokens}")

    def new(self, *sizes: int, attached: Sequence[int] = (), **options: Any) -> Bank:
        require(not attached, f"tome: attached rows go with axis='time', got widths {list(attached)} with axis='space'")
        return super().new(*sizes, **options)

    new.__doc__ = Policy.new.__doc__

    def _stored_positions(self, N: int) -> int:
        return min(N, self.tokens)

    def _reduce(self, frame: Tensor, attached: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor], Tensor]:
        rows, sizes, _ = reduce_tokens(wide(frame), self.tokens)
        return rows, attached, sizes

    def _shrink_(self, bank: Bank, active: Tensor | None) -> None:
        Fifo._shrink_(self, bank, active)
