"""Names of MA-LMM's weights: of LAVIS (InstructBLIP, BLIP-2, MA-LMM, eva_vit_g), of transformers, and pyvidx's own."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pyvidx.weights.keys import Renamed, add, is_counter, stack, without_wrappers

LAVIS, HUGGINGFACE = "lavis", "huggingface"
_BLOCK = ("vision.blocks.{i}.", "visual_encoder.blocks.{i}.", "vision_model.encoder.layers.{i}.")
_LAYER = ("qformer.layers.{i}.", "Qformer.bert.encoder.layer.{i}.", "qformer.encoder.layer.{i}.")
_EMBED = ("qformer.", "Qformer.bert.embeddings.", "qformer.embeddings.")


def _under(prefixes: Sequence[str], *rows: Sequence[str | None]) -> tuple[tuple[str | None, ...], ...]:
    """Rows with the prefix of each naming; None where a naming has no such tensor."""
    return tuple(tuple(name and p + name for p, name in zip(prefixes, row)) for row in rows)


# pyvidx, LAVIS, transformers. {i} is a layer, [k] a part of a tensor that is stacked of several here. These rows name
# modules, with .weight and .bias ...
MODULES = (
    *_under(
        _BLOCK,
        ("norm1", "norm1", "layer_norm1"),
        ("out", "attn.proj", "self_attn.projection"),
        ("norm2", "norm2", "layer_norm2"),
        ("fc1", "mlp.fc1", "mlp.fc1"),
        ("fc2", "mlp.fc2", "mlp.fc2"),
    ),
    ("vision.norm_post", "ln_vision", "vision_model.post_layernorm"),
    *_under(_EMBED, ("norm", "LayerNorm", "layernorm")),
    *_under(
        _LAYER,
        ("qkv[0]", "attention.self.query", "attention.attention.query"),
        ("qkv[1]", "attention.self.key", "attention.attention.key"),
        ("qkv[2]", "attention.self.value", "attention.attention.value"),
        ("out", "attention.output.dense", "attention.output.dense"),
        ("norm", "attention.output.LayerNorm", "attention.output.LayerNorm"),
        ("cross.query", "crossattention.self.query", "crossattention.attention.query"),
        ("cross.out", "crossattention.output.dense", "crossattention.output.dense"),
        ("cross.norm", "crossattention.output.LayerNorm", "crossattention.output.LayerNorm"),
        ("feed_query.fc1", "intermediate_query.dense", "intermediate_query.dense"),
        ("feed_query.fc2", "output_query.dense", "output_query.dense"),
        ("feed_query.norm", "output_query.LayerNorm", "output_query.LayerNorm"),
        ("feed_text.fc1", "intermediate.dense", "intermediate.dense"),
        ("feed_text.fc2", "output.dense", "output.dense"),
        ("feed_text.norm", "output.LayerNorm", "output.LayerNorm"),
    ),
    *_under(
        ("", *_LAYER[1:]),
        ("qformer.keys_values[{i}.0]", "crossattention.self.key", "crossattention.attention.key"),
        ("qformer.keys_values[{i}.1]", "crossattention.self.value", "crossattention.attention.value"),
    ),
    ("projection", "llm_proj", "language_projection"),
)
# ... and these tensors.
TENSORS = (
    ("vision.patch", "visual_encoder.patch_embed.proj.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("vision.patch_bias", "visual_encoder.patch_embed.proj.bias", "vision_model.embeddings.patch_embedding.bias"),
    ("vision.class_token", "visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("vision.position", "visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    *_under(
        _BLOCK,
        ("qkv.weight", "attn.qkv.weight", "self_attn.qkv.weight"),
        ("qkv.bias[0]", "attn.q_bias", None),
        ("qkv.bias[2]", "attn.v_bias", None),
        ("qkv.bias", None, "self_attn.qkv.bias"),
    ),
    ("qformer.query_tokens", "query_tokens", "query_tokens"),
    *_under(
        _EMBED,
        ("word", "word_embeddings.weight", "word_embeddings.weight"),
        ("position", "position_embeddings.weight", "position_embeddings.weight"),
    ),
    ("time", "image_pe.weight", "image_pe.weight"),
)
# Leading axes of size 1 that both sources have and pyvidx has not.
AXES = {"vision.class_token": 2, "vision.position": 1, "qformer.query_tokens": 1}

# Parts of a published file that MA-LMM's encoder has no place for: language models, training heads, bookkeeping.
LEFT_OUT = re.compile(
    r"(llm_model|language_model|opt_model|t5_model|Qformer\.cls|visual_encoder\.(norm|fc_norm|head)"
    r"|vision_proj|text_proj|itm_head)\.|temp$|lm_head|(.*\.)?(position_ids|inv_freq)$"
)


def rename(state: Mapping[str, Tensor]) -> Renamed:
    """Rename a state dict of either source, whole or a part of it (eva_vit_g alone, a vision model alone).

    Raises:
        ValueError: a part of a stacked weight is missing, or two keys mean the same weight.
    """
    result, parts = Renamed(), {}
    names = without_wrappers(list(state), lambda name: bool(_locate(_spelled([name])[0])[0] or LEFT_OUT.match(name)))
    names = _spelled(names)
    for key, name in zip(state, names):
        target, part = _locate(name)
        if target is None:
            known = LEFT_OUT.match(name) or is_counter(state[key])
            (result.left_out if known else result.unexpected).append(key)
        elif part is None:
            value = state[key]
            axes = AXES.get(target, 0)
            if axes and value.dim() > axes and value.shape[:axes] == (1,) * axes:
                value = value.reshape(value.shape[axes:])
            add(result, target, value, key)
        else:
            if part in parts.setdefault(target, {}):
                raise ValueError(f"checkpoint: {key} and {parts[target][part][1]} both mean a part of {target}")
            parts[target][part] = (state[key], key)
    for target, found in parts.items():
        add(result, target, _stacked(target, found), *(key for _, key in found.values()))
    return result


def is_malmm(keys: Iterable[str]) -> bool:
    """Of MA-LMM, BLIP-2 or InstructBLIP: there is a Q-Former."""
    return any("query_tokens" in key for key in keys)


def export(weights: Mapping[str, Tensor], naming: str, *, cross_every: int = 2) -> dict[str, Tensor]:
    """The other way round: pyvidx's weights under the names of LAVIS or of transformers.

    Args:
        weights: MALMM.state_dict(), or a part of it.
        naming: "lavis" or "huggingface".
        cross_every: of the Q-Former: which layers its stacked keys and values are of.
    """
    if naming not in (LAVIS, HUGGINGFACE):
        raise ValueError(f"checkpoint: naming must be {LAVIS} or {HUGGINGFACE}, got {naming!r}")
    has_text = "qformer.word" in weights
    out = {}
    for ours, *published in _rows():
        name = published[naming == HUGGINGFACE]
        if name is None:
            continue
        if naming == HUGGINGFACE and not has_text:
            name = name.replace("qformer.embeddings.layernorm", "qformer.layernorm")  # as transformers' BLIP-2
        ours, _, part = ours.partition("[")
        part, _, leaf = part.partition("]")
        pattern = re.compile(re.escape(ours + leaf).replace(r"\{i\}", r"(?P<i>\d+)"))
        for target, value in weights.items():
            match = pattern.fullmatch(target)
            if match is None:
                continue
            if part.startswith("{i}"):  # keys_values: for every layer with cross-attention, keys and values
                width = weights["qformer.query_tokens"].shape[1]
                for j, rows in enumerate(value.split(width)):
                    if j % 2 == int(part[-1]):
                        out[name.format(i=j // 2 * cross_every)] = rows
                continue
            value = value[None] if AXES.get(target) == 1 else value[None, None] if AXES.get(target) else value
            value = value.chunk(3)[int(part)] if part else value
            out[name.format(**match.groupdict())] = value
    return {name: value.detach().clone().contiguous() for name, value in out.items()}


def _rows() -> Iterator[tuple[str | None, ...]]:
    """MODULES and TENSORS as tensors."""
    for row in MODULES:
        for leaf in ("weight", "bias"):
            yield tuple(f"{name}.{leaf}" for name in row)
    yield from TENSORS


def _patterns() -> list[tuple[re.Pattern[str], str]]:
    found = []
    for ours, *published in _rows():
        for name in {*published} - {None}:
            found.append((re.compile(re.escape(name).replace(r"\{i\}", r"(?P<i>\d+)")), ours))
    return found


PATTERNS = _patterns()
TOWER = re.compile(r"^(image_encoder|vision_encoder|visual|vision_tower)\.")


def _spelled(names: list[str]) -> list[str]:
    """Other names of the tower renewed, and one that is alone in its file with its prefix."""
    names = [TOWER.sub("visual_encoder.", name) for name in names]
    if "cls_token" in names:  # eva_vit_g.pth
        names = ["visual_encoder." + name for name in names]
    elif "embeddings.class_embedding" in names:  # a vision model of transformers
        names = ["vision_model." + name for name in names]
    return [re.sub(r"^qformer\.layernorm\.", "qformer.embeddings.layernorm.", name) for name in names]


def _locate(name: str) -> tuple[str | None, tuple[int, ...] | None]:
    """pyvidx's name of a key and, for a part of a stacked weight, which."""
    for pattern, ours in PATTERNS:
        match = pattern.fullmatch(name)
        if match:
            target, _, rest = ours.format(**match.groupdict()).partition("[")
            part, _, leaf = rest.partition("]")
            return target + leaf, tuple(int(n) for n in part.split(".")) if part else None
    return None, None


def _stacked(target: str, found: Mapping[tuple[int, ...], tuple[Tensor, str]]) -> Tensor:
    """The parts in order. A vision block's k has no bias: zeros stand for it."""
    values = {part: value for part, (value, _) in found.items()}
    if target.startswith("vision.") and {*values} == {(0,), (2,)}:
        values[1,] = torch.zeros_like(values[0,])
    layers = {part[0] for part in values} if target.startswith("qformer.keys_values") else None
    wanted = {(i, k) for i in layers for k in (0, 1)} if layers else {(0,), (1,), (2,)}
    if {*values} != wanted:
        keys = ", ".join(key for _, key in found.values())
        raise ValueError(f"checkpoint: {target} needs {len(wanted)} parts, got only {keys}")
    return stack(target, [values[part] for part in sorted(values)])
