"""Prompts that a processor took one at a time, as one batch: processors make none of videos of unequal lengths."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyvidx.hosts.language.tokens import ALONG, padded
from pyvidx.ops._library import require

QUESTIONS = {"qformer_input_ids": 0, "qformer_attention_mask": 0}  # InstructBLIP's words for its Q-Former, and padding


def together(several: Sequence[Mapping[str, Any]], pad: int = 0, side: str = "left") -> Mapping[str, Any]:
    """One batch for `compress`.

        each = [processor(text=text, videos=[video], return_tensors="pt") for text, video in questions]
        inputs = compress(model, together(each), "merge", capacity=16)

    Args:
        several: of a processor with return_tensors="pt", a prompt or more each.
        pad: the id that fills up shorter prompts; the attention mask hides it.
        side: "left", as generate needs it, or "right".

    Returns:
        A value of the type of the first: rows and videos in order. Pixels of videos of unequal lengths, and of images
        of unequal numbers of crops, are lists, which compress takes, and the model itself does not.

    Raises:
        ValueError: there are none, or an input does not join.
    """
    require(len(several) > 0, "together: there must be at least one prompt, got none")
    require(side in ("left", "right"), f"together: side must be 'left' or 'right', got {side!r}")
    for inputs in several:
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
        fits = isinstance(ids, Tensor) and ids.dim() == 2
        require(fits, "together: each must be a mapping that holds input_ids [B, L] (return_tensors='pt')", ids)
    out, kind = {}, copy.copy(several[0])
    several = [{name: x for name, x in inputs.items() if x is not None} for inputs in several]
    several = [{"attention_mask": torch.ones_like(inputs["input_ids"])} | inputs for inputs in several]
    longest = max(inputs["input_ids"].shape[1] for inputs in several)
    for name in dict.fromkeys(name for inputs in several for name in inputs):
        found = [inputs[name] for inputs in several if name in inputs]
        if name in ALONG:
            require(len(found) == len(several), f"together: {name} must be there for all prompts or for none")
            fill = pad if name == "input_ids" else ALONG[name]
            out[name] = torch.cat([padded(x, longest, fill, side == "right") for x in found])
        elif name in QUESTIONS and all(isinstance(x, Tensor) and x.dim() == 2 for x in found):
            most = max(x.shape[1] for x in found)
            out[name] = torch.cat([padded(x, most, QUESTIONS[name], True) for x in found])
        elif all(isinstance(x, Tensor) for x in found):
            out[name] = _joined(name, found)
        else:
            require(all(isinstance(x, list | tuple) for x in found), f"together: {name} must be tensors, or lists")
            out[name] = [one for x in found for one in x]
    kind.update(out)
    return kind


def _joined(name: str, found: list[Tensor]) -> Tensor | list[Tensor]:
    if len({x.shape[1:] for x in found}) == 1:
        return torch.cat(found)
    alike = len({x.shape[2:] for x in found}) == 1 and found[0].dim() > 2
    require(alike, f"together: {name} must have one shape but for its first two sizes", *found)
    return [one for x in found for one in x]
