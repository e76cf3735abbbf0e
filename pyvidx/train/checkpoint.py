"""A run between two optimizer steps as a file: which run it is of, and no value of it used before it was checked."""

import math
import pickle
import reprlib
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyvidx.models.files import digest
from pyvidx.train.distributed import Ranks
from pyvidx.train.outputs import written
from pyvidx.train.recipe import Recipe
from pyvidx.train.task import State, Task, trained

CHECKPOINT = "checkpoint.pt"
# What may differ between a run and the one that goes on with it.
FREE = ("save_every", "workers")
# Hexadecimal digits of a digest that are kept: enough to tell two data sets or weights from each other.
DIGITS = 16


def identity(task: Task, recipe: Recipe, ranks: Ranks, data: Dataset, held_out: Dataset | None) -> dict:
    """What is the same in a run and the one that goes on with it: recipe, rows, and the weights that `task` has now,
    at its start; all processes call it, and the first one reads weights and rows for all."""
    fixed = {name: value for name, value in recipe.to_dict().items() if name not in FREE}
    known = fixed | task.about | {"processes": ranks.world, "rows": len(data)}
    return ranks.gathered(known | _digests(task, data, held_out) if ranks.first else None)[0]


def differences(saved: Mapping, now: Mapping) -> str:
    """The entries that differ, for an error; "" where none does."""
    names = [
        name for name in {**now, **saved} if name not in saved or name not in now or not _equal(saved[name], now[name])
    ]
    return ", ".join(f"{name} {_shown(saved.get(name))} (now {_shown(now.get(name))})" for name in names)


def save(state: State, path: Path, run: dict, ranks: Ranks) -> None:
    """Write a checkpoint; all processes call it. A kill leaves the one before or this one, never a part.

    Args:
        run: see `identity`.

    Raises:
        OSError: it could not be written; the one before is still there.
    """
    merged = {name: why for part in ranks.gathered(state.broken) for name, why in part.items()}
    generators = ranks.gathered(_generators(ranks))
    if ranks.first:
        content = {
            "step": state.step, "epoch": state.epoch, "position": state.position, "broken": merged, "best": state.best,
            "model": {name: p.detach() for name, p in trained(state.task).items()},
            "optimizer": state.optimizer.state_dict(), "scaler": state.scaler.state_dict(),
            "generators": generators, "run": run,
        }  # fmt: skip
        with written(path) as part:
            torch.save(content, part)
    ranks.total(0)  # nobody goes on before it is there


def restore(state: State, path: Path, run: dict, recipe: Recipe, ranks: Ranks, batches: int) -> State:
    """The state of a checkpoint, in the modules of `state`.

    Args:
        run: see `identity`.
        batches: micro-batches of an epoch.

    Raises:
        ValueError: the file is damaged, or of a run with another recipe, model, number of processes, weights or rows.
        OSError: it cannot be read.
    """
    try:
        saved = _content(path)
        _need(isinstance(saved.get("run"), dict), "it does not say of which run it is")
        other = differences(saved["run"], run)
        if not other:
            _check(saved, state, recipe, ranks, batches)
    except OSError:
        raise
    except Exception as error:  # zipfile, torch and pickle have many of their own
        # torch's text for a pickle that would run code says how to let it.
        code = isinstance(error, pickle.UnpicklingError)
        why = "it holds more than tensors and numbers" if code else f"{error}".partition("\n")[0][:300]
        raise ValueError(
            f"train: {path} is damaged: {why or type(error).__name__}; "
            "put a whole one in its place, or remove it to begin again"
        ) from error
    if other:
        raise ValueError(
            f"train: {path} is of another run: {other}; go on with what it began with, or give another folder as out"
        )
    with torch.no_grad():
        for name, p in trained(state.task).items():
            p.copy_(saved["model"][name])
    # Copies: the file is mapped. But for the rate, the groups are those of the recipe, which is the same.
    moments = {i: {k: v.clone() for k, v in of.items()} for i, of in saved["optimizer"]["state"].items()}
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})
    for group, of in zip(state.optimizer.param_groups, saved["optimizer"]["param_groups"]):
        group["lr"] = of["lr"]
    state.scaler.load_state_dict(saved["scaler"])
    generator = saved["generators"][ranks.rank]
    torch.set_rng_state(generator["cpu"].clone())
    if ranks.device.type == "cuda":
        torch.cuda.set_rng_state(generator["cuda"].clone(), ranks.device)
    return replace(state, **{k: saved[k] for k in ("step", "epoch", "position", "broken", "best")})


def _digests(task: Task, data: Dataset, held_out: Dataset | None) -> dict[str, str | None]:
    own = trained(task)
    weights = {name: value for name, value in task.state_dict().items() if isinstance(value, Tensor)}
    frozen = {name: value for name, value in weights.items() if name not in own} | task.outside()

    def rows(data: Dataset | None) -> str | None:
        return data.digest()[:DIGITS] if hasattr(data, "digest") else None

    return {
        "start weights": digest(own)[:DIGITS], "frozen weights": digest(frozen)[:DIGITS],
        "content of rows": rows(data), "content of held-out rows": rows(held_out),
    }  # fmt: skip


def _equal(saved: object, now: object) -> bool:
    """Whether a value of a file is one that was made here; takes no longer than the latter is large."""
    if isinstance(now, dict):
        return isinstance(saved, dict) and saved.keys() == now.keys() and all(_equal(saved[k], now[k]) for k in now)
    if isinstance(now, (list, tuple)):
        return isinstance(saved, (list, tuple)) and len(saved) == len(now) and all(map(_equal, saved, now))
    return isinstance(saved, (str, int, float, type(None))) and saved == now


