"""Names of published weights -> names of pyvidx: the official BT-Adapter files, transformers' CLIP and SigLIP, and
open_clip, also with timm's ViT as its trunk."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# What training code puts around a model, saying nothing of its parts. Stripped where it leads a name, in any nesting.
WRAPPERS = (
    "module", "model", "clip", "net", "network", "base_model", "student", "teacher", "ema", "ema_model", "wrapped",
    "wrapped_model", "0",
)  # fmt: skip
INSIDE = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
WRAPPER = re.compile(rf"^(?:(?:{'|'.join(WRAPPERS)})\.)+")
# What says that a part is an image tower.
TOWER = (
    "backbone", "vision_model", "visual", "vision_tower", "image_encoder", "visual_encoder", "vision_encoder", "vision",
    "image_tower",
)  # fmt: skip
IS_TOWER = re.compile(rf"({'|'.join(TOWER)})\.")
VISION = re.compile(rf"^(?:(?:{'|'.join(WRAPPERS + TOWER)})\.)+")

# Parts of a published file that a video tower has no place for: text towers, training heads, bookkeeping.
LEFT_OUT = re.compile(
    r"(text_backbone|text_model|text_encoder|text|extra_proj|loss|mm_projector|embed_tokens)\.|text_projection(\.|$)"
    r"|logit_scale$|logit_bias$|(.*\.)?position_ids$|(input_resolution|context_length|vocab_size)$"
)
# Beside a tower under a name of its own: the text tower of open_clip, a language model.
BESIDE = re.compile(r"(transformer|token_embedding|ln_final|layers|norm|lm_head)\.|positional_embedding$|attn_mask$")

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
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "qkv",
    "attn.proj": "out",
}
TEMPORAL = {"layer_norm1": "norm", "self_attn.out_proj": "out", "temporal_fc": "fc"}
TOP = {
    "class_embedding": "tower.class_token",
    "patch_embedding.weight": "tower.patch",
    "patch_embedding.bias": "tower.patch_bias",
    "conv1.weight": "tower.patch",
    "position_embedding.weight": "tower.position",
    "positional_embedding": "tower.position",
    "pre_layrnorm": "tower.norm_pre",
    "ln_pre": "tower.norm_pre",
    "post_layernorm": "tower.norm_post",
    "ln_post": "tower.norm_post",
    "visual_projection": "tower.projection",
    "proj": "tower.projection.weight",
    "head.probe": "tower.pool.probe",
    "head.attention.out_proj": "tower.pool.out",
    "head.layernorm": "tower.pool.norm",
    "head.mlp.fc1": "tower.pool.fc1",
    "head.mlp.fc2": "tower.pool.fc2",
    "trunk.cls_token": "tower.class_token",
    "trunk.patch_embed.proj.weight": "tower.patch",
    "trunk.patch_embed.proj.bias": "tower.patch_bias",
    "trunk.pos_embed": "tower.position",
    "trunk.norm": "tower.norm_post",
    "trunk.attn_pool.latent": "tower.pool.probe",
    "trunk.attn_pool.proj": "tower.pool.out",
    "trunk.attn_pool.norm": "tower.pool.norm",
    "trunk.attn_pool.mlp.fc1": "tower.pool.fc1",
    "trunk.attn_pool.mlp.fc2": "tower.pool.fc2",
    "btadapter_time_embed.weight": "temporal.branch.time",
    "btadapter_cls_token": "temporal.branch.seed",
    "balance1": "temporal.output_gate",
    "balance2": "temporal.branch.gate",
}
POOL = re.compile(r"head\.attention\.in_proj_(weight|bias)|trunk\.attn_pool\.(q|kv)\.(weight|bias)")
LAYER = re.compile(r"(layers|resblocks|trunk\.blocks|btadapter_S_layers|btadapter_T_layers)\.(\d+)\.(.+)")
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
    reshaped: list[tuple[str, tuple[Any, ...], tuple[Any, ...]]] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        """All keys of the source."""
        return [key for keys in self.origin.values() for key in keys] + self.left_out + self.unexpected


def rename(state: Mapping[str, Tensor]) -> Renamed:
    """Rename a state dict of any known source.

    Layer indices are kept as they are, see pyvidx.weights.bt_adapter for files that count from a later layer.

    Raises:
        ValueError: q, k or v of a layer is missing, or two keys mean the same weight.
    """
    result, thirds = Renamed(), {}
    names = without_wrappers(list(state), lambda name: bool(LEFT_OUT.match(name) or locate(_strip(name))[0]))
    has_tower = any(map(IS_TOWER.match, names))
    stan = not any("btadapter_cls_token" in key or "timesFPN_cls_token" in key for key in state) and any(
        "STAN_" in key for key in state
    )
    for (key, value), name in zip(state.items(), names):
        if LEFT_OUT.match(name) or (has_tower and BESIDE.match(name)):
            result.left_out.append(key)
            continue
        name = _strip(name)
        target, third = locate(name)
        if target is None:
            known = LEFT_OUT.match(name) or is_counter(value)
            (result.left_out if known else result.unexpected).append(key)
        elif third == "kv" and value.dim():
            for part, half in zip("kv", value.chunk(2)):
                thirds.setdefault(target, {})[part] = (half, key)
        elif third is None:
            add(result, target, _shaped(result, name, target, value), key)
            if stan and target == "tower.class_token":  # STAN starts the branch's class token from CLIP's
                add(result, "temporal.branch.seed", value, key)
        else:
            if third in thirds.setdefault(target, {}):
                raise ValueError(f"checkpoint: {key} and another key both mean {third} of {target}")
            thirds[target][third] = (value, key)
    for target, parts in thirds.items():
        if len(parts) != 3:
            raise ValueError(f"checkpoint: {target} needs q, k and v, got only {', '.join(sorted(parts))}")
        ordered = [parts[third] for third in THIRDS]
        add(result, target, stack(target, [value for value, _ in ordered]), *(key for _, key in ordered))
    return result


def without_wrappers(keys: Sequence[str], known: Callable[[str], bool]) -> list[str]:
    """The keys without what training code put before them.

    Args:
        known: whether a name, so far, means something. Where none does, the keys lose the first part that most of them
            share, whatever it is called, and so on, if that makes at least half of them known.

    Raises:
        ValueError: there is an adapter that is not merged.
    """
    if adapter := next((key for key in keys if ".lora_" in key or ".base_layer." in key), None):
        raise ValueError(f"checkpoint: {adapter} is of an adapter: merge it first, in peft model.merge_and_unload()")
    plain = names = [WRAPPER.sub("", INSIDE.sub("", key)) for key in keys]
    while names and not any(map(known, names)):
        heads = Counter(name.partition(".")[0] for name in names if "." in name)
        if not heads or "text" in (head := heads.most_common(1)[0][0]):
            return plain
        names = [WRAPPER.sub("", name.removeprefix(head + ".")) for name in names]
    return names if 2 * sum(map(known, names)) >= len(names) else plain


def _strip(name: str) -> str:
    """Without what says that it is an image tower and the folders of transformers' CLIP, old spellings renewed."""
    name = VISION.sub("", name)
    name = name.removeprefix("embeddings.").removeprefix("encoder.").removeprefix("transformer.")
    return name.replace("timesFPN", "btadapter").replace("STAN_", "btadapter_")


