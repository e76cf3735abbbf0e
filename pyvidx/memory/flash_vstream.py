"""Flash-VStream (arXiv:2506.23825): a few clusters of all frames in the order of their times, and which to look up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyvidx.memory.bank import Bank
from pyvidx.memory.clips import check_clip, check_range
from pyvidx.memory.policy import Policy, check_compat, plain
from pyvidx.memory.registry import register
from pyvidx.memory.slots import may, put_, slot_of, wide
from pyvidx.ops._library import require

ROUNDS, TOLERANCE = 10, 1e-4
COLUMNS = 1 << 16  # of the rows that are widened to float64 at a time


@register("flash_vstream")
@dataclass(frozen=True)
class FlashVStream(Policy):
    """Gather frames until there are more than `capacity` entries, then cluster them to `clusters` by weighted k-means
    (see ordered_kmeans). `flush` clusters before.

    Args:
        capacity: entries after a push at most: clusters, and frames that came since.
        clusters: K.
        compat: "paper"; "official": the time of a cluster is the mean of the places of its members in the list that
            was clustered, which forgets when they were; and where fewer than K rows differ, all count one frame.

    The authors begin with random rows; here the start is every few places of the list. An empty cluster, which theirs
    sets to a random row or divides by zero, takes the row that is farthest from its own center.
    """

    name = "flash_vstream"
    capacity: int = 120
    clusters: int = 60
    compat: str = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_compat(self.name, self.compat)
        fits = 1 <= self.clusters <= self.room
        require(fits, f"flash_vstream: clusters must be in [1, {self.room}], the room for them, got {self.clusters}")

    def _extended(self, bank: Bank) -> Bank:
        time = torch.zeros(bank.order.shape[0], bank.order.shape[2], dtype=torch.float64, device=bank.rows.device)
        return dataclasses.replace(bank, extra={"time": time})  # by slot, the mean number of its frames

    def check_extra(self, bank: Bank) -> None:
        time = bank.extra["time"]
        require(bool(time.isfinite().all()), "flash_vstream: times must be finite", time)

    def _advance_(
        self,
        bank: Bank,
        frame: Tensor,
        attached: Sequence[Tensor],
        when: Tensor | None,
        active: Tensor | None,
        size: Tensor | int,
    ) -> Bank:
        if self._due(bank):
            bank = self._compress(bank, active)
        slot, time = slot_of(bank, bank.length[:, None].long()), bank.extra["time"]
        number = bank.seen[:, None].double()
        if active is not None:
            number = number.where(active[:, None], time.gather(1, slot))
        time.scatter_(1, slot, number)
        put_(bank, frame, attached, when, active, size)
        return bank

    def _compress(self, bank: Bank, active: Tensor | None) -> Bank:
        return self._cluster(bank, active, bank.rows.shape[1])

    def flush(self, bank: Bank, active: Tensor | None = None) -> Bank:
        """Cluster now, where there are more than `clusters` entries."""
        self._check_active(bank, active)
        bank = bank.give_up()
        if bank.bound <= self.clusters:
            return bank
        with plain(bank.rows.device.type):
            bank = self._cluster(bank, active, self.clusters + 1)
        return bank if active is None else dataclasses.replace(bank, ragged=True)

    def _cluster(self, bank: Bank, active: Tensor | None, least: int) -> Bank:
        """In the active videos that hold at least so many entries, more than K."""
        K, T = self.clusters, bank.rows.shape[1]
        on = bank.length >= least
        on = on if active is None else on & active
        if may(on):
            order = bank.order[:, 0].long()
            batch = torch.arange(len(bank), device=order.device)[:, None]
            there = torch.arange(T, device=order.device) < bank.length[:, None]
            sizes = bank.sizes[:, 0].gather(1, order)
            time = bank.extra["time"].gather(1, order)
            rows = bank.rows[batch, order].flatten(2)
            found = _kmeans(rows, sizes, time, there, _even(bank.length, K), self.compat)
            self._write(bank, found, order, on)
        if active is not None:
            return bank
        return dataclasses.replace(bank, bound=least - 1 if bank.ragged else K)

    def _write(self, bank: Bank, found: _Found, order: Tensor, on: Tensor) -> None:
        """The clusters become entries 0 .. K-1, in the slots of these numbers."""
        K, T = found.share.shape[1:]
        batch = torch.arange(len(bank), device=order.device)[:, None]
        for rows in (bank.rows, *bank.attached):
            x = wide(rows[batch, order].flatten(2))
            mean = (found.share.to(x.dtype) @ x).view(len(bank), K, *rows.shape[2:])
            rows[:, :K] = mean.to(rows.dtype).where(on[:, None, None, None], rows[:, :K])
        if bank.first is not None:
            for times, reduce, nothing in ((bank.first, torch.amin, torch.inf), (bank.last, torch.amax, -torch.inf)):
                value = times[:, 0].gather(1, order)[:, None].where(found.member, nothing)
                times[:, 0, :K] = reduce(value, 2).where(on[:, None], times[:, 0, :K])
        free = torch.arange(T, device=order.device)
        more = (0, T - K)
        for tensor, new in (
            (bank.sizes, torch.nn.functional.pad(found.sizes, more)[:, None]),
            (bank.order, free.expand(len(bank), 1, T)),
            (bank.extra["time"], torch.nn.functional.pad(found.times, more)),
            (bank.length, torch.full_like(bank.length, K)),
        ):
            tensor.copy_(new.to(tensor.dtype).where(on.view(-1, *[1] * (tensor.dim() - 1)), tensor))


class Clusters(NamedTuple):
    """A regular grid, in the order of the times."""

    rows: Tensor  # [B, K, N, C], dtype of the frames
    sizes: Tensor  # [B, K] int32, the sum of the weights of each
    times: Tensor  # [B, K] float64


def ordered_kmeans(
    frames: Tensor,
    clusters: int,
    *,
    start: Tensor | None = None,
    sizes: Tensor | None = None,
    times: Tensor | None = None,
    compat: str = "paper",
) -> Clusters:
    """Frames in K clusters by weighted k-means over all N*C numbers.

    Up to 10 rounds: every frame joins the nearest center, the first of equals, and centers become weighted means; where
    they move by less than 1e-4 in all, they stay as they are and that is the end. What is nearest is read off the
    products of the frames, worked out once in float64: a round costs K T^2, not K T N C.

    Args:
        frames: [B, T, N, C] floating. Where T <= K they are the result.
        clusters: K.
        start: int64 [B, K] in [0, T), the frames to start from. None: every few places.
        sizes: int [B, T], the weights, at least 1. None: 1.
        times: [B, T]. None: the numbers of the frames.
        compat: as in FlashVStream.

    Returns:
        The clusters in the order of their times, weighted means of those of their members.

    Raises:
        ValueError: a shape, dtype, device or option does not fit, start is out of range, or a gradient is asked for.
    """
    name = "ordered_kmeans"
    there = check_clip(name, frames, None)
    check_compat(name, compat)
    B, T, N, C = frames.shape
    K = clusters
    require(K >= 1, f"{name}: clusters must be at least 1, got {K}")
    for what, x in (("sizes", sizes), ("times", times)):
        fits = x is None or (x.shape == (B, T) and x.device == frames.device)
        require(fits, f"{name}: {what} must be [B, T] on the device of frames", x, frames)
    whole = sizes is None or not (sizes.is_floating_point() or sizes.is_complex())
    require(whole, f"{name}: sizes must be whole numbers", sizes)
    number = torch.arange(T, device=frames.device).expand(B, T)
    sizes = torch.ones_like(number, dtype=torch.int32) if sizes is None else sizes.int()
    times = (number if times is None else times).double()
    if T <= K:
        return Clusters(frames.clone(), sizes, times)
    if start is None:
        start = _even(there.sum(1), K)
    fits = start.shape == (B, K) and start.dtype == torch.int64 and start.device == frames.device
    require(fits, f"{name}: start must be int64 [B, K] on the device of frames", start, frames)
    check_range(f"{name}: start", start, T - 1)
    with plain(frames.device.type):
        found = _kmeans(frames.flatten(2), sizes, times, there, start, compat)
        rows = found.share.to(wide(frames).dtype) @ wide(frames.flatten(2))
    return Clusters(rows.view(B, K, N, C).to(frames.dtype), found.sizes.int(), found.times)


def retrieve(frames: Tensor, clusters: Tensor, sizes: Tensor, count: int) -> Tensor:
    """For each of the `count` heaviest clusters, heaviest first, the frame that is nearest to its center: which frames
    to show in full resolution.

    Args:
        frames: [B, T, N, C] floating, as they were clustered.
        clusters: [B, K, N, C] floating. sizes: [B, K].
        count: R, in [1, K].

    Returns:
        int64 [B, R], numbers of frames; one may come twice.

    Raises:
        ValueError: a shape or dtype does not fit, count is out of range, or a gradient is asked for.
    """
    check_clip("retrieve", frames, None)
    fits = clusters.dim() == 4 and clusters.shape[0] == len(frames) and clusters.shape[2:] == frames.shape[2:]
    fits = fits and sizes.shape == clusters.shape[:2] and clusters.is_floating_point()
    require(fits, "retrieve: clusters must be floating [B, K, N, C], and sizes [B, K]", clusters, sizes, frames)
    require(1 <= count <= sizes.shape[1], f"retrieve: count must be in [1, {sizes.shape[1]}], got {count}")
    heavy = sizes.sort(dim=1, descending=True, stable=True).indices[:, :count]
    chosen = clusters.flatten(2).gather(1, heavy[..., None].expand(-1, -1, clusters[0, 0].numel()))
    rows, exact = wide(frames.flatten(2)), "donot_use_mm_for_euclid_dist"
    return torch.cdist(chosen.to(rows.dtype), rows, compute_mode=exact).argmin(2)


class _Found(NamedTuple):
    share: Tensor  # [B, K, T] float64, what each row counts in the center of each cluster
    member: Tensor  # [B, K, T] bool
    sizes: Tensor  # [B, K]
    times: Tensor  # [B, K] float64, rising


def _kmeans(rows: Tensor, sizes: Tensor, times: Tensor, there: Tensor, start: Tensor, compat: str) -> _Found:
    """rows [B, T, W], of which `there` [B, T] counts, at least K in each video that matters."""
    B, T, W = rows.shape
    K = start.shape[1]
    place = torch.arange(T, device=rows.device)
    product = sum(part @ part.mT for part in (x.double() for x in rows.split(COLUMNS, dim=2)))
    square = product.diagonal(dim1=1, dim2=2)

    def nearest(share: Tensor) -> tuple[Tensor, Tensor]:
        mixed = share @ product  # center . row, [B, K, T]
        far = (square[:, None] - 2 * mixed + (mixed * share).sum(2, keepdim=True)).clamp_min(0)
        best = far.min(1)
        return best.indices, best.values.where(there, -1)

    def members(label: Tensor) -> Tensor:
        return (label[:, None] == torch.arange(K, device=rows.device)[:, None]) & there[:, None]

    def means(member: Tensor) -> Tensor:
        weight = member * sizes[:, None].double()
        return weight / weight.sum(2, keepdim=True).clamp_min(1e-300)

    def taken(empty: Tensor, far: Tensor) -> Tensor:
        """[B, K] int64: the first empty cluster takes the farthest row, the second the next."""
        farthest = far.sort(dim=1, descending=True, stable=True).indices
        return farthest.gather(1, (empty.cumsum(1) - 1).clamp_min(0))

    share = (start[..., None] == place).double()
    label, done = torch.zeros_like(there, dtype=torch.int64), torch.zeros_like(there[:, :1])
    for _ in range(ROUNDS):
        new_label, far = nearest(share)
        member = members(new_label)
        empty = ~member.any(2)
        alone = taken(empty, far)[..., None] == place
        new = torch.where(empty[..., None], alone.double(), means(member))
        step = new - share
        moved = ((step @ product) * step).sum(2).clamp_min(0).sqrt().sum(1, keepdim=True)
        label = torch.where(done, label, new_label)
        done = done | (moved < TOLERANCE)
        share = torch.where(done[..., None], share, new)
        if not may(~done):
            break
    # No cluster stays empty: it takes a row of another, never its first.
    member = members(label)
    empty = ~member.any(2)
    first = (member.int().cumsum(2) == 1) & member
    _, far = nearest(share)
    alone = (taken(empty, far.where(~first.any(1), -2))[..., None] == place) & empty[..., None]
    member = torch.where(alone.any(1, keepdim=True), alone, member)
    share = torch.where(empty.any(1)[:, None, None], means(member), share)
    total = (member * sizes[:, None]).sum(2)
    if compat == "official":
        share, member, total = _few(rows, there, share, member, total)
        time = (member * place.double()).sum(2) / member.sum(2).clamp_min(1)
    else:
        time = (means(member) * times[:, None]).sum(2)
    by_time = time.sort(dim=1, stable=True).indices
    index = by_time[..., None].expand(-1, -1, T)
    share, member = share.gather(1, index), member.gather(1, index)
    return _Found(share, member, total.gather(1, by_time), time.gather(1, by_time))


def _few(rows: Tensor, there: Tensor, share: Tensor, member: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where fewer than K rows differ, the authors return those, and the first rows once more until there are K, all of
    weight 1."""
    K, T = share.shape[1:]
    place = torch.arange(T, device=rows.device)
    same = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist") == 0
    same &= there[:, None] & there[..., None]
    unique = there & (same.int().argmax(2) == place)
    count = unique.sum(1, keepdim=True)  # [B, 1]
    k = torch.arange(K, device=rows.device)
    again = K - count
    listed = unique.sort(dim=1, descending=True, stable=True).indices  # the unique rows come first
    row = torch.where(k < again, k, listed.gather(1, (k - again).clamp(0, T - 1)))
    alone = row[..., None] == place
    few_member = torch.where((k < again)[..., None], alone, same.gather(1, row[..., None].expand(-1, -1, T)))
    few = count < K
    return (
        torch.where(few[..., None], alone.double(), share),
        torch.where(few[..., None], few_member, member),
        torch.where(few, 1, total),
    )


def _even(length: Tensor, K: int) -> Tensor:
    """int64 [B, K], K places spread evenly over so many, all different where there are as many."""
    return torch.arange(K, device=length.device) * length[:, None].long() // K
