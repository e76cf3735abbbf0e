"""What a policy, or a function of a whole clip, keeps of videos whose steps come in chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyvidx import memory
from pyvidx.hosts.language.host import Host, Place, Slots
from pyvidx.memory import Bank, Policy
from pyvidx.ops._library import require
from pyvidx.sizes import check_counts

Encode = Callable[[Place, int, int], list[Tensor]]  # steps start to stop of a video: [stop - start, P, C] of each level
# Functions of a clip and their options, first the one that must be given.
CLIPS = {"keyframes": ("capacity", "unit"), "evs": ("q",), "vidcom2": ("q", "form")}


@dataclass(frozen=True)
class Stream:
    """A policy of pyvidx.memory, whose bank holds what is kept, whatever the number of steps."""

    policy: Policy

    def check(self, host: Host, places: Sequence[Place]) -> None:
        """ValueError where the host cannot take what the policy leaves."""
        for place in places:
            policy = self.policy_of(place)
            left = policy.new(1, place.positions, host.width, device="meta").positions
            _check_grid(host, policy.name, policy.layout == "ragged" or left != place.positions)
            kind = host.config.model_type
            text = f"compress: tokens of {kind} have places in a step, and those of {policy.name} none"
            require(left == place.positions or not host.in_place, text)

    def of(self, places: Sequence[Place], seconds: Sequence[Tensor], encode: Encode, chunk: int) -> list[Slots]:
        """The slots of each video. Videos of equal frames share a bank; where the lengths differ, those that are over
        leave it. seconds: float64 [T] each."""
        found = {}
        for alike in _alike(places):
            for place, slots in self._together(alike, [seconds[p.number] for p in alike], encode, chunk):
                found[place.number] = slots
        return [found[place.number] for place in places]

    def _together(
        self, places: Sequence[Place], seconds: Sequence[Tensor], encode: Encode, chunk: int
    ) -> Iterator[tuple[Place, Slots]]:
        by_length = sorted(range(len(places)), key=lambda i: places[i].steps)
        places, seconds = [places[i] for i in by_length], [seconds[i] for i in by_length]
        policy, bank, begin = self.policy_of(places[0]), None, 0
        for length in sorted({place.steps for place in places}):
            for start in range(begin, length, chunk):
                stop = min(start + chunk, length)
                levels = [torch.stack(x) for x in zip(*(encode(place, start, stop) for place in places))]
                dtype = levels[0].dtype
                bank = self.start(policy, levels, len(places)) if bank is None else bank
                when = torch.stack([x[start:stop] for x in seconds]).to(levels[0].device, non_blocking=True)
                bank = policy.extend(bank, levels[0], when, attached=levels[1:])
            over = [place for place in places if place.steps == length]
            number = torch.arange(len(places), device=bank.rows.device)
            done = bank if len(over) == len(places) else bank.select(number[: len(over)])
            yield from zip(over, slots_of(done, dtype))
            places, seconds, begin = places[len(over) :], seconds[len(over) :], length
            if places:
                bank = bank.select(number[len(over) :])

    @staticmethod
    def start(policy: Policy, levels: Sequence[Tensor], B: int) -> Bank:
        """An empty bank for B videos of these levels [..., P, C]. It is float32, whatever they are (see Policy.new)."""
        first, *others = levels
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        return policy.new(B, *first.shape[-2:], dtype, first.device, attached=[x.shape[-1] for x in others])

    def policy_of(self, place: Place) -> Policy:
        """The policy for frames of this grid."""
        if getattr(self.policy, "grid", 0) is None and place.grid is not None:
            return dataclasses.replace(self.policy, grid=place.grid)
        return self.policy


def slots_of(bank: Bank, dtype: torch.dtype) -> list[Slots]:
    """What a bank holds of each of its videos, in the dtype of the encoder. Banks of ragged policies, and those whose
    videos were pushed different numbers of frames, are waited for: their device alone knows how many there are."""
    e = bank.entries()
    levels = [x.to(dtype) for x in (e.rows, *e.attached)]
    if not e.ragged:
        return [Slots([x[b] for x in levels], *_times(e.first[b], e.last[b])) for b in range(len(bank))]
    found = []
    for b, mask in enumerate(e.mask):
        if not bank.sparse:
            n = int(mask[:, 0].sum())
            found.append(Slots([x[b, :n] for x in levels], *_times(e.first[b, :n], e.last[b, :n])))
            continue
        entry, position = mask.nonzero(as_tuple=True)
        first, last = e.first[b][mask], e.last[b][mask]
        found.append(Slots([x[b][mask] for x in levels], (first + last) / 2, first, last, entry, position))
    return found


def _times(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Middle, first and last second of slots whose positions have those of [M, P]."""
    return (first + last).mean(1) / 2, first.amin(1), last.amax(1)


