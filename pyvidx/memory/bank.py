"""The memory bank: a value that a policy advances, and everything that needs no policy (read, fork, reorder, save)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pyvidx.ops._library import require, require_tensors

_TENSORS = ("rows", "sizes", "order", "length", "seen", "first", "last", "similarity")
_OPTIONAL = ("first", "last", "similarity")


class Entries(NamedTuple):
    """What attention can look at: L entries of N positions each. rows.flatten(1, 2) are the keys [B, L*N, C]."""

    rows: Tensor  # [B, L, N, C]
    sizes: Tensor  # [B, L, N] int32, frames in each (ToMe in space: tokens of one frame); 0 where mask is False
    mask: Tensor  # [B, L, N] bool, False: nothing is stored there, or a ragged policy dropped this position
    first: Tensor | None  # [B, L, N] float64, seconds of the first frame in each, NaN where mask is False
    last: Tensor | None  # [B, L, N] float64, seconds of the last frame
    attached: tuple[Tensor, ...]  # [B, L, N, Ci] each
    ragged: bool  # False: mask is known to be all True, without asking the device


def log_size_bias(entries: Entries, dtype: torch.dtype = torch.float32) -> Tensor:
    """Proportional attention (ToMe, arXiv:2210.09461, equation 1): what to add to the logits, so that an entry of s
    frames counts like s equal keys.

    Args:
        entries: of Bank.entries or Bank.slots.

    Returns:
        [B, L, N]: log(size), -inf where nothing is stored. `.flatten(1)[:, None, None]` broadcasts over heads and
        queries as the attn_mask of scaled_dot_product_attention.
    """
    return entries.sizes.to(dtype).log()


def packed(entries: Entries) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What a ragged policy keeps, without the gaps, for a language model that takes lists of tokens. Waits for the
    device, which alone knows how many there are.

    Returns:
        For each video rows [K, C], and int64 [K] each: the entry and the position in it that they stand at.
    """
    return [(rows[mask], *mask.nonzero(as_tuple=True)) for rows, mask in zip(entries.rows, entries.mask)]


