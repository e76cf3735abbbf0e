"""Renamed weights into the parameters of a model, all or nothing, with a report of every key."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyvidx.models.fold import Foldable
from pyvidx.weights.keys import Renamed, check_plain, different, groups


class MissingWeights(ValueError):
    """No file fills a parameter that the model cannot be without."""


@dataclass
class Report:
    """What became of every key and every parameter. print() it.

    Attributes:
        loaded: parameters filled.
        missing: parameters that nothing filled and that were allowed to stay as they were.
        left_out: known keys without a place in a video tower (text tower, training heads).
        unused: keys understood, but not part of this model (e.g. layers that part="tokens" does not have).
        unexpected: keys that are not understood.
        reshaped: (parameter, shape in the file, shape here).
        replaced: parameters that a later source took over from an earlier one.
        assumed: parameters that no file holds and that have a known value all the same -> that value, in words.
        origin: parameter filled -> the keys it was made of.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[tuple[str, tuple[Any, ...], tuple[Any, ...]]] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    assumed: dict[str, str] = field(default_factory=dict)
    origin: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} parameters"]
        for name in ("missing", "unexpected", "unused", "left_out", "replaced"):
            keys = getattr(self, name)
            if keys:
                lines.append(f"{name} {len(keys)}: {', '.join(groups(keys, len(keys)))}")
        lines += [f"assumed {name}: {value}" for name, value in self.assumed.items()]
        lines += [f"reshaped {name}: {before} -> {after}" for name, before, after in self.reshaped]
        return "\n".join(lines)


def assign(module: nn.Module, weights: Mapping[str, Tensor], what: str, unexpected: Sequence[str] = ()) -> None:
    """Give a module on the meta device copies of these weights, with their dtypes: exactly the ones it has.

    Raises:
        ValueError: a weight is missing, not understood (as all of `unexpected`) or of another shape.
    """
    own = module.state_dict().keys()
    missing, unknown = sorted(own - weights.keys()), [*sorted(weights.keys() - own), *unexpected]
    if missing or unknown:
        raise (MissingWeights if missing else ValueError)(
            f"{what}: missing {missing[:8]}, not understood {unknown[:8]}"
        )
    if wrong := different(module, weights):
        raise ValueError(f"{what}: shapes differ: {wrong}")
    check_plain(weights, {})
    copies = {name: value.detach().clone().contiguous() for name, value in weights.items()}
    module.load_state_dict(copies, assign=True)


def place(
    model: Foldable,
    tables: Sequence[Renamed],
    allow_missing: Sequence[str] = (),
    assumed: Mapping[str, str] | None = None,
) -> Report:
    """Copy renamed weights into the parameters of these names, later tables over earlier ones, all or nothing.

    The model is in eval mode and not `is_random` afterwards. allow_missing, Raises: as in load_weights of
    pyvidx.weights.bt_adapter. assumed: what the model's own values are of parameters that may be missing, see Report.
    """
    if model.folded:
        raise RuntimeError("checkpoint: a folded copy does not take weights; load the model and fold again")
    report, found = match(model, tables, allow_missing, assumed)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in found.items():
            own[name].copy_(value)
    model.is_random = False
    model.eval()
    return report


def match(
    model: nn.Module,
    tables: Sequence[Renamed],
    allow_missing: Sequence[str] = (),
    assumed: Mapping[str, str] | None = None,
) -> tuple[Report, dict[str, Tensor]]:
    """The report of `place` and which weight each parameter would get; the model is only looked at."""
    report, found = Report(), {}
    own = dict(model.named_parameters())
    for table in tables:
        report.left_out += table.left_out
        report.unexpected += table.unexpected
        report.reshaped += table.reshaped
        for name, value in table.weights.items():
            if name not in own:
                report.unused += table.origin[name]
            else:
                report.replaced += [name] if name in found else []
                found[name], report.origin[name] = value, table.origin[name]
    missing = sorted(own.keys() - found.keys())
    report.assumed = {name: assumed[name] for name in missing if assumed and name in assumed}
    refused = [
        name
        for name in missing
        if name not in report.assumed and not any(fnmatch.fnmatchcase(name, p) for p in allow_missing)
    ]
    idle = [p for p in allow_missing if not fnmatch.filter(missing, p)]
    if wrong := different(model, found):
        raise ValueError(f"checkpoint: shapes differ: {wrong}")
    check_plain(found, {})
    if refused:
        raise MissingWeights(
            f"checkpoint: nothing fills {len(refused)} parameters: {', '.join(groups(refused))}; name "
            f"them in allow_missing to leave them as they are\n{report}"
        )
    if idle:
        raise ValueError(f"checkpoint: allow_missing has patterns that match no missing parameter: {', '.join(idle)}")
    report.loaded, report.missing = sorted(found), missing
    return report, found
