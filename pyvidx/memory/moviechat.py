"""MovieChat (arXiv:2307.16449): a short list of recent frames, merged down into a long one that only grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyvidx.memory.bank import Bank, Entries
from pyvidx.memory.layout import grown
from pyvidx.memory.neighbors import mean_product, merge_once_, put_alike_, relate_, shrunk, whole_cosine
from pyvidx.memory.policy import Policy, check_compat, plain
from pyvidx.memory.registry import register
from pyvidx.memory.slots import copy_, may, remove_
from pyvidx.ops._library import require


@register("moviechat")
def moviechat(form: str = "fragments", **options: Any) -> Policy:
    """MovieChat; form: "fragments" (MovieChat, the model's own) or "onevision" (MovieChatOneVision, its LLaVA-OneVision
    evaluation), with the options of that class."""
    require(form in ("fragments", "onevision"), f"moviechat: form must be 'fragments' or 'onevision', got {form!r}")
    return (MovieChat if form == "fragments" else MovieChatOneVision)(**options)


def moviechat_consolidate(
    frames: Tensor, capacity: int, lengths: Tensor | None = None, compat: str = "paper"
) -> Entries:
    """A whole clip down to `capacity` frames: the two neighbors of the largest cosine over N*C become their plain mean,
    again and again. What MovieChat trains with.

    Args:
        frames: [B, T, N, C] floating.
        capacity: frames that are left at most.
        lengths: int [B] in [0, T], the frames of each video, the first ones. None: T.
        compat: "paper"; "official": as the authors' training code, which takes a distance for a similarity and so
            merges the two that are least alike.

    Returns:
        At most `capacity` entries in time order.

    Raises:
        ValueError: a shape, dtype, length or option does not fit, or a gradient is asked for.
    """
    name = "moviechat_consolidate"
    check_compat(name, compat)
    require(capacity >= 1, f"{name}: capacity must be at least 1, got {capacity}")
    likeness = whole_cosine if compat == "paper" else lambda x, y, N: -whole_cosine(x, y, N)
    return shrunk(name, frames, None, lengths, capacity, likeness, "plain", whole=True)


@dataclass(frozen=True)
class MovieChat(Policy):
    """Gather the frames of a fragment; at its end merge them down to `merged` and append those to the long list.

    Merging: while there are more than `merged`, the two neighbors of the largest mean inner product of their rows,
    which is that of their mean rows, become their plain mean. The entries are the long list and what is gathered. A
    fragment ends by itself after `fragment` frames; `flush` ends it before.

    Args:
        fragment: frames of a fragment.
        used: of these the first so many are looked at, the rest is left out. None: all.
        short: of those the last so many are kept.
        merged: M, what is left of a fragment.

    Fragments of fewer than M frames are appended as they are. The long list grows with the video: the length of 256
    that the paper names is not enforced by its authors' code either.
    """

    name = "moviechat"
    chosen = ("form",)
    similarity = True
    endless = True
    capacity: None = field(default=None, init=False)
    form: str = field(default="fragments", init=False)
    fragment: int = 8
    used: int | None = None
    short: int = 18
    merged: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        least = min(self.fragment, self.short, self.merged, self._used)
        require(least >= 1, f"moviechat: fragment, used, short and merged must be at least 1, got {self.spec()}")

    @property
    def _used(self) -> int:
        return self.fragment if self.used is None else self.used

    def _extended(self, bank: Bank) -> Bank:
        zeros = torch.zeros_like(bank.length)
        # Entries at the end that are not yet merged, and frames of the fragment that has begun. On the host, at most:
        # the same two, and frames altogether.
        return dataclasses.replace(bank, extra={"recent": zeros, "phase": zeros.clone()}, counts=(0, 0, 0))

    def check_extra(self, bank: Bank) -> None:
        recent, phase = bank.extra["recent"], bank.extra["phase"]
        gathered, begun, frames = bank.counts
        fits = 0 <= gathered <= self.short and 0 <= begun <= self.fragment and 0 <= frames < 2**62
        fits = fits and bool(((recent >= 0) & (recent <= gathered) & (recent <= bank.length)).all())
        fits = fits and bool(((phase >= 0) & (phase <= begun)).all())
        require(fits, f"{self.name}: what is gathered must be at most {self.short} of the entries", recent, phase)

    def _most(self, frames: int) -> int:
        """Entries at most: so many fragments, and one that has begun."""
        return frames // self.fragment * self.merged + self.short

    def _due(self, bank: Bank) -> bool:
        return bank.counts[1] >= self.fragment

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
        if bank.bound >= bank.rows.shape[1]:
            bank = grown(bank, 2 * bank.rows.shape[1])
        recent, phase, (gathered, begun, frames) = bank.extra["recent"], bank.extra["phase"], bank.counts
        on = torch.ones_like(phase, dtype=torch.bool) if active is None else active
        look = active if self._used >= self.fragment else on & (phase < self._used)
        if self._used > self.short:
            full = on & (phase < self._used) & (recent == self.short)
            remove_(bank, (bank.length - recent)[:, None].long(), full)
            recent.sub_(full.int())
        put_alike_(bank, mean_product, frame, attached, when, look, size)
        if look is not active:
            bank.seen.add_((on & ~look).long())
        recent.add_(1 if look is None else look.int())
        phase.add_(on.int())
        frames += 1
        if active is None and not bank.ragged:
            more = min(gathered + (begun < self._used), self.short) - gathered
            bound = bank.bound + more
        else:
            more = min(gathered + 1, self.short) - gathered
            bound = min(bank.bound + 1, self._most(frames))
        counts = gathered + more, min(begun + 1, self.fragment), frames
        return dataclasses.replace(bank, bound=bound - 1, counts=counts)

    def _compress(self, bank: Bank, active: Tensor | None) -> Bank:
        return self._close(bank, active, bank.extra["phase"] >= self.fragment)

    def flush(self, bank: Bank, active: Tensor | None = None) -> Bank:
        """End the fragments that have begun."""
        self._check_active(bank, active)
        bank = bank.give_up()
        gathered, begun, frames = bank.counts
        if begun == 0:
            return bank
        if active is not None:
            bank = dataclasses.replace(bank, ragged=True)
        # As if the fragment had been a whole one: the bound counts on it.
        bank = dataclasses.replace(bank, counts=(gathered, begun, -(-frames // self.fragment) * self.fragment))
        with plain(bank.rows.device.type):
            return self._close(bank, active, bank.extra["phase"] > 0)

    def _close(self, bank: Bank, active: Tensor | None, due: Tensor) -> Bank:
        """Merge what was gathered down to M entries, in the videos where it is due."""
        recent, phase, (gathered, begun, frames) = bank.extra["recent"], bank.extra["phase"], bank.counts
        known = active is None and not bank.ragged  # all videos are where the host knows them to be
        due = due if active is None else due & active
        if known or may(due):
            first = (bank.length - recent)[:, None, None].long()
            for left in range(gathered, self.merged, -1):
                merge_once_(bank, mean_product, "plain", None if known else due & (recent >= left), first)
            phase.mul_(~due)
            recent.copy_(recent.clamp_max(self.merged).where(due, recent))
            left = min(gathered, self.merged)
            if known:
                bank = dataclasses.replace(bank, bound=bank.bound - gathered + left)
            bank = self._begin(bank, left, due, known)
        if known:
            return dataclasses.replace(bank, counts=(self._kept(left), 0, frames))
        begun = min(begun, self.fragment - 1) if active is None else begun
        return dataclasses.replace(bank, counts=(gathered, begun, frames))

    def _begin(self, bank: Bank, left: int, due: Tensor, known: bool) -> Bank:
        """Begin a fragment, where it is due, after the last was merged to `left` entries."""
        bank.extra["recent"].mul_(~due)
        return bank

    def _kept(self, left: int) -> int:
        """Entries that a fragment begins with."""
        return 0


@dataclass(frozen=True)
class MovieChatOneVision(MovieChat):
    """The same with one difference: what a fragment of `short - merged` frames was merged to is appended to the long
    list and stays among the recent, to be merged with those that follow and appended again. So frames are counted more
    than once.

    The authors read windows of frames; where their size does not divide short - merged, theirs stores nothing.
    """

    form: str = field(default="onevision", init=False)
    fragment: int = field(default=16, init=False)
    used: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fragment", self.short - self.merged)
        super().__post_init__()

    def _begin(self, bank: Bank, left: int, due: Tensor, known: bool) -> Bank:
        if bank.rows.shape[1] < bank.bound + left:
            bank = grown(bank, 2 * (bank.bound + left))
        begin, recent = bank.length - bank.extra["recent"], bank.extra["recent"]
        for i in range(left):
            on = due & (i < recent)
            copy_(bank, (begin + i)[:, None].long(), on)
            relate_(bank, bank.length[:, None].long() - 2, mean_product, on)
        bound = bank.bound + left
        return dataclasses.replace(bank, bound=bound if known else min(bound, self._most(bank.counts[2])))

    def _kept(self, left: int) -> int:
        return left