@dataclass(frozen=True, eq=False)
class Bank:
    """The memory of B videos. Made by Policy.new, advanced by Policy.push; never changed by reading.

    A push reuses the memory of the bank it is given, which is then spent: using it again raises RuntimeError. To go on
    from one state twice, `fork` it first.

    Entries live in S slots and do not move: `order` lists the slots in time order. Decisions are taken separately in G
    groups: G = N positions of W = C numbers, or, where whole frames are kept or merged, G = 1 and W = N*C.
    """

    rows: Tensor  # [B, S, G, W]
    sizes: Tensor  # [B, G, S] int32, frames in each slot, 0 if free
    order: Tensor  # [B, G, S] int32, a permutation: the first `length` slots in time order
    length: Tensor  # [B] int32, entries stored
    seen: Tensor  # [B] int64, frames that were pushed into this part
    positions: int  # N
    first: Tensor | None = None  # [B, G, S] float64, seconds of the first frame in each slot; None: times are not kept
    last: Tensor | None = None
    similarity: Tensor | None = None  # [B, G, S-1] float32, for policies that merge neighbors
    attached: tuple[Tensor, ...] = ()  # [B, S, G, Wi], follow the rows through every merge
    extra: dict[str, Tensor] = field(default_factory=dict)  # [B, ...] each, what a policy keeps beside the entries
    bound: int = 0  # no video holds more entries than this; known without asking the device
    ragged: bool = False  # videos may hold different numbers of entries
    sparse: bool = False  # an entry may lack some of its positions: their size is 0
    counts: tuple[int, ...] = ()  # upper bounds of a policy's own, known without asking the device
    head: Bank | None = None  # anchors: the first frames, kept as they are
    spent: bool = field(default=False, init=False, repr=False)

    def __len__(self) -> int:
        """B"""
        return self.rows.shape[0]

    @property
    def frames(self) -> Tensor:
        """[B] int64, frames pushed so far."""
        return self.seen if self.head is None else self.seen + self.head.seen

    def entries(self) -> Entries:
        """The stored entries in time order, anchors first, as new tensors. L is the host's bound on their number."""
        return self._read(by_slot=False)

    def slots(self) -> Entries:
        """The stored entries in the order of their slots, which is all that attention needs: rows and attached are
        views, valid until the next push. With anchors they are copies."""
        return self._read(by_slot=True)

    def _read(self, by_slot: bool) -> Entries:
        self.check_live()
        B, S, N = len(self), self.rows.shape[1], self.positions
        L = S if by_slot else self.bound
        slot = None if by_slot else self.order[..., :L].long()  # [B, G, L]

        def rows_of(x: Tensor) -> Tensor:  # [B, S, G, W] -> [B, L, N, C]
            if slot is not None:
                batch = torch.arange(B, device=x.device)[:, None, None]
                x = x[batch, slot.transpose(1, 2), torch.arange(x.shape[2], device=x.device)]
            return x.reshape(B, L, N, x.shape[2] * x.shape[3] // N)

        def per_entry(x: Tensor) -> Tensor:  # [B, G, S] -> [B, L, N]
            return (x if slot is None else x.gather(2, slot)).transpose(1, 2).expand(B, L, N)

        sizes = per_entry(self.sizes)
        ragged = self.ragged or self.sparse or (by_slot and self.bound < S)
        mask = sizes > 0  # that of a free slot is 0
        times = [None if t is None else per_entry(t).where(mask, torch.nan) for t in (self.first, self.last)]
        rows, *attached = (rows_of(x) for x in (self.rows, *self.attached))
        if ragged and not by_slot:  # what a freed slot still holds is not for the reader
            rows, *attached = (x.where(mask[..., None], 0) for x in (rows, *attached))
        mine = Entries(rows, sizes, mask, *times, tuple(attached), ragged)
        if self.head is None:
            return mine
        both = [self.head._read(by_slot), mine]
        return Entries(
            *(None if p[0] is None else torch.cat(p, dim=1) for p in zip(*(e[:5] for e in both))),
            tuple(torch.cat(p, dim=1) for p in zip(*(e.attached for e in both))),
            any(e.ragged for e in both),
        )

    def fork(self) -> Bank:
        """A copy that goes its own way."""
        self.check_live()
        return self._map(torch.clone)

    def select(self, index: Tensor | Sequence[int]) -> Bank:
        """Videos by number, e.g. to reorder or repeat them in a beam search, as new tensors.

        Args:
            index: int64 [B'], each in [0, B), in any order, repeats allowed.

        Raises:
            ValueError: the index is not that; on a GPU one out of range stops the kernel.
        """
        self.check_live()
        index = torch.as_tensor(index)
        require(
            index.dim() == 1 and index.dtype == torch.int64,
            "Bank.select: index must be int64 [B'], one number each",
            index,
        )
        if index.is_cpu and index.numel() and not torch.compiler.is_compiling():
            low, high = (int(n) for n in torch.aminmax(index))
            fits = low >= 0 and high < len(self)
            require(fits, f"Bank.select: index must be in [0, {len(self)}), got {low} to {high}")
        index = index.to(self.rows.device)
        return self._map(lambda x: x.index_select(0, index))

    def reset(self, videos: Tensor | None = None) -> Bank:
        """Empty the banks of some videos; this bank is spent.

        Args:
            videos: bool [B], the ones to empty; the others stay as they are. None: all.
        """
        require_tensors("Bank.reset", videos=videos)
        fits = videos is None or (videos.dtype == torch.bool and videos.shape == (len(self),))
        require(fits, "Bank.reset: videos must be bool [B]", videos)
        return self.give_up()._reset(videos)

    def _reset(self, videos: Tensor | None) -> Bank:
        for name, x in self.tensors().items():
            empty = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device) if name == "order" else x.new_zeros(())
            x.copy_(empty if videos is None else empty.where(videos.view(-1, *[1] * (x.dim() - 1)), x))
        head = None if self.head is None else self.head._reset(videos)
        if videos is None:
            return dataclasses.replace(self, bound=0, ragged=False, counts=(0,) * len(self.counts), head=head)
        return dataclasses.replace(self, ragged=True, head=head)

    def state_dict(self) -> dict[str, Tensor]:
        """All of it as named new tensors, for safetensors or torch.save. Loading it gives the same bits."""
        self.check_live()
        state = {name: x.clone() for name, x in self.tensors().items()}
        state["host"] = torch.tensor([self.positions, self.bound, self.ragged, self.sparse, *self.counts])
        if self.head is not None:
            state |= {f"head.{name}": x for name, x in self.head.state_dict().items()}
        return state

    @staticmethod
    def load_state_dict(state: dict[str, Tensor], device: torch.device | str | None = None) -> Bank:
        """The bank that state_dict was called on. Policy.check says whether a policy can go on with it.

        Args:
            state: of state_dict; its tensors are copied.
            device: where the bank goes; None: where the tensors are.

        Raises:
            ValueError: a tensor is missing or unknown.
        """
        head = {n.removeprefix("head."): x for n, x in state.items() if n.startswith("head.")}
        own = {n: x for n, x in state.items() if not n.startswith("head.")}
        extras = sorted((n for n in own if n.startswith("attached.")), key=lambda n: int(n.split(".")[1]))
        mine = [n for n in own if n.startswith("extra.")]
        missing = {*_TENSORS, "host"} - {*_OPTIONAL} - own.keys()
        unknown = own.keys() - {*_TENSORS, "host", *extras, *mine}
        require(
            not missing and not unknown, f"Bank.load_state_dict: lacks {sorted(missing)}, unknown {sorted(unknown)}"
        )
        positions, bound, ragged, sparse, *counts = own["host"].tolist()
        copy = {name: own[name].to(device or own[name].device, copy=True) for name in own if name != "host"}
        return Bank(
            **{name: copy[name] for name in _TENSORS if name in copy},
            attached=tuple(copy[name] for name in extras),
            extra={name.removeprefix("extra."): copy[name] for name in mine},
            positions=positions,
            bound=bound,
            ragged=bool(ragged),
            sparse=bool(sparse),
            counts=tuple(counts),
            head=Bank.load_state_dict(head, device) if head else None,
        )

    def give_up(self) -> Bank:
        """The same memory under a new name; this one is spent. For policies."""
        self.check_live()
        object.__setattr__(self, "spent", True)
        return dataclasses.replace(self)

    def check_live(self) -> None:
        """RuntimeError where this bank is spent."""
        if self.spent:
            raise RuntimeError(
                "Bank: this state was given to a later push or reset, which reused its memory; go on with what that "
                "returned, or fork the state before"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Those of this part by name, without the head's."""
        named = {name: getattr(self, name) for name in _TENSORS}
        named |= {f"attached.{i}": x for i, x in enumerate(self.attached)}
        named |= {f"extra.{name}": x for name, x in self.extra.items()}
        return {name: x for name, x in named.items() if x is not None}

    def _map(self, f: Callable[[Tensor], Tensor]) -> Bank:
        changed = {name: f(getattr(self, name)) for name in _TENSORS if getattr(self, name) is not None}
        changed |= {"attached": tuple(map(f, self.attached)), "extra": {name: f(x) for name, x in self.extra.items()}}
        return dataclasses.replace(self, **changed, head=None if self.head is None else self.head._map(f))
