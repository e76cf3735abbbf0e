"""What is trained, and the state of its training, as the loop and its checkpoints see them."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn


class Task(nn.Module):
    """What is trained, as the loop sees it: parameters, a loss per batch, and the loss' weight.

    forward(batch) gives the mean loss of a batch, a scalar; where whole_batch is set, it may be named parts that
    add up to it. What is frozen may be held outside of the module's parameters; what requires no gradient is not saved.

    Attributes:
        some_unused: parameters that require gradients may get none from a batch, but never the last one; costs a
            search per step.
        whole_batch: the loss compares the samples of a batch with each other, across all processes (a contrastive
            loss): it is not a mean of what micro-batches give, so there is no accumulation; forward gathers from all
            processes and gives the loss of all their samples, for which every batch has to be full: the data put
            another row in the place of one that cannot be read.
        model: what is trained, with a `save(path)` of its own; for the command.
        exportable: the public code has names for what is trained, see `export`.
        said: what is trained, for people.
        about: what else, beside the recipe, is the same in a run and the one that goes on with it. So are the weights
            that a task is built with: what of them is drawn needs a seed.
    """

    some_unused = False
    whole_batch = False
    exportable = True
    said = ""
    about: dict = {}

    def count(self, batch) -> int:
        """What the mean is over: answer tokens, or samples. 0: nothing to learn from."""
        raise NotImplementedError

    def outside(self) -> dict[str, Tensor]:
        """Weights that the loss depends on and that are not among the module's own."""
        return {}

    def export(self, path: Path, epoch: int) -> None:
        """Write what was trained under the names of the public code; epoch: the last one, from 0."""
        raise NotImplementedError


@dataclass
class State:
    """All that a run is, between two optimizer steps, but the generators' states, which torch keeps.

    Attributes:
        step: optimizer steps done.
        epoch, position: the epoch, and micro-batches of it that were taken.
        broken: samples that could not be read, and why, of this process or the file.
        best: lowest loss on held-out rows, or None.
    """

    task: Task
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    epoch: int = 0
    position: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    best: float | None = None


def trained(task: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in task.named_parameters() if p.requires_grad}
