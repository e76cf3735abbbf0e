"""What every policy has in common: argument checks, anchors, and the three verbs append, compress, push."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyvidx.memory.bank import Bank
from pyvidx.memory.layout import grown, new_bank
from pyvidx.memory.slots import put_
from pyvidx.ops._library import FLOATING, require, require_tensors

_FIRST_SLOTS = 16  # of a bank that grows


@dataclass(frozen=True)
class Policy:
    """What a bank keeps of an endless stream of frames. Holds options only: one policy serves any number of banks.

    `append` shows a frame to the bank, `compress` brings the bank back to its capacity, `push` is both. MA-LMM's order
    of one step, in which attention sees the stored entries and the current frame (up to capacity + 1 entries):

        bank = policy.append(bank, frame); attend(bank.slots()); bank = policy.compress(bank)

    The last `compress` may be left out: the next append starts with it where it is due, with the same result. All three
    change the bank in place and return it under a new name; the one they were given is spent (see Bank).
    """

    capacity: int | None = None  # entries kept after a push, anchors included; None: no limit
    anchors: int = 0  # the first frames of a video that are kept as they are, for good

    name: ClassVar[str]
    whole_frame: ClassVar[bool] = True  # decisions are taken for whole frames; False: at each position
    similarity: ClassVar[bool] = False  # the bank caches cosines between neighbors
    endless: ClassVar[bool] = False  # works without a capacity
    chosen: ClassVar[tuple[str, ...]] = ()  # options of `create` that choose the class, and are none of the class
    layout: ClassVar[str] = "grid"  # of what is read: every entry has all positions; "ragged": some, as the mask says

    def __post_init__(self) -> None:
        require(self.anchors >= 0, f"{self.name}: anchors must be at least 0, got {self.anchors}")
        require(
            self.endless if self.capacity is None else self.capacity > self.anchors,
            f"{self.name}: capacity must leave room for one entry beside {self.anchors} anchors, got {self.capacity}",
        )

    @property
    def room(self) -> int | None:
        """Entries kept beside the anchors."""
        return None if self.capacity is None else self.capacity - self.anchors

    def spec(self) -> dict[str, Any]:
        """Name and options, as `create(**spec)` takes them."""
        options = (f.name for f in dataclasses.fields(self) if f.init or f.name in self.chosen)
        return {"name": self.name, **{name: getattr(self, name) for name in options}}

    def new(
        self,
        B: int,
        N: int,
        C: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        attached: Sequence[int] = (),
        attached_dtype: torch.dtype | None = None,
        times: bool = True,
    ) -> Bank:
        """An empty bank for B videos whose frames are N rows of width C.

        Args:
            dtype: of the rows. Keep it float32: similarities of 16-bit rows choose other pairs, and means of many
                frames stand still once a frame's share is below the rounding.
            attached: widths Ci of further rows that are stored and merged beside the frame's, e.g. cached keys and
                values (affine maps of the rows, which merging keeps exact). attached_dtype: default dtype.
            times: keep the first and last source time of each entry.

        Raises:
            ValueError: a size is below 1, or a dtype is not floating.
        """
        require(
            min(B, N, C, *attached, 1) >= 1, f"{self.name}.new: sizes must be at least 1, got {(B, N, C, *attached)}"
        )
        attached_dtype = attached_dtype or dtype
        require(
            dtype in FLOATING and attached_dtype in FLOATING,
            f"{self.name}.new: dtype must be float32, float16, bfloat16 or float64, got {dtype}, {attached_dtype}",
        )
        common = dict(dtype=dtype, device=device, attached=attached, attached_dtype=attached_dtype, times=times)
        N = self._stored_positions(N)
        common |= dict(whole_frame=self.whole_frame, sparse=self.layout == "ragged")
        bank = self._extended(new_bank(B, self._first_slots(), N, C, similarity=self.similarity, **common))
        if not self.anchors:
            return bank
        return dataclasses.replace(bank, head=new_bank(B, self.anchors, N, C, **common))

    def append(
        self,
        bank: Bank,
        frame: Tensor,
        seconds: Tensor | None = None,
        active: Tensor | None = None,
        attached: Sequence[Tensor] = (),
    ) -> Bank:
        """Make room where the bank is over its capacity, then add a frame as the last entry.

        Args:
            bank: of `new`; spent by this call.
            frame: [B, N, C] floating, any strides; stored in the bank's dtype. Numbers that are not finite spread to
                what they merge with, and are not saved.
            seconds: [B], the frame's time in its video. None: the number of the frame.
            active: bool [B], videos that have this frame; the others stay as they are, bit for bit. None: all.
            attached: [B, N, Ci] for each of the bank's attached.

        Returns:
            The bank, with at most capacity + 1 entries.

        Raises:
            ValueError: a shape, dtype or device does not fit, or a gradient is asked for (detach what is stored).
            RuntimeError: the bank was spent by an earlier call.
        """
        self._check_frame(bank, frame, seconds, active, attached)
        bank = bank.give_up()
        with plain(bank.rows.device.type):
            when = (bank.frames if seconds is None else seconds).to(torch.float64)
            frame, attached, size = self._reduce(frame, attached)
            return self._append(bank, frame, attached, when, active, size)

    def compress(self, bank: Bank, active: Tensor | None = None) -> Bank:
        """Bring the bank back to its capacity. It was at most one entry over it; where it was not, nothing changes."""
        self._check_active(bank, active)
        bank = bank.give_up()
        if not self._due(bank):
            return bank
        with plain(bank.rows.device.type):
            return self._compress(bank, active)

    def push(
        self,
        bank: Bank,
        frame: Tensor,
        seconds: Tensor | None = None,
        active: Tensor | None = None,
        attached: Sequence[Tensor] = (),
    ) -> Bank:
        """`append`, then `compress` (of the active videos): the bank holds at most `capacity` entries."""
        was = bank.bound
        bank = self.compress(self.append(bank, frame, seconds, active, attached), active)
        if self.room is not None and was <= self.room:  # then no video is over it, active or not
            bank = dataclasses.replace(bank, bound=min(bank.bound, self.room))
        return bank

    def extend(
        self,
        bank: Bank,
        frames: Tensor,
        seconds: Tensor | None = None,
        active: Tensor | None = None,
        attached: Sequence[Tensor] = (),
    ) -> Bank:
        """Push T frames one after another: [B, T, N, C], seconds [B, T], active [B, T], attached [B, T, N, Ci]."""
        require_tensors(f"{self.name}.extend", frames=frames, seconds=seconds, active=active)
        require(frames.dim() == 4, f"{self.name}.extend: frames must be [B, T, N, C]", frames)
        B, T = frames.shape[:2]
        for what, x in (("seconds", seconds), ("active", active)):
            require(x is None or x.shape == (B, T), f"{self.name}.extend: {what} must be [B, T]", x, frames)
        for i, x in enumerate(attached):
            fits = isinstance(x, Tensor) and x.dim() == 4 and x.shape[:2] == (B, T)
            require(fits, f"{self.name}.extend: attached[{i}] must be [B, T, N, Ci]", *([x] if fits else []), frames)
        return self._extend(bank, frames, seconds, active, attached)

    def _extend(
        self, bank: Bank, frames: Tensor, seconds: Tensor | None, active: Tensor | None, attached: Sequence[Tensor]
    ) -> Bank:
        for t in range(frames.shape[1]):
            at = [None if x is None else x[:, t] for x in (seconds, active)]
            bank = self.push(bank, frames[:, t], *at, [x[:, t] for x in attached])
        return bank

    def flush(self, bank: Bank, active: Tensor | None = None) -> Bank:
        """End what was gathered: policies that gather frames and compress many at once (moviechat, flash_vstream) do so
        now, with those that there are. For all others the same as `compress`."""
        return self.compress(bank, active)

    def check(self, bank: Bank) -> Bank:
        """The bank, if this policy can go on with it; ValueError otherwise (say, after load_state_dict)."""
        W = bank.rows.shape[2] * bank.rows.shape[3]
        widths = [x.shape[2] * x.shape[3] // bank.positions for x in bank.attached]
        times = bank.first is not None
        N = self._given_positions(bank)
        like = self.new(len(bank), N, W // bank.positions, bank.rows.dtype, "meta", attached=widths, times=times)
        pairs = [(like, bank)] if like.head is None or bank.head is None else [(like, bank), (like.head, bank.head)]
        fits = (like.head is None) == (bank.head is None)
        for a, b in pairs:
            mine, given = a.tensors(), b.tensors()
            fits &= mine.keys() == given.keys() and a.positions == b.positions
            fits &= a.sparse == b.sparse and len(a.counts) == len(b.counts)
            fits = fits and all(self._fits(mine[name], x) for name, x in given.items())
            fits = fits and all(x.dtype == b.extra[name].dtype for name, x in a.extra.items())
        require(
            fits, f"{self.name}.check: the bank was made by another policy or with other options than {self.spec()}"
        )
        return bank

    def check_extra(self, bank: Bank) -> None:
        """ValueError where what this policy keeps beside the entries has values that it never leaves there; waits for
        the device."""

    # What a policy may define for itself.

    def _stored_positions(self, N: int) -> int:
        """N of what is stored."""
        return N

    def _given_positions(self, bank: Bank) -> int:
        """N of the frames that a bank is for, as far as it tells."""
        return bank.positions

    def _first_slots(self) -> int:
        return _FIRST_SLOTS if self.room is None else self.room + 1

    def _fits(self, mine: Tensor, given: Tensor) -> bool:
        """Whether a tensor of a bank has the shape of a new one's. Without a capacity the number of slots, which is in
        another place in each tensor, may differ."""
        free = 1 if self.capacity is None else 0
        return mine.dim() == given.dim() and sum(a != b for a, b in zip(mine.shape, given.shape)) <= free

    def _reduce(self, frame: Tensor, attached: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor], Tensor | int]:
        """A frame before it is stored, and the size that it counts: int32 [B, N], or 1."""
        return frame, attached, 1

    def _extended(self, bank: Bank) -> Bank:
        """A new bank with what this policy keeps beside the entries."""
        return bank

    def _shrink_(self, bank: Bank, active: Tensor | None) -> None:
        """Remove one entry, in place, in every active video that holds room + 1."""
        raise NotImplementedError

    def _due(self, bank: Bank) -> bool:
        """Whether a video may have to be compressed, as far as is known without asking the device."""
        return self.room is not None and bank.bound > self.room

    def _compress(self, bank: Bank, active: Tensor | None) -> Bank:
        """Compress the active videos, where it is due."""
        self._shrink_(bank, active)
        return bank if active is not None else dataclasses.replace(bank, bound=self.room)

    def _advance_(
        self,
        bank: Bank,
        frame: Tensor,
        attached: Sequence[Tensor],
        when: Tensor | None,
        active: Tensor | None,
        size: Tensor | int,
    ) -> Bank:
        """Compress where due, and append, in place or, without a capacity, in a bank of twice the slots where all are
        used. What this leaves in `bound` is one less than the bound afterwards."""
        if self._due(bank):
            bank = self._compress(bank, active)
        if self.room is None and bank.bound == bank.rows.shape[1]:
            bank = grown(bank, 2 * bank.bound)
        put_(bank, frame, attached, when, active, size)
        return bank

    # The rest.

    def _append(
        self,
        bank: Bank,
        frame: Tensor,
        attached: Sequence[Tensor],
        when: Tensor | None,
        active: Tensor | None,
        size: Tensor | int,
    ) -> Bank:
        ragged = bank.ragged or active is not None
        head, on = bank.head, active
        if head is not None and head.bound < self.anchors:  # no video has filled its anchors yet
            put_(head, *_rows(head, frame, attached), when, active, size)
            head = dataclasses.replace(head, bound=head.bound + 1, ragged=ragged)
            return dataclasses.replace(bank, head=head, ragged=ragged)
        if head is not None and ragged:
            present = torch.ones_like(head.length, dtype=torch.bool) if active is None else active
            anchoring = head.length < self.anchors
            put_(head, *_rows(head, frame, attached), when, present & anchoring, size)
            head, on = dataclasses.replace(head, ragged=True), present & ~anchoring
        bank = self._advance_(bank, *_rows(bank, frame, attached), when, on, size)
        if self.room is not None and bank.bound > self.room and on is None:
            bank = dataclasses.replace(bank, bound=self.room)
        slots = bank.rows.shape[1]
        return dataclasses.replace(bank, bound=min(bank.bound + 1, slots), ragged=ragged, head=head)

    def _check_frame(
        self, bank: Bank, frame: Tensor, seconds: Tensor | None, active: Tensor | None, attached: Sequence[Tensor]
    ) -> None:
        name = f"{self.name}.append"
        require_tensors(name, frame=frame, seconds=seconds, **{f"attached[{i}]": x for i, x in enumerate(attached)})
        B, (G, W) = len(bank), bank.rows.shape[2:]
        N = bank.positions
        fits = frame.dim() == 3 and frame.shape[0] == B and frame.shape[2] == G * W // N
        fits = fits and self._stored_positions(frame.shape[1]) == N and frame.shape[1] >= N
        text = "{name}: frame must be [B, N, C] with B = {B}, N = {N}, C = {C} of the bank"
        require(fits, text, frame, name=name, B=B, N=N, C=G * W // N)
        count = len(bank.attached)
        require(len(attached) == count, f"{name}: attached must be {count}, got {len(attached)}")
        for i, (new, rows) in enumerate(zip(attached, bank.attached)):
            width = rows.shape[2] * rows.shape[3] // N
            fits, text = new.shape == (*frame.shape[:2], width), "{name}: attached[{i}] must be [B, N, {width}]"
            require(fits, text, new, frame, name=name, i=i, width=width)
        for what, x in (("frame", frame), *((f"attached[{i}]", x) for i, x in enumerate(attached))):
            fits = x.dtype in FLOATING and x.device == bank.rows.device
            require(fits, f"{name}: {what} must be floating, on the device of the bank", x, bank.rows)
            require(
                not (x.requires_grad and torch.is_grad_enabled()),
                f"{name}: the bank keeps values, not their graph; detach {what}",
            )
        if seconds is not None:
            fits = seconds.shape == (B,) and seconds.device == bank.rows.device
            require(fits, f"{name}: seconds must be [B], on the device of the bank", seconds, bank.rows)
        self._check_active(bank, active)

    def _check_active(self, bank: Bank, active: Tensor | None) -> None:
        require_tensors(self.name, active=active)
        fits = active is None or (active.shape == (len(bank),) and active.dtype == torch.bool)
        fits = fits and (active is None or active.device == bank.rows.device)
        require(fits, f"{self.name}: active must be bool [B], on the device of the bank", active, bank.rows)


def check_compat(name: str, compat: str) -> None:
    """Refuse what is no form of a method: as its paper says, or as its authors' program does."""
    require(compat in ("paper", "official"), f"{name}: compat must be 'paper' or 'official', got {compat!r}")


@contextmanager
def plain(device: str) -> Iterator[None]:
    """No graph, and no autocast: the choices are made in float32."""
    off = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with torch.no_grad(), off:
        yield


def _rows(bank: Bank, frame: Tensor, attached: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Frame and attached in the layout and dtypes of the bank, [B, G, W]."""
    return _as(frame, bank.rows), [_as(new, rows) for new, rows in zip(attached, bank.attached)]


def _as(new: Tensor, rows: Tensor) -> Tensor:
    return new.reshape(len(new), *rows.shape[2:]).to(rows.dtype)
