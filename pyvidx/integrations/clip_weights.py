"""A CLIPVision from the weights of a host library's CLIP."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pyvidx.backbones.clip import CLIPVision, CLIPVisionConfig
from pyvidx.integrations.keys import rename


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
