"""Processes that train together: torchrun's environment in, sums and gathered objects out."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

# DistributedDataParallel imports this module, whose functions have the group of that moment as a default: imported
# after the group began, they keep it, and its threads, past its end, which now and then aborts a process at its exit.
import torch.distributed.nn  # noqa: F401


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank, world: its number, and how many there are.
        device: where it computes.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """This is the process that writes and prints."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Sums over all processes, in float64."""
        if self.world == 1:
            return [float(v) for v in values]
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def gathered(self, value: object) -> list:
        """Every process' value, by rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values


@contextmanager
def ranks(device: str | None = None) -> Iterator[Ranks]:
    """Join the processes that torchrun started, or be alone where it did not start this one.

    NCCL between GPUs, one each by LOCAL_RANK; gloo between CPUs.

    Args:
        device: "cuda" or "cpu"; None: GPUs if there are any.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield Ranks(device=torch.device(kind))
        return
    if kind == "cuda":
        kind = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(kind)
    dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
    try:
        yield Ranks(dist.get_rank(), world, torch.device(kind))
    finally:
        dist.destroy_process_group()