def _shown(value: object) -> str:
    """Short, whatever it is."""
    return value if isinstance(value, str) and len(value) < 80 else reprlib.repr(value)


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _content(path: Path) -> dict:
    """What the file holds, as tensors of the mapped file: sizes that it claims take no memory."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        size = path.stat().st_size
        # Of stored entries torch maps the bytes; packed ones could unfold to any size.
        stored = all(e.compress_type == zipfile.ZIP_STORED and e.file_size == e.compress_size for e in entries)
        _need(stored and sum(e.file_size for e in entries) <= size, "its entries are not those of a checkpoint")
        bad = archive.testzip()
        _need(bad is None, f"the checksum of its entry {bad} is wrong")
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    _need(isinstance(saved, dict), f"it holds no dict but {type(saved).__name__}")
    return saved


def _check(saved: dict, state: State, recipe: Recipe, ranks: Ranks, batches: int) -> None:
    """Raise ValueError where a value cannot be one of this run."""
    _check_progress(saved, recipe, batches)
    own = trained(state.task)
    model = saved.get("model")
    _need(isinstance(model, dict) and model.keys() == own.keys(), "it is of a model with other trained parameters")
    for name, p in own.items():
        _need(_like(model[name], p), f"{name} must be {tuple(p.shape)} {p.dtype}, got {_described(model[name])}")
    _check_moments(saved.get("optimizer"), state.optimizer, saved["step"])
    _check_scaler(saved.get("scaler"), state.scaler.state_dict())
    generators = saved.get("generators")
    _need(
        isinstance(generators, list) and len(generators) == ranks.world,
        f"it must have a generator for each of {ranks.world} processes",
    )
    for own_generator, saved_generator in zip([_generators(ranks)] * ranks.world, generators):
        for device, want in own_generator.items():
            value = saved_generator.get(device) if isinstance(saved_generator, dict) else None
            _need(_like(value, want), f"the {device} generator must be {len(want)} bytes, got {_described(value)}")
        torch.Generator().set_state(saved_generator["cpu"].clone())  # refuses what is no state


def _check_progress(saved: dict, recipe: Recipe, batches: int) -> None:
    numbers = {name: saved.get(name) for name in ("step", "epoch", "position")}
    _need(all(type(n) is int and n >= 0 for n in numbers.values()), f"it counts {_shown(numbers)}")
    step, epoch, position = numbers.values()
    groups = -(-batches // recipe.accumulation)  # steps of an epoch, but for those in which nothing could be read
    whole_group = position % recipe.accumulation == 0 or position == batches
    within = epoch < recipe.epochs and position <= batches and whole_group or (epoch, position) == (recipe.epochs, 0)
    _need(
        within and step <= epoch * groups + -(-position // recipe.accumulation),
        f"there is no step {step} at batch {position} of {batches} in epoch {epoch} of {recipe.epochs}",
    )
    best, broken = saved.get("best", ""), saved.get("broken")
    _need(best is None or _is_finite(best), f"its best loss is {_shown(best)}")
    texts = isinstance(broken, dict) and all(isinstance(text, str) for item in broken.items() for text in item)
    _need(texts, "what could not be read must be named by texts")


def _check_moments(saved: object, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """AdamW's, of the parameters that have had a gradient."""
    moments = saved.get("state") if isinstance(saved, dict) else None
    _need(isinstance(moments, dict), "it has no state of the optimizer")
    groups, own = saved.get("param_groups"), optimizer.param_groups
    rates = [of.get("lr") if isinstance(of, dict) else None for of in groups] if isinstance(groups, list) else []
    _need(len(rates) == len(own) and all(map(_is_finite, rates)), f"it must have learning rates of {len(own)} groups")
    numbered = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    for i, of in moments.items():
        _need(type(i) is int and i in numbered, f"the optimizer has no parameter {_shown(i)}")
        want = {"step": torch.tensor(0.0), "exp_avg": numbered[i], "exp_avg_sq": numbered[i]}
        _need(isinstance(of, dict) and of.keys() == want.keys(), f"parameter {i} must have {', '.join(want)}")
        for name, value in of.items():
            _need(_like(value, want[name]), f"{name} of parameter {i} is {_described(value)}")
        _need(0 < float(of["step"]) <= steps, f"parameter {i} has taken {float(of['step'])} steps of {steps}")


def _check_scaler(saved: object, own: dict) -> None:
    _need(isinstance(saved, dict) and saved.keys() == own.keys(), f"the scaler must have {', '.join(own) or 'nothing'}")
    for name, value in saved.items():
        _need(_is_finite(value), f"the scaler's {name} is {_shown(value)}")
        if name == "scale":
            _need(value > 0, f"the scaler's scale is {value}")
        elif name == "_growth_tracker":
            _need(type(value) is int and 0 <= value < own["growth_interval"], f"the scaler's {name} is {value}")
        else:
            _need(value == own[name], f"the scaler's {name} is {value} (now {own[name]})")


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def _like(value: object, want: Tensor) -> bool:
    """It is a plain tensor with the shape and dtype of another one."""
    plain = type(value) is Tensor and value.layout == torch.strided and value.device.type == "cpu"
    return plain and (value.shape, value.dtype) == (want.shape, want.dtype)


def _described(value: object) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _generators(ranks: Ranks) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return states