@dataclass(frozen=True)
class Clip:
    """A function of a whole clip, whose rows are all held until its end.

    Args:
        name: of CLIPS.
        options: of that function beside the frames; the count of keyframes is `capacity`.
    """

    name: str
    options: dict[str, Any]

    def __post_init__(self) -> None:
        takes = CLIPS[self.name]
        wrong = [option for option in self.options if option not in takes]
        require(not wrong, f"compress: {self.name} takes {', '.join(takes)}, got {', '.join(wrong)}")
        require(takes[0] in self.options, f"compress: {self.name} must be given {takes[0]}")
        if self.name == "keyframes":
            check_counts("compress", capacity=self.options["capacity"])
        else:
            q = self.options["q"]
            require(isinstance(q, int | float), f"compress: q must be a number, got {type(q).__name__}")
        self._call(torch.zeros(1, 1, 1, 2))  # it refuses what does not fit

    def check(self, host: Host, places: Sequence[Place]) -> None:
        """ValueError where the host cannot take what the function leaves."""
        _check_grid(host, self.name, self.name != "keyframes")

    def of(self, places: Sequence[Place], seconds: Sequence[Tensor], encode: Encode, chunk: int) -> list[Slots]:
        """See Stream.of."""
        found = []
        for place in places:
            starts = range(0, place.steps, chunk)
            parts = [encode(place, start, min(start + chunk, place.steps)) for start in starts]
            levels = [torch.cat(x) for x in zip(*parts)]
            when = seconds[place.number].to(levels[0].device, non_blocking=True)
            found.append((self._keyframes if self.name == "keyframes" else self._pruned)(levels, when))
        return found

    def _call(self, frames: Tensor) -> Any:
        if self.name == "keyframes":
            return memory.keyframes(frames, self.options["capacity"], self.options["unit"])
        return getattr(memory, self.name)(frames, **self.options)

    def _keyframes(self, levels: list[Tensor], when: Tensor) -> Slots:
        index = self._call(levels[0][None]).index[0]  # [M, P]
        rows = [x.gather(0, index[..., None].expand(-1, -1, x.shape[-1])) for x in levels]
        return Slots(rows, *_times(when[index], when[index]))

    def _pruned(self, levels: list[Tensor], when: Tensor) -> Slots:
        mask = self._call(levels[0][None])[0]
        if self.options.get("form", "vllm") == "vllm":  # then their number is known, and no device is waited for
            K = memory.compute_retained_tokens_count(mask.shape[1], mask.shape[0], self.options["q"], self.name)
            place = (~mask).flatten().byte().argsort(stable=True)[:K]
            entry, position = place // mask.shape[1], place % mask.shape[1]
        else:
            entry, position = mask.nonzero(as_tuple=True)
        times = when[entry]
        return Slots([x[entry, position] for x in levels], times, times, times, entry, position)


def method(policy: str | Policy, capacity: int | None, options: dict[str, Any]) -> Stream | Clip:
    """What a policy's name and options, or a policy, mean to compress.

    Raises:
        ValueError: the name is unknown, or an option does not fit.
    """
    if isinstance(policy, Policy):
        given = options | ({} if capacity is None else {"capacity": capacity})
        require(not given, f"compress: a policy has its options already, got {', '.join(given)} beside one")
        return Stream(policy)
    known = [*memory.names(), *CLIPS]
    require(isinstance(policy, str), f"compress: policy must be a name or a Policy, got {type(policy).__name__}")
    require(policy in known, f"compress: policy must be one of {', '.join(known)}, got {policy!r}")
    if capacity is not None:
        options = options | {"capacity": capacity}
    # Whole frames, so that a slot has one time; and clusters that fit their room.
    if policy == "keyframes":
        options = {"unit": "synchronized"} | options
    elif policy == "merge":
        options = {"unit": "frame"} | options
    elif policy == "flash_vstream" and isinstance(capacity, int) and isinstance(options.get("anchors", 0), int):
        room = capacity - options.get("anchors", 0)
        options = {"clusters": max(1, min(memory.FlashVStream.clusters, room))} | options
    if policy in CLIPS:
        return Clip(policy, options)
    return Stream(memory.create(policy, **options))


def _alike(places: Sequence[Place]) -> list[list[Place]]:
    """Videos whose frames have the same grid."""
    groups = {}
    for place in places:
        groups.setdefault((place.positions, place.grid), []).append(place)
    return list(groups.values())


def _check_grid(host: Host, name: str, ragged: bool) -> None:
    model = host.config.model_type
    text = f"compress: {model} takes whole slots of a step's positions, and {name} keeps some tokens of them"
    require(host.ragged or not ragged, f"{text}; take merge, keyframes or another policy that does not")
