"""Banks made from sizes, from other banks, and with more slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyvidx.memory.bank import Bank
from pyvidx.ops._library import require


def new_bank(
    B: int,
    S: int,
    N: int,
    C: int,
    *,
    whole_frame: bool,
    similarity: bool = False,
    dtype: torch.dtype,
    device: torch.device | str,
    attached: Sequence[int],
    attached_dtype: torch.dtype,
    times: bool,
    sparse: bool = False,
) -> Bank:
    """An empty bank of S slots; for policies."""
    G = 1 if whole_frame else N

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    return Bank(
        rows=zeros(B, S, G, N * C // G, dtype=dtype),
        sizes=zeros(B, G, S, dtype=torch.int32),
        order=torch.arange(S, dtype=torch.int32, device=device).expand(B, G, S).contiguous(),
        length=zeros(B, dtype=torch.int32),
        seen=zeros(B, dtype=torch.int64),
        positions=N,
        first=zeros(B, G, S, dtype=torch.float64) if times else None,
        last=zeros(B, G, S, dtype=torch.float64) if times else None,
        similarity=zeros(B, G, S - 1, dtype=torch.float32) if similarity else None,
        attached=tuple(zeros(B, S, G, N * width // G, dtype=attached_dtype) for width in attached),
        sparse=sparse,
    )


def batched(banks: Sequence[Bank]) -> Bank:
    """Banks of one policy, made with the same sizes, as one batch: sessions that are advanced together.

    Returns:
        A bank of B1 + B2 + ... videos, as new tensors; `select` takes them apart again.

    Raises:
        ValueError: the banks do not fit together.
    """
    require(len(banks) > 0, "batched: there must be at least one bank, got none")
    for bank in banks:
        bank.check_live()
    slots = max(bank.rows.shape[1] for bank in banks)
    banks = [bank if bank.rows.shape[1] == slots else grown(bank, slots) for bank in banks]
    tensors = [bank.tensors() for bank in banks]

    def layout(bank: Bank, named: dict[str, Tensor]) -> tuple[Any, ...]:
        return bank.positions, bank.head is None, {n: (x.shape[1:], x.dtype, x.device) for n, x in named.items()}

    wanted = layout(banks[0], tensors[0])
    for i, (bank, named) in enumerate(zip(banks, tensors)):
        require(layout(bank, named) == wanted, f"batched: bank {i} must have the sizes, dtypes and device of bank 0")
    joined = {name: torch.cat([named[name] for named in tensors]) for name in tensors[0]}
    bounds = {(bank.bound, *bank.counts) for bank in banks}
    head = None if banks[0].head is None else batched([bank.head for bank in banks])
    return dataclasses.replace(
        banks[0],
        **{name: x for name, x in joined.items() if "." not in name},
        attached=tuple(joined[f"attached.{i}"] for i in range(len(banks[0].attached))),
        extra={name: joined[f"extra.{name}"] for name in banks[0].extra},
        bound=max(bank.bound for bank in banks),
        counts=tuple(max(column) for column in zip(*(bank.counts for bank in banks))),
        ragged=len(bounds) > 1 or any(bank.ragged for bank in banks) or (head is not None and head.ragged),
        head=head,
    )


def grown(bank: Bank, slots: int) -> Bank:
    """The bank with more slots, as new tensors (the head and what is extra stay)."""
    B, S, G = bank.rows.shape[:3]

    def longer(x: Tensor, dim: int) -> Tensor:
        shape = list(x.shape)
        shape[dim] = slots - S
        return torch.cat([x, x.new_zeros(shape)], dim)

    free = torch.arange(S, slots, dtype=torch.int32, device=bank.order.device).expand(B, G, -1)
    return dataclasses.replace(
        bank,
        rows=longer(bank.rows, 1),
        sizes=longer(bank.sizes, 2),
        order=torch.cat([bank.order, free], 2),
        first=None if bank.first is None else longer(bank.first, 2),
        last=None if bank.last is None else longer(bank.last, 2),
        similarity=None if bank.similarity is None else longer(bank.similarity, 2),
        attached=tuple(longer(x, 1) for x in bank.attached),
    )
