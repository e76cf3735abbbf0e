"""Banks in files: save after every so many frames, load after a crash, go on with the same bits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyvidx.files import write_tensors
from pyvidx.memory.bank import Bank
from pyvidx.memory.policy import Policy
from pyvidx.memory.registry import create
from pyvidx.ops._library import FLOATING, require
from pyvidx.tensor_files import note, opened

_KEY, _BESIDE = "pyvidx.memory", "beside."
_DTYPES = {
    "sizes": torch.int32, "order": torch.int32, "length": torch.int32, "seen": torch.int64,
    "first": torch.float64, "last": torch.float64, "similarity": torch.float32,
}  # fmt: skip


def save(
    path: str | Path,
    policy: Policy,
    bank: Bank,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write a bank and its policy to a .safetensors file. A crash leaves the old file whole.

    Args:
        tensors, notes: what a program keeps beside the bank, in the same file; `load` passes it by, `beside` reads it.

    Raises:
        ValueError: path has another ending, the policy cannot go on with the bank, or what it stores is not finite.
        OSError: the file cannot be written.
    """
    path = Path(path)
    require(path.suffix == ".safetensors", f"memory.save: path must end in .safetensors, got {path.name}")
    policy.check(bank)
    try:
        for one in (bank, bank.head):
            if one is not None:
                _check_values(one)
        policy.check_extra(bank)
    except ValueError as error:
        raise ValueError(f"memory.save: {error}") from error
    more = {_BESIDE + name: x for name, x in (tensors or {}).items()}
    return write_tensors(path, bank.state_dict() | more, {**(notes or {}), _KEY: json.dumps(policy.spec())})


def load(path: str | Path, device: torch.device | str = "cpu") -> tuple[Policy, Bank]:
    """The policy and the bank of a file written by `save`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no bank, or one that cannot be: damaged, or made by someone else.
    """
    with opened(path, "memory.load") as file:
        about = note(file, path, _KEY)
        require(about is not None, f"memory.load: {path} must be a file of memory.save, got other tensors")
        try:
            policy = create(**about)
            names = [name for name in file.keys() if not name.startswith(_BESIDE)]
            bank = Bank.load_state_dict({name: file.get_tensor(name) for name in names})
            _check_values(bank)
            if bank.head is not None:
                _check_values(bank.head)
                shape = (len(bank), policy.anchors, *bank.rows.shape[2:])
                require(bank.head.rows.shape == shape, f"the anchors' rows must be {shape}", bank.head.rows)
            policy.check(bank)
            policy.check_extra(bank)
        except (ValueError, TypeError, RuntimeError, IndexError, ZeroDivisionError, OverflowError) as error:
            raise ValueError(f"memory.load: {path} holds no bank that can go on: {error}") from error
    return policy, bank._map(lambda x: x.to(device))


def beside(path: str | Path, key: str) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """What a program kept beside the bank: the JSON object of the note `key` (None: there is none), and the tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, is damaged, or the note is no JSON object.
    """
    with opened(path, "memory.beside") as file:
        names = [name for name in file.keys() if name.startswith(_BESIDE)]
        return note(file, path, key), {name.removeprefix(_BESIDE): file.get_tensor(name) for name in names}


def _check_values(bank: Bank) -> None:
    """Refuse values that no policy leaves in a bank: kernels and reads follow them into memory."""
    require(bank.rows.dim() == 4 and bank.rows.dtype in FLOATING, "rows must be floating [B, S, G, W]", bank.rows)
    B, S, G, W = bank.rows.shape
    require(min(B, S, G, W) >= 1, "rows must not be empty", bank.rows)
    for name, x in bank.tensors().items():
        if name.startswith("extra."):
            continue  # the policy knows
        require(
            x.dtype == _DTYPES[name] if name in _DTYPES else x.dtype in FLOATING,
            f"{name} must be {_DTYPES.get(name, 'floating')}",
            x,
        )
    length, order, sizes = bank.length, bank.order, bank.sizes
    fits = length.shape == bank.seen.shape == (B,) and order.shape == sizes.shape == (B, G, S)
    require(fits, f"length and seen must be [{B}], order and sizes [{B}, {G}, {S}]", length, bank.seen, order, sizes)
    fits = all(x.shape[:3] == (B, S, G) and x.dim() == 4 and x.numel() for x in bank.attached)
    require(fits, f"attached must be [{B}, {S}, {G}, Wi]", *bank.attached)
    counts = isinstance(bank.positions, int) and isinstance(bank.bound, int)
    require(counts and bank.positions >= 1 and G * W % bank.positions == 0, f"positions must divide {G * W} numbers")
    require(0 <= bank.bound <= S, f"bound must be in [0, {S}], got {bank.bound}")
    require(bool((length >= 0).all()) and bool((length <= bank.bound).all()), f"length must be in [0, {bank.bound}]")
    require(bank.ragged or bool((length == bank.bound).all()), f"length must be {bank.bound} for every video")
    least = 0 if bank.extra else length  # a policy with more of its own may hold a frame more than once
    require(bool((bank.seen >= least).all()), "seen must be at least length")
    every = torch.arange(S, dtype=order.dtype, device=order.device)
    require(bool((order.sort(dim=-1).values == every).all()), "order must be a permutation of the slots")
    stored = every < length[:, None, None]
    in_order = sizes.gather(2, order.long())
    least = 0 if bank.sparse else 1
    require(bool((in_order[stored.expand_as(order)] >= least).all()), "sizes must be at least 1 where an entry is")
    require(bool((in_order[~stored.expand_as(order)] == 0).all()), "sizes must be 0 where none is")
    if bank.first is not None and bank.last is not None:
        fits = bank.first.shape == bank.last.shape == order.shape
        require(fits, "first and last must be like order", bank.first, bank.last)
        first, last = (t.gather(2, order.long())[stored.expand_as(order)] for t in (bank.first, bank.last))
        fits = first.isfinite() & last.isfinite() & (first <= last)
        require(bool(fits.all()), "first and last must be finite where an entry is, first no later than last")
    held = (sizes > 0).transpose(1, 2)[..., None]  # [B, S, G, 1]
    for name, x in (("rows", bank.rows), *(("attached", x) for x in bank.attached)):
        require(bool((x.isfinite() | ~held).all()), f"{name} must be finite where an entry is")
    require((bank.first is None) == (bank.last is None), "first and last go together")
