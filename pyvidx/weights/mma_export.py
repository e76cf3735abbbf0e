"""A pretrained BT-Adapter under the names of the official pretraining file (mma): the way back of keys.rename."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from pyvidx.models.pretraining import Pretraining
from pyvidx.weights.keys import THIRDS

# Ours -> theirs, the first that fits; what follows is kept.
NAMES = (
    (r"model\.tower\.class_token$", "backbone.class_embedding"),
    (r"model\.tower\.patch$", "backbone.patch_embedding.weight"),
    (r"model\.tower\.position$", "backbone.position_embedding.weight"),
    (r"model\.tower\.norm_pre\.", "backbone.pre_layrnorm."),
    (r"model\.tower\.norm_post\.", "backbone.post_layernorm."),
    (r"model\.tower\.projection\.", "backbone.visual_projection."),
    (r"model\.tower\.blocks\.(\d+)\.", r"backbone.layers.\1."),
    (r"model\.temporal\.branch\.spatial\.(\d+)\.", r"backbone.btadapter_S_layers.\1."),
    (r"model\.temporal\.branch\.temporal\.(\d+)\.", r"backbone.btadapter_T_layers.\1."),
    (r"model\.temporal\.branch\.time$", "backbone.btadapter_time_embed.weight"),
    (r"model\.temporal\.branch\.seed$", "backbone.btadapter_cls_token"),
    (r"model\.temporal\.branch\.gate$", "backbone.balance2"),
    (r"model\.temporal\.output_gate$", "backbone.balance1"),
    (r"text\.token\.", "text_backbone.text_model.embeddings.token_embedding."),
    (r"text\.position$", "text_backbone.text_model.embeddings.position_embedding.weight"),
    (r"text\.norm\.", "text_backbone.text_model.final_layer_norm."),
    (r"text\.projection\.", "text_backbone.text_projection."),
    (r"text\.blocks\.(\d+)\.", r"text_backbone.text_model.encoder.layers.\1."),
    (r"head\.", "extra_proj."),
)
INNER = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "norm": "layer_norm1",  # of a temporal layer
    "out": "self_attn.out_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "fc": "temporal_fc",
}


def export_mma(step: Pretraining) -> dict[str, Tensor]:
    """Copies of all weights, text tower and head included, as the official code saves them; read by
    pyvidx.weights.bt_adapter.load_official and pyvidx.weights.text_towers.text_tower."""
    return export_names(dict(step.named_parameters()))


def export_names(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies under the official names, of "model.*", a whole BTAdapter's, "text.*", its text tower's, and "head.*"."""
    weights = {}
    for name, p in parameters.items():
        value = p.detach().clone()
        if name == "model.temporal.branch.seed":
            value = value.view(1, 1, -1)
        theirs, inner = _renamed(name)
        if inner.startswith("qkv."):
            for third, part in zip(THIRDS, value.chunk(3)):
                weights[f"{theirs}self_attn.{third}_proj.{inner.removeprefix('qkv.')}"] = part.clone()
        else:
            stem, dot, leaf = inner.rpartition(".")
            in_layer = re.search(r"layers\.\d+\.$", theirs)
            weights[theirs + (INNER[stem] if in_layer else stem) + dot + leaf] = value
    return weights


def has_official_names(step: Pretraining) -> bool:
    """Whether `export_mma` has a name for every weight."""
    return all(_official(name) is not None for name, _ in step.named_parameters())


def load_head(step: Pretraining, state: dict[str, Tensor]) -> bool:
    """Fill the head of the token loss from the official names; False: they are not there."""
    head = {key.removeprefix("extra_proj."): value for key, value in state.items() if key.startswith("extra_proj.")}
    if head and step.head is not None:
        with torch.no_grad():
            step.head.load_state_dict(head)
    return bool(head and step.head)


def _renamed(name: str) -> tuple[str, str]:
    """The official name up to where ours goes on, and the rest."""
    if (found := _official(name)) is None:
        raise ValueError(f"export_mma: {name} has no official name")
    return found


def _official(name: str) -> tuple[str, str] | None:
    for ours, theirs in NAMES:
        if match := re.match(ours, name):
            return match.expand(theirs), name[match.end() :]
    return None
