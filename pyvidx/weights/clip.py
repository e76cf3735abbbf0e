"""A CLIPVision from the weights of a host library's CLIP."""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyvidx.backbones.clip import CLIPVision, CLIPVisionConfig
from pyvidx.weights.keys import check_plain, count_layers, groups, rename
from pyvidx.weights.place import assign
from pyvidx.weights.state import Source, state_of

AXES = {"position": 2, "patch": 4, "blocks.0.fc1.weight": 2, "projection.weight": 2}


class Told(NamedTuple):
    """What the weights of a CLIP do not tell."""

    heads: int
    hidden_act: str
    eps: float


def told_by(folder: str | Path) -> Told | None:
    """What the config.json of transformers or the open_clip_config.json in a folder tells; None: there is neither.

    Raises:
        ValueError: it is no such file.
    """
    try:
        if (path := Path(folder) / "config.json").is_file():
            values = json.loads(path.read_text(encoding="utf-8"))
            kind = values.get("model_type", "clip")
            if kind not in ("clip", "clip_vision_model"):
                return None
            values = values["vision_config"] if kind == "clip" else values
            # transformers leaves out what is as in its own defaults.
            names = {"num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
            return Told(*(values.get(name, default) for name, default in names.items()))
        if (path := Path(folder) / "open_clip_config.json").is_file():
            values = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
            heads = values["vision_cfg"]["width"] // values["vision_cfg"].get("head_width", 64)
            return Told(heads, "quick_gelu" if values.get("quick_gelu") else "gelu", 1e-5)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError) as error:
        raise ValueError(f"CLIP weights: {path} does not describe a CLIP ({type(error).__name__}: {error})") from error
    return None


def activation(hidden_act: str | None, stacklevel: int = 3) -> str:
    """hidden_act, or OpenAI's with a warning where it was not told: a wrong one gives wrong numbers and no error."""
    if hidden_act is None:
        warnings.warn(
            "CLIP weights do not tell their activation, so OpenAI's quick_gelu is taken: pass hidden_act='gelu' for "
            "LAION's and DataComp's, or hidden_act='quick_gelu' to say that it is right",
            stacklevel=stacklevel,
        )
    return hidden_act or "quick_gelu"


def clip_vision(
    state: Source, *, heads: int | None = None, hidden_act: str | None = None, eps: float = 1e-5
) -> CLIPVision:
    """CLIPVision with a copy of these weights, sizes inferred; in eval mode.

    Args:
        state: file, folder, module or state dict, in any naming that keys.rename knows; the text tower of a whole
            model is passed over.
        heads: default width / 64, as in every published CLIP.
        hidden_act, eps: what weights do not tell; "gelu" for LAION's and DataComp's. None: OpenAI's "quick_gelu", with
            a warning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, a weight is missing or not understood, a shape differs, or the width does not
            give the heads.
    """
    state = state_of(state)
    names = {name.removeprefix("tower."): value for name, value in rename(state).weights.items()}
    if absent := [name for name in ("position", "patch", "blocks.0.fc1.weight") if name not in names]:
        raise ValueError(f"CLIP weights: no sizes without {', '.join(absent)}; the keys are {', '.join(groups(state))}")
    check_plain(names, AXES)
    (tokens, width), patch = names["position"].shape, names["patch"].shape[-1]
    if heads is None and width % 64:
        raise ValueError(f"CLIP weights: width {width} is not a multiple of 64, so pass heads=")
    projection = names.get("projection.weight")
    config = CLIPVisionConfig(
        image_size=math.isqrt(tokens - 1) * patch,
        patch_size=patch,
        width=width,
        heads=heads or width // 64,
        layers=count_layers(names, "blocks."),
        mlp_width=len(names["blocks.0.fc1.weight"]),
        embed_dim=None if projection is None else len(projection),
        hidden_act=activation(hidden_act),
        eps=eps,
    )
    return fill(config, state)


def fill(config: CLIPVisionConfig, state: Mapping[str, Tensor]) -> CLIPVision:
    """CLIPVision of these sizes with a copy of these weights, in any naming that keys.rename knows; in eval mode.

    Raises:
        ValueError: a weight is missing or not understood, or a shape differs.
    """
    renamed = rename(state)
    with torch.device("meta"):
        tower = CLIPVision(config)
    weights = {name.removeprefix("tower."): value for name, value in renamed.weights.items()}
    assign(tower, weights, "CLIP weights", renamed.unexpected)
    return tower.eval()
