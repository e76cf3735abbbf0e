"""The training loop, for any Task: its state is a value that is saved at once and goes on to the same bits."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from pyvidx.train.data import plan
from pyvidx.train.distributed import Ranks
from pyvidx.train.recipe import Recipe, groups, learning_rate

CHECKPOINT = "checkpoint.pt"
# What may differ between a run and the one that goes on with it.
FREE = ("save_every", "workers")


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
        about: what else, beside the recipe, is the same in a run and the one that goes on with it.
    """

    some_unused = False
    whole_batch = False
    about: dict = {}

    def count(self, batch) -> int:
        """What the mean is over: answer tokens, or samples. 0: nothing to learn from."""
        raise NotImplementedError

    def export(self, path: Path, epoch: int) -> None:
        """Write what was trained under the names of the public code; epoch: the last one, from 0."""
        raise NotImplementedError


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


def trained(task: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in task.named_parameters() if p.requires_grad}


def save(state: State, path: Path, recipe: Recipe, ranks: Ranks, rows: int) -> None:
    """Write a checkpoint; all processes call it. A kill leaves the one before or this one, never a part."""
    merged = {name: why for part in ranks.gathered(state.broken) for name, why in part.items()}
    generators = ranks.gathered(_generators(ranks))
    if ranks.first:
        whole = {
            "step": state.step, "epoch": state.epoch, "position": state.position, "broken": merged, "best": state.best,
            "model": {name: p.detach() for name, p in trained(state.task).items()},
            "optimizer": state.optimizer.state_dict(), "scaler": state.scaler.state_dict(),
            "generators": generators, "run": _run(state.task, recipe, ranks, rows),
        }  # fmt: skip
        written = path.with_name(path.name + ".part")
        with written.open("wb") as file:
            torch.save(whole, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, path)
    ranks.total(0)  # nobody goes on before it is there


def restore(state: State, path: Path, recipe: Recipe, ranks: Ranks, rows: int) -> State:
    """The state of a checkpoint, in the modules of `state`.

    Raises:
        ValueError: it is of another recipe, number of processes, number of rows or model.
    """
    saved = torch.load(path, map_location="cpu", weights_only=True)
    run = _run(state.task, recipe, ranks, rows)
    other = [f"{k} {saved['run'].get(k)} (now {v})" for k, v in run.items() if saved["run"].get(k) != v]
    if other:
        raise ValueError(f"train: {path} is of another run: {', '.join(other)}")
    own = trained(state.task)
    if {n: p.shape for n, p in own.items()} != {n: p.shape for n, p in saved["model"].items()}:
        raise ValueError(f"train: {path} is of a model with other trained parameters")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(saved["model"][name])
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scaler.load_state_dict(saved["scaler"])
    generator = saved["generators"][ranks.rank]
    torch.set_rng_state(generator["cpu"])
    if ranks.device.type == "cuda":
        torch.cuda.set_rng_state(generator["cuda"], ranks.device)
    return replace(state, **{k: saved[k] for k in ("step", "epoch", "position", "broken", "best")})


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
        data: indexed by (epoch, row), with a `collate` whose batches have a length and `broken`.
        out: folder for the checkpoint.
        held_out: the same, for a loss after every epoch.
        report: called after every step, in every process.
        after_epoch: called with the state, the held-out loss and whether it is the lowest so far (without held-out
            rows, the latest is the best), in every process.
        started: called once with the state and the steps of an epoch.
    """
    rows, path = len(data), out / CHECKPOINT
    state = begin(task, recipe, ranks)
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
    wrapped = _Shared(task)
    if ranks.world > 1:
        on = [ranks.device] if ranks.device.type == "cuda" else None
        wrapped = DistributedDataParallel(wrapped, device_ids=on, find_unused_parameters=task.some_unused)
    # After the wrapping, which draws nothing but sends rank 0's weights to all.
    if all(ranks.gathered(path.exists())):
        state = restore(state, path, recipe, ranks, rows)
    count = len(plan(rows, recipe, ranks, 0))
    started(state, -(-count // recipe.accumulation))
    while state.epoch < recipe.epochs:
        task.train()
        batches = plan(rows, recipe, ranks, state.epoch)[state.position :]
        for group in _grouped(_loader(data, batches, recipe), recipe.accumulation):
            stepped = _step(state, wrapped, group, recipe, ranks, count)
            if stepped is not None:
                report(stepped)
                if state.step % recipe.save_every == 0:
                    save(state, path, recipe, ranks, rows)
        loss = None
        if held_out is not None:
            loss, unread = evaluate(task, held_out, recipe, ranks)
            state.broken |= unread
        best = loss is None or state.best is None or loss < state.best
        state.best = loss if best else state.best
        state.epoch, state.position = state.epoch + 1, 0
        after_epoch(state, loss, best)
        save(state, path, recipe, ranks, rows)
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


def _generators(ranks: Ranks) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return states


def _run(task: Task, recipe: Recipe, ranks: Ranks, rows: int) -> dict:
    fixed = {name: value for name, value in recipe.to_dict().items() if name not in FREE}
    return fixed | task.about | {"processes": ranks.world, "rows": rows}