def count_layers(names: Iterable[str], base: str) -> int:
    """How many layers there are under `base`.

    Raises:
        ValueError: they are not numbered 0, 1, ... without a gap.
    """
    found = {name[len(base) :].split(".")[0] for name in names if name.startswith(base)}
    if found != {str(i) for i in range(len(found))}:
        raise ValueError(f"checkpoint: the layers under {base} must be numbered from 0, got {sorted(found)[:8]}")
    return len(found)


def check_plain(weights: Mapping[str, Tensor], axes: Mapping[str, int]) -> None:
    """Refuse weights that are not floating, or whose number of axes, where it is known, is another.

    Raises:
        ValueError: there is one.
    """
    for name, value in weights.items():
        if value.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise ValueError(f"checkpoint: {name} must be floating of 16, 32 or 64 bits, the file has {value.dtype}")
        if name in axes and (value.dim() != axes[name] or not value.numel()):
            raise ValueError(f"checkpoint: {name} must have {axes[name]} axes, the file has {tuple(value.shape)}")


def stack(target: str, parts: Sequence[Tensor]) -> Tensor:
    """The parts of a weight that is one here.

    Raises:
        ValueError: they do not fit together.
    """
    if len({(part.shape, part.dtype) for part in parts}) != 1 or not parts[0].dim():
        shapes = ", ".join(f"{tuple(part.shape)} {part.dtype}" for part in parts)
        raise ValueError(f"checkpoint: {target} needs parts of one shape and dtype, got {shapes}")
    return torch.cat(list(parts))


