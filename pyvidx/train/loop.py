"""The training loop, for any Task: its state is a value that is saved at once and goes on to the same bits."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from pyvidx.train.checkpoint import CHECKPOINT, identity, restore, save
from pyvidx.train.data import plan
from pyvidx.train.distributed import Ranks
from pyvidx.train.outputs import sweep
from pyvidx.train.recipe import Recipe, groups, learning_rate
from pyvidx.train.task import State, Task, trained


class Stepped(NamedTuple):
    """What an optimizer step did.

    Attributes:
        loss: the mean over all processes.
        count: what that is over.
        norm: of the gradients before clipping; None without clipping, and where it is not finite: float16's scaler then
            leaves the step out.
        parts: of the loss, where the task names them.
    """

    step: int
    epoch: int
    rate: float
    loss: float
    count: int
    norm: float | None
    seconds: float
    parts: dict[str, float]


def begin(task: Task, recipe: Recipe, ranks: Ranks) -> State:
    """A new run: AdamW over what requires gradients, and the generators seeded with seed + rank.

    Raises:
        ValueError: the recipe accumulates micro-batches of a loss that is over the whole batch.
    """
    if task.whole_batch and recipe.accumulation > 1:
        raise ValueError(
            "train: accumulation must be 1 for a loss that compares all samples of a batch, which is not the mean over "
            f"micro-batches, got {recipe.accumulation}; larger batches take micro_batch or more processes"
        )
    torch.manual_seed(recipe.seed + ranks.rank)
    optimizer = torch.optim.AdamW(groups(task, recipe), lr=recipe.start_lr, betas=recipe.betas, eps=recipe.eps)
    return State(task, optimizer, torch.amp.GradScaler(ranks.device.type, enabled=recipe.amp == "float16"))


def train(
    task: Task,
    data: Dataset,
    recipe: Recipe,
    ranks: Ranks,
    out: Path,
    *,
    held_out: Dataset | None = None,
    report: Callable[[Stepped], None] = lambda stepped: None,
    after_epoch: Callable[[State, float | None, bool], None] = lambda state, loss, best: None,
    started: Callable[[State, int], None] = lambda state, steps: None,
) -> State:
    """Train to the recipe's last epoch, from the checkpoint in `out` if there is one; all processes call it.

    Args:
        task: on its device, the same in every process.
        data: indexed by (epoch, row), with a `collate` whose batches have a length and `broken`; where it has a
            `digest()` of what its rows are, a run does not go on with others.
        out: folder for the checkpoint.
        held_out: the same, for a loss after every epoch.
        report: called after every step, in every process.
        after_epoch: called with the state, the held-out loss and whether it is the lowest so far (without held-out
            rows, the latest is the best), in every process.
        started: called once with the state and the steps of an epoch.

    Raises:
        ValueError: recipe, task and rows do not go together, or the checkpoint is damaged or of another run.
        RuntimeError: a loss is not finite, or nothing of the held-out rows can be read.
        OSError: a file cannot be read or written.
    """
    rows, path = len(data), out / CHECKPOINT
    count = len(plan(rows, recipe, ranks, 0))
    state = begin(task, recipe, ranks)
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        sweep(out)
    run = identity(task, recipe, ranks, data, held_out)
    wrapped = _Shared(task)
    if ranks.world > 1:
        on = [ranks.device] if ranks.device.type == "cuda" else None
        wrapped = DistributedDataParallel(wrapped, device_ids=on, find_unused_parameters=task.some_unused)
    # After the wrapping, which draws nothing but sends rank 0's weights to all.
    if all(ranks.gathered(path.exists())):
        state = restore(state, path, run, recipe, ranks, count)
    started(state, -(-count // recipe.accumulation))
    while state.epoch < recipe.epochs:
        task.train()
        batches = plan(rows, recipe, ranks, state.epoch)[state.position :]
        for group in _grouped(_loader(data, batches, recipe), recipe.accumulation):
            stepped = _step(state, wrapped, group, recipe, ranks, count)
            if stepped is not None:
                report(stepped)
                if state.step % recipe.save_every == 0:
                    save(state, path, run, ranks)
        loss = None
        if held_out is not None:
            loss, unread = evaluate(task, held_out, recipe, ranks)
            state.broken |= unread
        # Not a number is no best one; without held-out rows the latest weights are.
        best = loss is None or math.isfinite(loss) and (state.best is None or loss < state.best)
        state.best = loss if best else state.best
        state.epoch, state.position = state.epoch + 1, 0
        after_epoch(state, loss, best)
        save(state, path, run, ranks)
    return state


@torch.no_grad()
def evaluate(task: Task, data: Dataset, recipe: Recipe, ranks: Ranks) -> tuple[float, dict[str, str]]:
    """The mean loss over all rows in eval mode, and what of them this process could not read.

    Where the loss is over the whole batch, an incomplete last one is left out.
    """
    task.eval()
    mine = [(0, row) for row in range(ranks.rank, len(data), ranks.world)]
    if task.whole_batch:
        mine = mine[: len(data) // (recipe.batch * ranks.world) * recipe.batch]
    batches = [mine[i : i + recipe.batch] for i in range(0, len(mine), recipe.batch)]
    sums, count, broken = 0.0, 0, {}
    for batch in _loader(data, batches, recipe):
        broken |= batch.broken
        weight = task.count(batch) if len(batch) else 0
        if weight:
            with autocast(recipe, ranks):
                sums += weight * float(total(task(batch)))
            count += weight
    sums, count = ranks.total(sums, count)
    if count == 0:
        raise RuntimeError("train: none of the held-out rows could be read, or they are too few for a batch")
    return sums / count, broken


def total(loss: Tensor | dict[str, Tensor]) -> Tensor:
    """The loss itself, of one in parts."""
    return sum(loss.values()) if isinstance(loss, dict) else loss


class _Shared(nn.Module):
    """The task for DistributedDataParallel: a process that could read nothing takes part in the exchange of gradients
    with zeros, for a batch of None."""

    def __init__(self, task: Task):
        super().__init__()
        self.task = task

    def forward(self, batch) -> Tensor | dict[str, Tensor]:
        if batch is not None:
            return self.task(batch)
        own = list(trained(self.task).values())
        # Zeros for a parameter that no process uses would let it decay.
        return sum(0 * p.sum() for p in (own[-1:] if self.task.some_unused else own))


def _step(state: State, wrapped: nn.Module, group: list, recipe: Recipe, ranks: Ranks, batches: int) -> Stepped | None:
    """One optimizer step over a group of micro-batches, in place; None where no process could read a sample.

    batches: micro-batches of an epoch.
    """
    start = time.perf_counter()
    for batch in group:
        state.broken |= batch.broken
        if state.task.whole_batch and len(batch) != recipe.batch:  # the other processes would wait forever
            raise RuntimeError(f"train: every batch must have {recipe.batch} samples, got {len(batch)}")
    last = state.position + len(group) - 1  # the rate is that of the group's last micro-batch, as in the public code
    state.position = last + 1
    counts = [state.task.count(batch) if len(batch) else 0 for batch in group]
    samples, filled = ranks.total(sum(counts), sum(c > 0 for c in counts))
    if samples == 0:
        return None
    rate = learning_rate(recipe, state.epoch, last, batches)
    for part in state.optimizer.param_groups:
        part["lr"] = rate * part["multiplier"]
    seen: dict[str, float] = {}
    for i, (batch, count) in enumerate(zip(group, counts)):
        share = count / samples if recipe.reduction == "tokens" else (count > 0) / filled
        waiting = i + 1 < len(group) and ranks.world > 1
        with wrapped.no_sync() if waiting else nullcontext():
            with autocast(recipe, ranks):
                loss = wrapped(batch if count else None)
            # Gradients are averaged over processes; shares add up to 1 over all of them.
            state.scaler.scale(share * total(loss) * ranks.world).backward()
        for name, part in (loss if isinstance(loss, dict) else {"loss": loss}).items():
            seen[name] = seen.get(name, 0.0) + share * float(part.detach())
    parts = dict(zip(seen, ranks.total(*seen.values())))
    mean = sum(parts.values())
    if not math.isfinite(mean):
        raise RuntimeError(f"train: the loss of step {state.step} (epoch {state.epoch}) is {mean}")
    norm = None
    if recipe.clip is not None:
        state.scaler.unscale_(state.optimizer)
        norm = float(nn.utils.clip_grad_norm_(list(trained(state.task).values()), recipe.clip))
        norm = norm if math.isfinite(norm) else None
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    took = time.perf_counter() - start
    named = {} if parts.keys() == {"loss"} else parts
    return Stepped(state.step, state.epoch, rate, mean, int(samples), norm, took, named)


def _loader(data: Dataset, batches: list[list], recipe: Recipe) -> DataLoader:
    # A generator of its own: a loader draws a seed when it starts, and a resumed run starts one more.
    return DataLoader(
        data,
        batch_sampler=batches,
        collate_fn=data.collate,
        num_workers=recipe.workers,
        generator=torch.Generator(),
        multiprocessing_context="spawn" if recipe.workers else None,  # decoders have threads, which do not fork
    )


def _grouped(batches: Iterable, size: int) -> Iterator[list]:
    group = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def autocast(recipe: Recipe, ranks: Ranks):
    """The recipe's mixed precision."""
    if recipe.amp == "none":
        return nullcontext()
    return torch.autocast(ranks.device.type, getattr(torch, recipe.amp))
