"""What `generate` is told, and what it returns: a prompt and, behind it, what the model made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyvidx.ops._library import require


def option(model: nn.Module, given: Mapping[str, Any], name: str) -> Any:
    """What generate would take for an option: of its call, of a generation_config there, or of the model's; or None."""
    configs = (given.get("generation_config"), getattr(model, "generation_config", None))
    found = (given.get(name), *(getattr(config, name, None) for config in configs))
    return next((x for x in found if x is not None), None)


def check_one(op: str, model: nn.Module, given: Mapping[str, Any]) -> None:
    """Raise ValueError, before the model runs, where generate would return several sequences."""
    several = option(model, given, "num_return_sequences") or 1
    require(several == 1, f"{op}: generate must return one sequence, got num_return_sequences={several}")


def answers(sequences: Tensor, prompts: Tensor) -> Tensor:
    """What was made, [B * n, new], of sequences [B * n, length] of n answers to each of the prompts [B, L]. Models that
    return no prompt (those that generate from embeddings) are told by what comes first."""
    B, L = prompts.shape
    again = prompts.repeat_interleave(len(sequences) // B, 0)
    behind = sequences.shape[1] >= L and torch.equal(sequences[:, :L], again.to(sequences))
    return sequences[:, L:] if behind else sequences


def readdressed(sequences: Tensor, prompts: Tensor, given: Tensor) -> Tensor:
    """Sequences behind the prompts [B, L] that were given instead of those that were used."""
    made = answers(sequences, prompts)
    if made.shape == sequences.shape:
        return sequences
    again = given.repeat_interleave(len(sequences) // len(given), 0)
    return torch.cat([again.to(sequences), made], dim=1)
