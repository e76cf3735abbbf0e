"""A CLIPText from the weights of transformers' CLIP, open_clip or the official BT-Adapter pretraining file."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from pyvidx.backbones.clip_text import CLIPText, CLIPTextConfig
from pyvidx.integrations.keys import THIRDS, locate

TOP = {
    "embeddings.token_embedding.weight": "token.weight",
    "token_embedding.weight": "token.weight",
    "embeddings.position_embedding.weight": "position",
    "positional_embedding": "position",
    "final_layer_norm.weight": "norm.weight",
    "final_layer_norm.bias": "norm.bias",
    "ln_final.weight": "norm.weight",
    "ln_final.bias": "norm.bias",
    "text_projection.weight": "projection.weight",
    "text_projection": "projection.weight",
}
PREFIX = re.compile(r"^(module\.|text_backbone\.|text_model\.|text\.)+")
NOT_TEXT = re.compile(r"(backbone|vision_model|visual|visual_projection|extra_proj)\.|logit_(scale|bias)$")
BUFFERS = re.compile(r"(.*\.)?position_ids$|attn_mask$")


def clip_text(
    state: Mapping[str, Tensor], *, heads: int | None = None, hidden_act: str = "quick_gelu", eps: float = 1e-5
) -> CLIPText:
    """CLIPText with a copy of these weights, sizes inferred; frozen and in eval mode.

    Args:
        state: a state dict; the image tower and the head of a whole model are passed over.
        heads: default width / 64, as in every published CLIP.
        hidden_act, eps: what weights do not tell; "gelu" for LAION's and DataComp's.

    Raises:
        ValueError: a weight is missing, not understood or there twice, or the width does not give the heads.
        RuntimeError: a shape differs.
    """
    weights, thirds = {}, {}
    for key, value in state.items():
        name = key.removeprefix("module.")
        if NOT_TEXT.match(name) or BUFFERS.match(name):
            continue
        name = PREFIX.sub("", name)
        target, third = TOP.get(name), None
        if target is None and (layer := re.search(r"(?:^|\.)((?:layers|resblocks)\.\d+\..+)", name)):
            target, third = locate(layer[1])
            target = target and target.removeprefix("backbone.")
        if target is None:
            raise ValueError(f"CLIP text weights: {key} is not understood")
        if name == "text_projection":
            value = value.T  # open_clip multiplies from the right
        slot, index = (weights, target) if third is None else (thirds.setdefault(target, {}), third)
        if index in slot:
            raise ValueError(f"CLIP text weights: {key} and another key both mean {target}")
        slot[index] = value
    for target, parts in thirds.items():
        if len(parts) != 3:
            raise ValueError(f"CLIP text weights: {target} needs q, k and v, got only {', '.join(sorted(parts))}")
        weights[target] = torch.cat([parts[third] for third in THIRDS])
    needed = ("token.weight", "position", "projection.weight", "blocks.0.fc1.weight")
    if absent := [name for name in needed if name not in weights]:
        raise ValueError(f"CLIP text weights: no sizes without {', '.join(absent)}")
    vocab, width = weights["token.weight"].shape
    if heads is None and width % 64:
        raise ValueError(f"CLIP text weights: width {width} is not a multiple of 64, so pass heads=")
    config = CLIPTextConfig(
        vocab=vocab,
        context=len(weights["position"]),
        width=width,
        heads=heads or width // 64,
        layers=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        mlp_width=len(weights["blocks.0.fc1.weight"]),
        embed_dim=len(weights["projection.weight"]),
        hidden_act=hidden_act,
        eps=eps,
    )
    with torch.device("meta"):
        tower = CLIPText(config)
    copies = {name: value.detach().clone().contiguous() for name, value in weights.items()}
    missing, unexpected = tower.load_state_dict(copies, strict=False, assign=True)
    if missing or unexpected:
        raise ValueError(f"CLIP text weights: missing {missing}, not understood {unexpected}")
    return tower.requires_grad_(False).eval()
