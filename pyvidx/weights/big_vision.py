"""SigLIP's official files (.npz of big_vision, JAX's layout) under the names and in the layout of transformers."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from pyvidx.weights.keys import stack

KEY = re.compile(r"(?:params/)?(img|txt)/(.+)")
TOWERS = {"img": "vision_model.", "txt": "text_model."}
TOP = {
    "embedding": "embeddings.patch_embedding",
    "Embed_0/embedding": "embeddings.token_embedding.weight",
    "pos_embedding": "embeddings.position_embedding.weight",
    "Transformer/encoder_norm": "post_layernorm",
    "Encoder_0/encoder_norm": "final_layer_norm",
    "head": "head",
    "MAPHead_0/probe": "head.probe",
    "MAPHead_0/LayerNorm_0": "head.layernorm",
    "MAPHead_0/MlpBlock_0/Dense_0": "head.mlp.fc1",
    "MAPHead_0/MlpBlock_0/Dense_1": "head.mlp.fc2",
    "MAPHead_0/MultiHeadDotProductAttention_0/out": "head.attention.out_proj",
}
BLOCK = {
    "LayerNorm_0": "layer_norm1",
    "LayerNorm_1": "layer_norm2",
    "MlpBlock_0/Dense_0": "mlp.fc1",
    "MlpBlock_0/Dense_1": "mlp.fc2",
    "MultiHeadDotProductAttention_0/query": "self_attn.q_proj",
    "MultiHeadDotProductAttention_0/key": "self_attn.k_proj",
    "MultiHeadDotProductAttention_0/value": "self_attn.v_proj",
    "MultiHeadDotProductAttention_0/out": "self_attn.out_proj",
}
LAYER = re.compile(r"(?:Transformer|Encoder_0)/encoderblock(?:_(\d+))?/(.+)")
PARTS = ("query", "key", "value")
POOL = "MAPHead_0/MultiHeadDotProductAttention_0/"
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def is_big_vision(keys: Mapping[str, Any]) -> bool:
    """Whether they are of such a file."""
    return any(isinstance(key, str) and KEY.fullmatch(key) for key in keys)


def as_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The towers' weights under transformers' names. Keys that are not understood stay as they are.

    Raises:
        ValueError: layers or the parts of the pooling head do not have the axes of such a file.
    """
    found: dict[str, Tensor] = {}
    pools: dict[tuple[str, str], Tensor] = {}
    for key, value in state.items():
        match = KEY.fullmatch(key)
        if match is None:
            if key.removeprefix("params/") not in ("t", "b"):  # the logits' scale and bias
                found[key] = value
            continue
        kind, path = match.groups()
        if path.startswith(POOL) and (part := path.removeprefix(POOL).partition("/"))[0] in PARTS:
            pools[part[0], part[2]] = value
            continue
        for name, one in _renamed(path, value):
            found[key if name is None else TOWERS[kind] + name] = one
    for leaf in ("kernel", "bias"):
        if all((part, leaf) in pools for part in PARTS):
            name = f"vision_model.head.attention.in_proj_{LEAVES[leaf]}"
            found[name] = stack(name, [_laid_out(f"{part}/{leaf}", pools[part, leaf]) for part in PARTS])
    return found


def _renamed(path: str, value: Tensor) -> Iterator[tuple[str | None, Tensor]]:
    """transformers' name within a tower, or None, and the value in its layout; of all layers where they are stacked."""
    layer = LAYER.fullmatch(path)
    if layer is None:
        yield _name(path, TOP), _laid_out(path, value)
        return
    index, inner = layer.groups()
    if index is None and not value.dim():
        raise ValueError(f"checkpoint: {path} must have an axis for the layers, got {tuple(value.shape)}")
    name = _name(inner, BLOCK)
    for i, one in enumerate(value) if index is None else ((int(index), value),):
        yield name and f"encoder.layers.{i}.{name}", _laid_out(inner, one)


def _name(path: str, table: Mapping[str, str]) -> str | None:
    if path in table and table[path].endswith(("weight", "probe")):
        return table[path]
    stem, _, leaf = path.rpartition("/")
    return f"{table[stem]}.{LEAVES[leaf]}" if stem in table and leaf in LEAVES else None


def _laid_out(path: str, value: Tensor) -> Tensor:
    """JAX multiplies from the right: [in, out], [in, H, D] of queries, keys and values, [H, D, out] of what follows."""
    *_, stem, leaf = ("", *path.split("/"))
    if leaf == "kernel":
        if value.dim() == 4:  # [p, p, 3, C]
            return value.permute(3, 2, 0, 1)
        if value.dim() == 3:
            value = value.flatten(0, 1) if stem == "out" else value.flatten(1)
        return value.t() if value.dim() == 2 else value
    if leaf == "bias":
        return value.flatten()
    return value[0] if leaf == "pos_embedding" and value.dim() == 3 else value
