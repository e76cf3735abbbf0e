"""What a training run is, as data, and the numbers that follow from it: learning rates and optimizer groups."""

import dataclasses
import importlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from pyvidx.train.fields import BELOW_ONE, MANY, SMALLEST, check_choices, check_ranges, fields

# Bytes of a configuration.
LARGEST = 2**20
AMP = ("float16", "bfloat16", "none")
REDUCTIONS = ("tokens", "ranks")
SCHEDULES = ("epochs", "steps")
DECAYS = ("matrices", "all")
RANGES = {
    **dict.fromkeys(("epochs", "batch", "accumulation", "save_every"), (1, MANY)),
    **dict.fromkeys(("peak_lr", "start_lr", "min_lr", "eps", "weight_decay", "warmup_epochs"), (0.0, 1e9)),
    "warmup": (0, MANY), "cosine_epochs": (SMALLEST, 1e9), "betas": (0.0, BELOW_ONE), "clip": (SMALLEST, 1e9),
    "seed": (0, 2**62), "workers": (0, 1024),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are MA-LMM's for classification, per process on 4 of them.

    Attributes:
        epochs: E.
        batch: samples of a micro-batch of one process; an incomplete last one is left out, as in the public code.
        accumulation: micro-batches of an optimizer step. What is left of an epoch makes a smaller last step.
        schedule: "epochs" (LAVIS, MA-LMM) or "steps" (BT-Adapter), see `learning_rate`.
        peak_lr, start_lr, min_lr: of both.
        warmup: micro-batches of the warm-up of "epochs".
        warmup_epochs, cosine_epochs: of "steps".
        multipliers: of the learning rate, by a part of the parameter's name; of several the longest part counts.
        betas, eps, weight_decay: of AdamW.
        decay: what decays: "matrices", see `decays`, or "all".
        clip: largest gradient norm; None: no clipping.
        amp: "float16" (with a gradient scaler), "bfloat16" or "none".
        seed: of the order and the samples; seed + rank of what the model draws.
        reduction: "tokens": the loss of a step is the mean over all its answer tokens, whatever process and micro-
            batch they are in, so it does not depend on how many processes there are. "ranks": the mean of the means
            of micro-batches, as in the public code.
        save_every: optimizer steps between checkpoints; one is also written after every epoch.
        workers: processes that read samples ahead, per training process; 0: none.
    """

    epochs: int = 20
    batch: int = 16
    accumulation: int = 1
    schedule: str = "epochs"
    peak_lr: float = 1e-4
    start_lr: float = 1e-8
    min_lr: float = 0.0
    warmup: int = 1000
    warmup_epochs: float = 0.5
    cosine_epochs: float = 4.5
    multipliers: dict[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    decay: str = "matrices"
    clip: float | None = None
    amp: str = "float16"
    seed: int = 42
    reduction: str = "tokens"
    save_every: int = 100
    workers: int = 0

    def __post_init__(self):
        check_ranges(self, RANGES)
        check_choices(self, {"amp": AMP, "reduction": REDUCTIONS, "schedule": SCHEDULES, "decay": DECAYS})
        if min(self.multipliers.values(), default=0.0) < 0:
            raise ValueError(f"Recipe: multipliers must be at least 0, got {self.multipliers}")
        object.__setattr__(self, "betas", tuple(self.betas))

    @classmethod
    def from_dict(cls, values: dict) -> "Recipe":
        """Raises ValueError for fields that are unknown or not of their types."""
        return cls(**fields(cls, values))

    def to_dict(self) -> dict:
        return dataclasses.asdict(self) | {"betas": list(self.betas)}


def learning_rate(recipe: Recipe, epoch: int, batch: int, batches: int) -> float:
    """The rate at a micro-batch of an epoch of `batches`, epoch and batch counted from 0.

    "epochs", as LAVIS and MA-LMM have it: epoch 0 is a linear warm-up, start + (peak - start) * batch / warmup, at most
    peak, cut off by the epoch's end; then, constant over an epoch, min + (peak - min) / 2 * (1 + cos(pi * epoch / E)).
    So a data set of few batches jumps from far below the peak to it.

    "steps", as BT-Adapter has it, with p = epoch + batch / batches: linear from start at p = 0 to peak at
    p = warmup_epochs, then min + (peak - min) / 2 * (1 + cos(pi * (p - warmup_epochs) / cosine_epochs)).
    """
    low, height = recipe.min_lr, recipe.peak_lr - recipe.min_lr
    if recipe.schedule == "steps":
        p, warm = epoch + batch / batches, recipe.warmup_epochs
        if p < warm:
            return recipe.start_lr + (recipe.peak_lr - recipe.start_lr) * p / warm
        return low + height / 2 * (1 + math.cos(math.pi * min((p - warm) / recipe.cosine_epochs, 1)))
    if epoch == 0:
        return min(recipe.peak_lr, recipe.start_lr + (recipe.peak_lr - recipe.start_lr) * batch / max(recipe.warmup, 1))
    return low + height / 2 * (1 + math.cos(math.pi * epoch / recipe.epochs))


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for parameters of 2 and more axes with none of "bias", "ln", "bn" in their name."""
    return parameter.dim() >= 2 and not any(part in name for part in ("bias", "ln", "bn"))


def multiplier(name: str, recipe: Recipe) -> float:
    """Of a parameter's learning rate: that of the longest key in its name, or 1."""
    found = [key for key in recipe.multipliers if key in name]
    return recipe.multipliers[max(found, key=len)] if found else 1.0


def groups(module: nn.Module, recipe: Recipe) -> list[dict]:
    """AdamW's parameter groups, of what requires gradients: by multiplier, and with weight decay before without.

    Raises:
        ValueError: a multiplier's key is in no name.
    """
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    idle = [key for key in recipe.multipliers if not any(key in name for name, _ in trained)]
    if idle:
        raise ValueError(f"Recipe: no trained parameter has {', '.join(idle)} of multipliers in its name")
    found: dict[tuple[float, float], list] = {}
    for name, p in trained:
        decay = recipe.weight_decay if recipe.decay == "all" or decays(name, p) else 0.0
        found.setdefault((multiplier(name, recipe), -decay), []).append(p)
    return [{"params": found[key], "weight_decay": -key[1], "multiplier": key[0]} for key in sorted(found)]


def load(path: str | Path, who: str = "train") -> dict:
    """The values of a JSON or TOML file; `who` starts the text of an error.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ValueError: another suffix, or a file that does not parse or is no object.
    """
    path = Path(path)
    if path.suffix not in (".json", ".toml"):
        raise ValueError(f"{who}: a configuration must be .json or .toml, got {path}")
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{who}: a configuration must have at most {LARGEST} bytes, {path} has more")
    try:
        parse = json.loads if path.suffix == ".json" else importlib.import_module("tomllib").loads  # Python 3.11 on
        values = parse(content.decode("utf-8-sig"))
    except ModuleNotFoundError as error:
        raise ValueError(f"{who}: {path} needs Python 3.11 (tomllib); write it as .json") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{who}: {path} does not parse: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{who}: {path} must hold an object, got {type(values).__name__}")
    return values
