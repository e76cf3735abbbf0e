"""StreamForest (arXiv:2509.24871): the newest frame, a window of frames with fewer tokens, and events that merge."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyvidx.memory.bank import Bank
from pyvidx.memory.clips import check_clip
from pyvidx.memory.policy import Policy, check_compat, plain
from pyvidx.memory.ragged_tome import best_matches, shorten
from pyvidx.memory.registry import register
from pyvidx.memory.slots import known, may, wide
from pyvidx.ops._library import require
from pyvidx.ops.memory_merge import cosine


@register("streamforest")
@dataclass(frozen=True)
class StreamForest(Policy):
    """Three levels of tokens, ragged: an entry is one token, so entries() is [B, L, 1, C], oldest first.

    The newest frame is merged to `now` tokens; the one before moves to the window, merged to `short` tokens. When the
    window holds `window + split` frames, its oldest become an event, up to the least cosine between two of the first
    `split` frames and those that follow them: k frames, merged to k * tokens. While the events hold more than `quota`
    tokens, the two neighbors of the least penalty become one with half their frames, rounded up:

        penalty = weights[0] (1 - likeness) + weights[1] mean time / (frames - 1) + weights[2] mean merges / most merges

    All merging is ToMe's (see ragged_tome); the likeness of two events is what its first round would merge, on average.

    Args:
        now, short, tokens: tokens of the newest frame, of one of the window, and of one of an event.
        window, split, quota, weights: as above.
        heads: likeness of tokens is that of the mean over the heads.
        compat: "paper": tokens keep the number of tokens they hold, as weights, and events the number of frames, by
            which the time of a joined one is weighted. "official": the program forgets both, so that two events of one
            frame become one of one frame.

    `bank.extra` has the events: `frames` (as their tokens count), `time`, `merges`, `likeness` to the event before.
    """

    name = "streamforest"
    layout = "ragged"
    endless = True
    capacity: None = field(default=None, init=False)
    now: int = 729
    short: int = 128
    tokens: int = 64
    window: int = 18
    split: int = 8
    quota: int = 5120
    heads: int = 16
    weights: tuple[float, float, float] = (0.4, 0.2, 0.4)
    compat: str = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "weights", tuple(self.weights))
        require(self.anchors == 0, f"streamforest: it keeps no anchors, got {self.anchors}")
        fits = 1 <= self.tokens <= self.short <= self.now and min(self.window, self.split, self.quota, self.heads) >= 1
        require(fits, f"streamforest: 1 <= tokens <= short <= now, and the others at least 1, got {self.spec()}")
        fits = len(self.weights) == 3 and all(isinstance(x, (int, float)) and math.isfinite(x) for x in self.weights)
        require(fits, f"streamforest: weights must be three numbers, got {self.weights}")
        check_compat(self.name, self.compat)

    def new(self, B: int, N: int, C: int, *args: Any, attached: Sequence[int] = (), **options: Any) -> Bank:
        require(N >= self.now, f"streamforest: frames must have at least now = {self.now} tokens, got {N}")
        require(C % self.heads == 0, f"streamforest: heads must divide C = {C}, got {self.heads}")
        require(
            not attached, f"streamforest: it merges tokens of many frames; attached must be [], got {list(attached)}"
        )
        bank = super().new(B, 1, C, *args, **options)
        room = self._room

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(B, *shape, dtype=dtype, device=bank.rows.device)

        extra = {
            "last": bank.rows.new_zeros(B, N, C),  # the newest frame as it came
            "waiting": zeros(),  # frames in the window
            "cosines": zeros(self.window + self.split, dtype=torch.float32),  # of each of them and the next
            "frames": zeros(room),  # that an event counts as, 0: no event
            "held": zeros(room),  # that it was made of
            "time": zeros(room, dtype=torch.float64),
            "merges": zeros(room),
            "likeness": zeros(room, dtype=torch.float32),  # to the event before
        }
        return dataclasses.replace(bank, extra=extra, counts=(0,))

    new.__doc__ = Policy.new.__doc__

    def clip(self, frames: Tensor, seconds: Tensor | None = None, lengths: Tensor | None = None) -> Bank:
        """A whole clip, whose events merge once, at its end, as the authors' projector does; a stream merges them after
        every frame, and keeps other ones. The bank is for reading only.

        Args:
            frames: [B, T, N, C] floating.
            seconds: [B, T]. None: the numbers of the frames.
            lengths: int [B] in [0, T], the frames of each video, the first ones. None: T.

        Raises:
            ValueError: a shape, dtype or length does not fit, or a gradient is asked for.
        """
        active = check_clip("streamforest.clip", frames, lengths)
        B, T, N, C = frames.shape
        roomy = dataclasses.replace(self, quota=max(T * self.tokens, self.quota))
        bank = roomy.new(B, N, C, frames.dtype, frames.device)
        bank = roomy.extend(bank, frames, seconds, None if lengths is None else active)
        with plain(frames.device.type):
            self._merge_(bank, torch.ones_like(bank.seen, dtype=torch.bool))
        return bank

    @property
    def _room(self) -> int:
        """Frames of events that fit: those of the quota, and an event that is new."""
        return max(self.quota // self.tokens, self.split) + self.split

    def _first_slots(self) -> int:
        return self._room * self.tokens + (self.window + self.split) * self.short + self.now

    def _fits(self, mine: Tensor, given: Tensor) -> bool:
        return mine.shape == given.shape  # it has no capacity, and does not grow

    def _stored_positions(self, N: int) -> int:
        return 1

    def _given_positions(self, bank: Bank) -> int:
        return bank.extra["last"].shape[1] if "last" in bank.extra else self.now

    def check_extra(self, bank: Bank) -> None:
        e, room = bank.extra, bank.extra["frames"].shape[1]
        fits = bool((e["waiting"] >= 0).all()) and bool((e["waiting"] <= self.window + self.split).all())
        fits = fits and bool((e["frames"] >= 0).all()) and bool((e["frames"].sum(1) <= room).all())
        require(fits, "streamforest: the window and the events must fit their room", e["waiting"], e["frames"])
        floats = all(bool(e[name].isfinite().all()) for name in ("last", "cosines", "time", "likeness"))
        require(floats and bank.counts[0] >= 0, "streamforest: cosines, times and likenesses must be finite")

    def _check_frame(self, bank: Bank, frame: Tensor, *options: Any) -> None:
        super()._check_frame(bank, frame, *options)
        N = self._given_positions(bank)
        require(frame.shape[1] == N, f"{self.name}.append: frame must be [B, N, C] with N = {N}", frame)

    def _append(
        self,
        bank: Bank,
        frame: Tensor,
        attached: Sequence[Tensor],
        when: Tensor | None,
        active: Tensor | None,
        size: Tensor | int,
    ) -> Bank:
        on = torch.ones_like(bank.seen, dtype=torch.bool) if active is None else active
        B, S, e = len(bank), bank.rows.shape[1], bank.extra
        past = on & (bank.seen > 0)
        number = torch.arange(self.window + self.split, device=frame.device)
        # The frame before goes to the end of the window,
        _, window, newest = self._levels(bank)
        short = self._tome(newest, self.now, self.short)
        here = past[:, None] & (number == e["waiting"][:, None])  # [B, window + split]
        window.put_(short.repeat(len(number)), here.repeat_interleave(self.short, dim=1, output_size=window.width))
        alike = cosine(wide(frame).flatten(1), wide(e["last"]).flatten(1)).to(torch.float32)
        e["cosines"].copy_(alike[:, None].where(here, e["cosines"]))
        e["waiting"].add_(past.long())
        # and the frame takes its place.
        ones = torch.ones(B, frame.shape[1], dtype=torch.int32, device=frame.device)
        times = when[:, None].expand(B, frame.shape[1])
        now = self._tome(_Tokens(frame, ones, times, times), frame.shape[1], self.now)
        newest.put_(now, on[:, None].expand(B, self.now))
        e["last"].copy_(frame.to(e["last"].dtype).where(on[:, None, None], e["last"]))
        bank.seen.add_(on.long())
        bank.length.copy_(torch.where(on, S, bank.length))
        frames = bank.counts[0] + 1
        if frames > self.window + self.split:
            self._divide_(bank, on & (e["waiting"] >= self.window + self.split))
            self._merge_(bank, on)
        return dataclasses.replace(bank, bound=S, ragged=bank.ragged or active is not None, counts=(frames,))

    def _divide_(self, bank: Bank, on: Tensor) -> None:
        """The oldest frames of the window become an event."""
        if not may(on):
            return
        events, window, _ = self._levels(bank)
        e, q = bank.extra, self.tokens
        k = e["cosines"][:, : self.split].argmin(1) + 1
        most = known(k, self.split)
        new = self._tome(window.part(0, most * self.short), k * self.short, k * q, most * q, self.short / q)
        begin = q * e["frames"].sum(1)
        place = torch.arange(events.width, device=k.device) - begin[:, None]
        events.put_(new.at(place), on[:, None] & (place >= 0) & (place < q * k[:, None]))
        last = (e["frames"] > 0).sum(1, keepdim=True)  # the number of the new event
        time = bank.seen - 1 - e["waiting"] + (k - 1) / 2
        for name, value in (("frames", k), ("held", k), ("time", time), ("merges", torch.ones_like(k))):
            _set(e[name], last, value[:, None], on)
        self._compare_(bank, last - 1, on)
        place = torch.arange(window.width, device=k.device) + k[:, None] * self.short
        window.put_(window.at(place), on[:, None].expand_as(place))
        place = torch.arange(e["cosines"].shape[1], device=k.device) + k[:, None]
        e["cosines"].copy_(_at(e["cosines"], place).where(on[:, None], e["cosines"]))
        e["waiting"].sub_(k * on)

    def _merge_(self, bank: Bank, on: Tensor) -> None:
        """Neighboring events become one until all fit the quota."""
        events, e, q = self._levels(bank)[0], bank.extra, self.tokens
        room = e["frames"].shape[1]
        for _ in range(room - self.quota // q):
            frames = e["frames"]
            need = on & (q * frames.sum(1) > self.quota) & ((frames > 0).sum(1) > 1)
            if not may(need):
                break
            i = self._least(bank)
            j = i + 1
            (a, b), (held_a, held_b) = ([e[name].gather(1, n) for n in (i, j)] for name in ("frames", "held"))
            begin = q * (frames.cumsum(1).gather(1, i) - a)  # [B, 1]
            count, left = q * (a + b), q * ((a + b + 1) // 2)
            both = events.at(begin + torch.arange(known(count, events.width), device=i.device))
            joined = self._tome(both, count[:, 0], left[:, 0], known(left, events.width), 2)
            place = torch.arange(events.width, device=i.device)
            inside = (place >= begin) & (place < begin + left)
            after = events.at(torch.where(place < begin, place, place + count - left))
            events.put_(after, need[:, None].expand(len(need), events.width))
            events.put_(joined.at(place - begin), need[:, None] & inside)
            s, t = (a, b) if self.compat == "official" else (held_a, held_b)
            time = (e["time"].gather(1, i) * s + e["time"].gather(1, j) * t) / (s + t).clamp_min(1)
            merges = e["merges"].gather(1, i) + e["merges"].gather(1, j)
            number = torch.arange(room, device=i.device)
            for name in ("frames", "held", "time", "merges", "likeness"):
                e[name].copy_(_at(e[name], number + (number > i)).where(need[:, None], e[name]))
            for name, value in (
                ("frames", (a + b + 1) // 2),
                ("held", held_a + held_b),
                ("time", time),
                ("merges", merges),
            ):
                _set(e[name], i, value, need)
            self._compare_(bank, i - 1, need)
            self._compare_(bank, i, need)

    def _least(self, bank: Bank) -> Tensor:
        """[B, 1], the first event of the two neighbors with the least penalty."""
        e = bank.extra
        pair = e["frames"][:, 1:] > 0
        merges = ((e["merges"][:, :-1] + e["merges"][:, 1:]) / 2).where(pair, 0)
        time = (e["time"][:, :-1] + e["time"][:, 1:]) / 2 / (bank.seen[:, None] - 1).clamp_min(1)
        alike, late, often = self.weights
        penalty = alike * (1 - e["likeness"][:, 1:]) + late * time
        penalty = penalty + often * (merges / merges.amax(1, keepdim=True).clamp_min(1) + 1e-6)
        return penalty.where(pair, torch.inf).argmin(1, keepdim=True)

    def _compare_(self, bank: Bank, i: Tensor, on: Tensor) -> None:
        """How like event i [B, 1] and the next are, where there are such."""
        events, e, q = self._levels(bank)[0], bank.extra, self.tokens
        room = e["frames"].shape[1]
        first = i.clamp(0, room - 2)
        a, b = (e["frames"].gather(1, n) for n in (first, first + 1))
        on = on & ((i >= 0) & (a > 0) & (b > 0))[:, 0]
        if not may(on):
            return
        count = q * (a + b)
        begin = q * (e["frames"].cumsum(1).gather(1, first) - a)
        tokens = events.at(begin + torch.arange(known(count, events.width), device=i.device))
        best = best_matches(tokens.rows, count[:, 0], self.heads)[0].sort(dim=1, descending=True).values
        r = q * ((a + b) // 2)
        chosen = torch.arange(best.shape[1], device=i.device) < r
        mean = best.where(chosen, 0).sum(1, keepdim=True) / r.clamp_min(1)
        _set(e["likeness"], first + 1, mean, on)

    def _levels(self, bank: Bank) -> tuple[_Tokens, _Tokens, _Tokens]:
        """The tokens of the events, of the window and of the newest frame: views."""
        whole = (bank.rows[:, :, 0], bank.sizes[:, 0], *(t if t is None else t[:, 0] for t in (bank.first, bank.last)))
        S = bank.rows.shape[1]
        ends = (0, S - self.now - (self.window + self.split) * self.short, S - self.now, S)
        return tuple(_Tokens(*whole).part(*pair) for pair in zip(ends, ends[1:]))

    def _tome(
        self,
        tokens: _Tokens,
        count: Tensor | int,
        target: Tensor | int,
        width: int | None = None,
        ratio: float | None = None,
    ) -> _Tokens:
        """Merged; what is left reaches over the times of all. count, target: one for all videos, or int64 [B]."""
        width, ratio = width or target, ratio or count / target
        B, device = len(tokens.rows), tokens.rows.device
        if not isinstance(count, Tensor):
            count, target = (torch.full((B,), n, device=device) for n in (count, target))
        sizes = tokens.sizes if self.compat == "paper" else (tokens.sizes > 0).int()
        rows, sizes = shorten(tokens.rows, sizes, count, target, self.heads, width, ratio)
        if self.compat == "official":
            sizes = (sizes > 0).int()
        there = torch.arange(tokens.width, device=device) < count[:, None]
        times = []
        for x, reduce, nothing in ((tokens.first, torch.amin, torch.inf), (tokens.last, torch.amax, -torch.inf)):
            x = None if x is None else reduce(x.where(there, nothing), 1, keepdim=True).expand(B, width)
            times.append(x)
        return _Tokens(rows, sizes, *times)


class _Tokens(NamedTuple):
    """A list of n tokens of each video."""

    rows: Tensor  # [B, n, C]
    sizes: Tensor  # int32 [B, n], 0 where there is none
    first: Tensor | None  # float64 [B, n]
    last: Tensor | None

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    def part(self, begin: int, end: int) -> _Tokens:
        return _Tokens(*(None if x is None else x[:, begin:end] for x in self))

    def repeat(self, times: int) -> _Tokens:
        """The list so many times."""
        return _Tokens(self.rows.repeat(1, times, 1), *(None if x is None else x.repeat(1, times) for x in self[1:]))

    def at(self, place: Tensor) -> _Tokens:
        """Those at [B, m], nothing where there is no such place; new tensors."""
        return _Tokens(*(None if x is None else _at(x, place) for x in self))

    def put_(self, new: _Tokens, where: Tensor) -> None:
        """Replace the tokens where [B, n] holds by those at the same places of a list of the same length."""
        for x, y in zip(self, new):
            if x is not None:
                x.copy_(y.to(x.dtype).where(where.view(*where.shape, *[1] * (x.dim() - 2)), x))


def _at(x: Tensor, place: Tensor) -> Tensor:
    """x [B, n] or [B, n, C] at [B, m], 0 outside."""
    inside = (place >= 0) & (place < x.shape[1])
    index = place.expand(len(x), place.shape[-1]).clamp(0, x.shape[1] - 1)
    inside = inside.expand_as(index)
    if x.dim() == 3:
        index, inside = index[..., None].expand(-1, -1, x.shape[2]), inside[..., None]
    return x.gather(1, index).where(inside, 0)


def _set(x: Tensor, i: Tensor, value: Tensor, on: Tensor) -> None:
    """x [B, n] at [B, 1] = value [B, 1], where [B] holds."""
    x.scatter_(1, i, value.to(x.dtype).where(on[:, None], x.gather(1, i)))
