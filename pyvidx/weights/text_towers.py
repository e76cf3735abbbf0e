"""Text towers from the weights of transformers' CLIP and SigLIP, open_clip, or BT-Adapter's official pretraining."""

import re

import torch

from pyvidx.backbones.text import SIGLIP_TEXT_B, TextConfig, TextTower
from pyvidx.weights.keys import (
    THIRDS,
    TOWER,
    WRAPPERS,
    check_plain,
    count_layers,
    groups,
    is_counter,
    is_official,
    locate,
    stack,
    without_wrappers,
)
from pyvidx.weights.place import assign
from pyvidx.weights.state import Source, state_of
from pyvidx.weights.towers import Told, activation, completed

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
    "text_projection.bias": "projection.bias",
    "text_projection": "projection.weight",
    "head.weight": "projection.weight",
    "head.bias": "projection.bias",
}
PREFIX = re.compile(rf"^(({'|'.join(WRAPPERS)}|text_backbone|text_model|text_encoder|text)\.)+")
NOT_TEXT = re.compile(
    rf"({'|'.join(TOWER)}|visual_projection|extra_proj)\.|logit_(scale|bias)$"
    r"|(input_resolution|context_length|vocab_size)$"
)
SIGLIP = {"head.weight", "head.bias", "text_projection.bias"}  # what only its text towers have
AXES = {"token.weight": 2, "position": 2, "projection.weight": 2, "blocks.0.fc1.weight": 2}
BUFFERS = re.compile(r"(.*\.)?position_ids$|attn_mask$")


def text_tower(
    source: Source, *, heads: int | None = None, hidden_act: str | None = None, eps: float | None = None
) -> TextTower:
    """TextTower with a copy of these weights, sizes inferred; frozen and in eval mode.

    Args:
        source: file, folder, module or state dict of a CLIP or a SigLIP, known by its head; the image tower
            and the head of a whole model are passed over.
        heads: default what a config beside the weights tells, or the published: 16 of width 1152, else width / 64.
        hidden_act, eps: default what a config tells, or the published; of a CLIP that tells nothing OpenAI's
            "quick_gelu", with a warning where the weights are a CLIP's alone: LAION's and DataComp's have "gelu".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, a weight is missing, not understood or there twice, a shape differs, or the
            width does not give the heads.
    """
    told = completed(Told(heads, hidden_act, eps), source, "text")
    state, weights, thirds = state_of(source), {}, {}
    names = without_wrappers(list(state), lambda name: bool(_elsewhere(name) or _locate(name)[0]))
    for (key, value), name in zip(state.items(), names):
        if _elsewhere(name) or is_counter(value):
            continue
        target, third = _locate(name)
        if target is None:
            raise ValueError(f"CLIP text weights: {key} is not understood; the keys are {', '.join(groups(state))}")
        if PREFIX.sub("", name) == "text_projection" and value.dim() == 2:
            value = value.t()  # open_clip multiplies from the right
        slot, index = (weights, target) if third is None else (thirds.setdefault(target, {}), third)
        if index in slot:
            raise ValueError(f"CLIP text weights: {key} and another key both mean {target}")
        slot[index] = value
    for target, parts in thirds.items():
        if len(parts) != 3:
            raise ValueError(f"CLIP text weights: {target} needs q, k and v, got only {', '.join(sorted(parts))}")
        weights[target] = stack(target, [parts[third] for third in THIRDS])
    needed = ("token.weight", "position", "projection.weight", "blocks.0.fc1.weight")
    if absent := [name for name in needed if name not in weights]:
        raise ValueError(
            f"CLIP text weights: no sizes without {', '.join(absent)}; the keys are {', '.join(groups(state))}"
        )
    check_plain(weights, AXES)
    vocab, width = weights["token.weight"].shape
    siglip = not SIGLIP.isdisjoint(PREFIX.sub("", name) for name in names if not _elsewhere(name))
    hidden_act = told.hidden_act or (SIGLIP_TEXT_B.hidden_act if siglip else None)
    if hidden_act is None:
        hidden_act = "quick_gelu" if is_official(state) else activation(None)
    eps = told.eps if told.eps is not None else SIGLIP_TEXT_B.eps if siglip else 1e-5
    if told.heads is None and width % 64:
        raise ValueError(f"CLIP text weights: width {width} is not a multiple of 64, so pass heads=")
    config = TextConfig(
        vocab=vocab,
        context=len(weights["position"]),
        width=width,
        heads=told.heads if told.heads is not None else 16 if width == 1152 else width // 64,
        layers=count_layers(weights, "blocks."),
        mlp_width=len(weights["blocks.0.fc1.weight"]),
        embed_dim=len(weights["projection.weight"]),
        hidden_act=hidden_act,
        eps=eps,
        pool="last" if siglip else "end",
        projection_bias=siglip,
    )
    with torch.device("meta"):
        tower = TextTower(config)
    assign(tower, weights, "CLIP text weights")
    return tower.requires_grad_(False).eval()


def _elsewhere(name: str) -> bool:
    """Not of a text tower."""
    return bool(NOT_TEXT.match(name) or BUFFERS.match(name))


def _locate(name: str) -> tuple[str | None, str | None]:
    """The text tower's name of a key, and which third of a packed weight."""
    name = PREFIX.sub("", name)
    if name in TOP:
        return TOP[name], None
    layer = re.search(r"(?:^|\.)((?:layers|resblocks)\.\d+\..+)", name)
    target, third = locate(layer[1]) if layer else (None, None)
    return target and target.removeprefix("tower."), third
