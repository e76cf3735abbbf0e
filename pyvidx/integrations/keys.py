"""Names of published weights -> names of pyvidx: the official BT-Adapter files, transformers' CLIP and open_clip."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Wrappers that training code puts around the tower. Stripped wherever they lead a name, in any nesting.
PREFIXES = ("module.", "model.vision_tower.", "vision_tower.", "backbone.", "vision_model.", "visual.")

# Parts of a published file that a video tower has no place for: text towers, training heads, bookkeeping.
LEFT_OUT = re.compile(
    r"(text_backbone|text_model|text|extra_proj|loss|mm_projector)\.|text_projection(\.|$)|logit_scale$"
    r"|logit_bias$|(.*\.)?position_ids$"
)
OPEN_CLIP_TEXT = re.compile(r"(transformer|token_embedding|ln_final)\.|positional_embedding$|attn_mask$")

BLOCK = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "out",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.out_proj": "out",
    "mlp.c_fc": "fc1",
    "mlp.c_proj": "fc2",
}
TEMPORAL = {"layer_norm1": "norm", "self_attn.out_proj": "out", "temporal_fc": "fc"}
TOP = {
    "class_embedding": "backbone.class_token",
    "patch_embedding.weight": "backbone.patch",
    "conv1.weight": "backbone.patch",
    "position_embedding.weight": "backbone.position",
    "positional_embedding": "backbone.position",
    "pre_layrnorm": "backbone.norm_pre",
    "ln_pre": "backbone.norm_pre",
    "post_layernorm": "backbone.norm_post",
    "ln_post": "backbone.norm_post",
    "visual_projection": "backbone.projection",
    "proj": "backbone.projection.weight",
    "btadapter_time_embed.weight": "branch.time",
    "btadapter_cls_token": "branch.seed",
    "balance1": "output_gate",
    "balance2": "branch.gate",
}
LAYER = re.compile(r"(layers|resblocks|btadapter_S_layers|btadapter_T_layers)\.(\d+)\.(.+)")
THIRDS = {"q": 0, "k": 1, "v": 2}


@dataclass
class Renamed:
    """Weights under pyvidx's names.

    Attributes:
        weights: name -> tensor; q, k and v stacked, open_clip's projection transposed.
        origin: name -> the keys it was made of.
        left_out: known keys that a video tower has no place for.
        unexpected: keys that mean nothing here.
        reshaped: (name, shape in the source, shape here).
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    origin: dict[str, list[str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[tuple[str, tuple, tuple]] = field(default_factory=list)


def rename(state: Mapping[str, Tensor]) -> Renamed:
    """Rename a state dict of any known source.

    Layer indices are kept as they are, see pyvidx.integrations.checkpoints for files that count from a later layer.

    Raises:
        ValueError: q, k or v of a layer is missing, or two keys mean the same weight.
    """
    result, thirds = Renamed(), {}
    has_visual = any(key.removeprefix("module.").startswith("visual.") for key in state)
    stan = not any("btadapter_cls_token" in key or "timesFPN_cls_token" in key for key in state) and any(
        "STAN_" in key for key in state
    )
    for key, value in state.items():
        name = key.removeprefix("module.")
        if LEFT_OUT.match(name) or (has_visual and OPEN_CLIP_TEXT.match(name)):
            result.left_out.append(key)
            continue
        name = _strip(name)
        target, third = locate(name)
        if target is None:
            (result.left_out if LEFT_OUT.match(name) else result.unexpected).append(key)
        elif third is None:
            add(result, target, _shaped(result, name, target, value), key)
            if stan and target == "backbone.class_token":  # STAN starts the branch's class token from CLIP's
                add(result, "branch.seed", value, key)
        else:
            if third in thirds.setdefault(target, {}):
                raise ValueError(f"checkpoint: {key} and another key both mean {third} of {target}")
            thirds[target][third] = (value, key)
    for target, parts in thirds.items():
        if len(parts) != 3:
            raise ValueError(f"checkpoint: {target} needs q, k and v, got only {', '.join(sorted(parts))}")
        ordered = [parts[third] for third in THIRDS]
        add(result, target, torch.cat([value for value, _ in ordered]), *(key for _, key in ordered))
    return result


def _strip(name: str) -> str:
    """Without wrappers and the folders of transformers' CLIP, old spellings renewed."""
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    name = name.removeprefix("embeddings.").removeprefix("encoder.").removeprefix("transformer.")
    return name.replace("timesFPN", "btadapter").replace("STAN_", "btadapter_")


def locate(name: str) -> tuple[str | None, str | None]:
    """pyvidx's name of a key without wrappers and, for a third of a packed weight, which: "...qkv.bias", "q"."""
    if name in TOP:
        return TOP[name], None
    stem, _, leaf = name.rpartition(".")
    if stem in TOP and leaf in ("weight", "bias"):
        return f"{TOP[stem]}.{leaf}", None
    match = LAYER.fullmatch(name)
    if not match:
        return None, None
    kind, index, inner = match.groups()
    base = {"btadapter_S_layers": "branch.spatial", "btadapter_T_layers": "branch.temporal"}.get(
        kind, "backbone.blocks"
    )
    packed = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)|attn\.in_proj_(weight|bias)", inner)
    if packed:
        third, leaf, fused_leaf = packed.groups()
        return f"{base}.{index}.qkv.{leaf or fused_leaf}", third
    stem, _, leaf = inner.rpartition(".")
    inner = (TEMPORAL if kind == "btadapter_T_layers" else BLOCK).get(stem)
    return (f"{base}.{index}.{inner}.{leaf}", None) if inner and leaf in ("weight", "bias") else (None, None)


def _shaped(result: Renamed, name: str, target: str, value: Tensor) -> Tensor:
    before = tuple(value.shape)
    if target == "branch.seed":
        value = value.reshape(-1)  # stored as [1, 1, C]
    elif name == "proj":
        value = value.T  # open_clip multiplies from the right
    if tuple(value.shape) != before or name == "proj":
        result.reshaped.append((target, before, tuple(value.shape)))
    return value


def add(result: Renamed, target: str, value: Tensor, *keys: str) -> None:
    """Enter a weight, made of these keys.

    Raises:
        ValueError: it is there already.
    """
    if target in result.weights:
        raise ValueError(f"checkpoint: {', '.join(keys)} and {', '.join(result.origin[target])} both mean {target}")
    result.weights[target] = value
    result.origin[target] = list(keys)
