"""The linear map from BT-Adapter's tokens to the language model's, of the published instruction-tuned files."""

import re

import torch
from torch import nn

from pyvidx.weights.keys import check_plain, groups, without_wrappers
from pyvidx.weights.place import assign
from pyvidx.weights.state import Source, state_of

NAME = re.compile(r"mm_projector\.(.+)")


def load_projector(source: Source) -> nn.Linear:
    """The projector of a chat model: model.mm_projector.weight [4096, 1024] and .bias, whatever else the file holds.

        projector = load_projector("sft_mm_projector.bin")
        tokens = projector(model(pixels).tokens)  # [B, 1 + P, C] -> [B, 1 + P, llm_width]

    Args:
        source: file, folder, state dict or module: mm_projector.bin, or a whole chat model's.

    Returns:
        nn.Linear(C, llm_width) in eval mode, with the dtype of the file, frozen.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, as a truncated download, or holds no linear projector.
    """
    try:
        state = state_of(source)
    except ValueError as error:
        raise ValueError(
            f"{error}; a whole sft_mm_projector.bin (1024 to 4096, float32) is longer than 16,795,524 bytes: a copy of "
            "16,777,216 is cut, get the file again"
        ) from error
    names = without_wrappers(list(state), lambda name: NAME.fullmatch(name) is not None)
    found = {m[1]: value for name, value in zip(names, state.values()) if (m := NAME.fullmatch(name))}
    if {*found} != {"weight", "bias"}:
        raise ValueError(
            "projector: there must be mm_projector.weight and mm_projector.bias, of one linear map, got "
            f"{', '.join(groups(state)) or 'nothing'}"
        )
    check_plain(found, {"weight": 2})
    with torch.device("meta"):
        linear = nn.Linear(*reversed(found["weight"].shape))
    assign(linear, found, "projector")
    return linear.requires_grad_(False).eval()
