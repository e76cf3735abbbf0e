"""A CLIPVision from the weights of a host library's CLIP."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyvidx.backbones.clip import CLIPVision, CLIPVisionConfig
from pyvidx.integrations.keys import rename


def clip_vision(
    state: Mapping[str, Tensor], *, heads: int | None = None, hidden_act: str = "quick_gelu", eps: float = 1e-5
) -> CLIPVision:
    """CLIPVision with a copy of these weights, sizes inferred; in eval mode.

    Args:
        state: a state dict in any naming that keys.rename knows; the text tower of a whole model is passed over.
        heads: default width / 64, as in every published CLIP.
        hidden_act, eps: what weights do not tell; "gelu" for LAION's and DataComp's.

    Raises:
        ValueError: a weight is missing or not understood, or the width does not give the heads.
        RuntimeError: a shape differs.
    """
    names = {name.removeprefix("backbone."): value for name, value in rename(state).weights.items()}
    if absent := [name for name in ("position", "patch", "blocks.0.fc1.weight") if name not in names]:
        raise ValueError(f"CLIP weights: no sizes without {', '.join(absent)}")
    (tokens, width), patch = names["position"].shape, names["patch"].shape[-1]
    if heads is None and width % 64:
        raise ValueError(f"CLIP weights: width {width} is not a multiple of 64, so pass heads=")
    projection = names.get("projection.weight")
    config = CLIPVisionConfig(
        image_size=math.isqrt(tokens - 1) * patch,
        patch_size=patch,
        width=width,
        heads=heads or width // 64,
        layers=1 + max(int(name.split(".")[1]) for name in names if name.startswith("blocks.")),
        mlp_width=len(names["blocks.0.fc1.weight"]),
        embed_dim=None if projection is None else len(projection),
        hidden_act=hidden_act,
        eps=eps,
    )
    return fill(config, state)


def fill(config: CLIPVisionConfig, state: Mapping[str, Tensor]) -> CLIPVision:
    """CLIPVision of these sizes with a copy of these weights, in any naming that keys.rename knows; in eval mode.

    Raises:
        ValueError: a weight is missing or not understood.
        RuntimeError: a shape differs.
    """
    renamed = rename(state)
    weights = {
        name.removeprefix("backbone."): value.detach().clone().contiguous() for name, value in renamed.weights.items()
    }
    with torch.device("meta"):
        tower = CLIPVision(config)
    missing, unexpected = tower.load_state_dict(weights, strict=False, assign=True)
    if missing or unexpected or renamed.unexpected:
        raise ValueError(f"CLIP weights: missing {missing}, not understood {[*unexpected, *renamed.unexpected]}")
    return tower.eval()