def locate(name: str) -> tuple[str | None, str | None]:
    """pyvidx's name of a key without wrappers and, for a third of a packed weight, which: "...qkv.bias", "q"."""
    if name in TOP:
        return TOP[name], None
    if pool := POOL.fullmatch(name):
        whole, third, leaf = pool.groups()
        return f"tower.pool.qkv.{whole or leaf}", third
    stem, _, leaf = name.rpartition(".")
    if stem in TOP and leaf in ("weight", "bias"):
        return f"{TOP[stem]}.{leaf}", None
    match = LAYER.fullmatch(name)
    if not match:
        return None, None
    kind, index, inner = match.groups()
    base = {"btadapter_S_layers": "temporal.branch.spatial", "btadapter_T_layers": "temporal.branch.temporal"}
    base = base.get(kind, "tower.blocks")
    packed = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)|attn\.in_proj_(weight|bias)", inner)
    if packed:
        third, leaf, fused_leaf = packed.groups()
        return f"{base}.{index}.qkv.{leaf or fused_leaf}", third
    stem, _, leaf = inner.rpartition(".")
    inner = (TEMPORAL if kind == "btadapter_T_layers" else BLOCK).get(stem)
    return (f"{base}.{index}.{inner}.{leaf}", None) if inner and leaf in ("weight", "bias") else (None, None)


def _shaped(result: Renamed, name: str, target: str, value: Tensor) -> Tensor:
    before = tuple(value.shape)
    if target in ("temporal.branch.seed", "tower.pool.probe", "tower.class_token"):
        value = value.reshape(-1)  # stored as [1, 1, C]
    elif target == "tower.position" and value.dim() == 3:
        value = value.flatten(0, 1)  # timm's [1, P, C]
    elif name == "proj" and value.dim() == 2:
        value = value.t()  # open_clip multiplies from the right
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


def is_counter(value: Tensor) -> bool:
    """One whole number: a count of steps that training code keeps beside weights."""
    return value.numel() == 1 and not value.is_floating_point()


def is_official(keys: Iterable[str]) -> bool:
    """Of one of the authors' own files, whose CLIP is OpenAI's."""
    return any("btadapter" in key or "timesFPN" in key or "STAN_" in key for key in keys)


def different(module: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """The first few weights whose shape is not the module's, in words; "" where all fit."""
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    pairs = [(name, own[name], tuple(w.shape)) for name, w in weights.items() if name in own]
    wrong = [f"{name} is {mine}, the file has {theirs}" for name, mine, theirs in pairs if mine != theirs]
    return "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")


def groups(names: Iterable[str], most: int = 8) -> list[str]:
    """Names for people: indices and weight/bias folded together, with a count, and not too many."""
    counts: Counter[str] = Counter(
        re.sub(r"\.\d+(?=\.)", ".*", re.sub(r"\.(weight|bias)$", "", name)) for name in names
    )
    found = [group if n == 1 else f"{group} ({n})" for group, n in counts.items()]
    return found[:most] + [f"and {len(found) - most} more"] * (len(found) > most)
