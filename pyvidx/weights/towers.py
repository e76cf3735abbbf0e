"""Image towers from the weights of CLIP, SigLIP and EVA, by the names that their sources give them.

    tower = vision_tower("siglip-base-patch16-224")     # a folder of transformers or open_clip, or a file
    text = text_tower("siglip-base-patch16-224")

A folder's config tells what weights do not: heads, activation, eps, image size. Of a file or a state dict without one
they are the published ones of its kind, or arguments. Model objects: pyvidx.hosts.huggingface and open_clip.
"""

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyvidx.backbones.vit import EVA_G, SIGLIP_B, ViT, ViTConfig
from pyvidx.weights import malmm_keys
from pyvidx.weights.keys import Renamed, check_plain, count_layers, groups, rename
from pyvidx.weights.place import MissingWeights, assign
from pyvidx.weights.state import Source, state_of

AXES = {"position": 2, "patch": 4, "blocks.0.fc1.weight": 2, "projection.weight": 2}
# transformers' names of activations.
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
# Defaults of transformers, which its config.json leaves out: heads of image and text tower, activation, eps.
CLIP_DEFAULTS, SIGLIP_DEFAULTS = (12, 8, "quick_gelu", 1e-5), (12, 12, "gelu_pytorch_tanh", 1e-6)
DEFAULTS = {
    "clip": CLIP_DEFAULTS, "clip_vision_model": CLIP_DEFAULTS, "clip_text_model": CLIP_DEFAULTS,
    "siglip": SIGLIP_DEFAULTS, "siglip_vision_model": SIGLIP_DEFAULTS, "siglip_text_model": SIGLIP_DEFAULTS,
    **dict.fromkeys(
        ("blip-2", "instructblip", "instructblipvideo", "blip_2_vision_model", "instructblip_vision_model",
         "instructblipvideo_vision_model"),
        (16, None, "gelu", 1e-6),
    ),
}  # fmt: skip
EVA = re.compile(r"(^|.*\.)(attn\.q_bias|self_attn\.qkv\.weight)$")
EVA_END = re.compile(r"(?!.*blocks\.)(?:.*\.)?(norm|head)\.(weight|bias)")
# timm's SigLIP towers with the approximated GELU; its others have the exact one.
TANH = re.compile(r"so400m_patch16|giantopt|base_patch32|large_patch16_siglip_512")


class Told(NamedTuple):
    """What the weights of a tower do not tell; None where nobody does."""

    heads: int | None = None
    hidden_act: str | None = None
    eps: float | None = None
    image_size: int | None = None


def told_by(folder: str | Path, part: str = "vision") -> Told | None:
    """What the config.json of transformers or the open_clip_config.json in a folder tells; None: there is neither, or
    it is of another kind of model.

    Args:
        part: "vision" or "text", the tower.

    Raises:
        ValueError: it is no such file.
    """
    try:
        if (path := Path(folder) / "config.json").is_file():
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.get("model_type", "clip") in DEFAULTS and "model_cfg" not in values:
                return told_by_config(values, part)
        if (path := Path(folder) / "open_clip_config.json").is_file():
            return _of_open_clip(json.loads(path.read_text(encoding="utf-8"))["model_cfg"], part)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError) as error:
        raise ValueError(f"weights: {path} does not describe a tower ({type(error).__name__}: {error})") from error
    return None


def told_by_config(values: Mapping[str, Any], part: str = "vision") -> Told:
    """What a configuration of transformers tells, whole or of a tower.

    Raises:
        ValueError: it is of another kind of model, or of an activation that no tower here has.
    """
    kind = values.get("model_type", "clip")
    if kind not in DEFAULTS:
        raise ValueError(f"weights: the model must be one of {', '.join(DEFAULTS)}, got {kind!r}")
    values = values.get(f"{part}_config", values)
    vision_heads, text_heads, act, eps = DEFAULTS[kind]
    act = values.get("hidden_act", act)
    if act not in ACTIVATIONS:
        raise ValueError(f"weights: hidden_act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    return Told(
        values.get("num_attention_heads", vision_heads if part == "vision" else text_heads),
        ACTIVATIONS[act],
        values.get("layer_norm_eps", eps),
        _side(values.get("image_size")),
    )


def _of_open_clip(values: dict[str, Any], part: str) -> Told:
    inner = values[f"{part}_cfg"]
    act = "quick_gelu" if values.get("quick_gelu") else "gelu"
    if part == "text":
        act = "gelu_tanh" if inner.get("act_kwargs", {}).get("approximate") == "tanh" else act
        return Told(inner["heads"], act, inner.get("norm_kwargs", {}).get("eps", 1e-5))
    if "timm_model_name" in inner:  # whose heads are those of every SigLIP
        act = "gelu_tanh" if TANH.search(inner["timm_model_name"]) else "gelu"
        return Told(None, act, 1e-6, _side(inner.get("image_size")))
    return Told(inner["width"] // inner.get("head_width", 64), act, 1e-5, _side(inner.get("image_size")))


def _side(size: int | list[Any] | None) -> int | None:
    """Pixels of an image, which some configurations write as height and width."""
    if not isinstance(size, list | tuple):
        return size
    if len({*size}) != 1:
        raise ValueError(f"weights: images must be square, got {size}")
    return size[0]


def completed(given: Told, source: Source, part: str) -> Told:
    """What is given, and for the rest what the folder or the model of transformers that is the source tells."""
    told = None
    if isinstance(source, str | Path):
        told = told_by(source, part)
    elif hasattr(getattr(source, "config", None), "to_dict"):
        told = told_by_config(source.config.to_dict(), part)
    return Told(*(theirs if mine is None else mine for mine, theirs in zip(given, told or Told())))


def activation(hidden_act: str | None, stacklevel: int = 3) -> str:
    """hidden_act, or OpenAI's with a warning where it was not told: a wrong one gives wrong numbers and no error."""
    if hidden_act is None:
        warnings.warn(
            "CLIP weights do not tell their activation, so OpenAI's quick_gelu is taken: pass hidden_act='gelu' for "
            "LAION's and DataComp's, or hidden_act='quick_gelu' to say that it is right",
            stacklevel=stacklevel,
        )
    return hidden_act or "quick_gelu"


def published_heads(width: int) -> int:
    """Heads of the published image towers of a width: 64 channels each, but in the largest, which have 16.

    Raises:
        ValueError: it is not a multiple of 64.
    """
    if width % 64:
        raise ValueError(f"weights: width {width} is not a multiple of 64, so pass heads=")
    return 16 if width >= 1152 else width // 64


def vision_tower(
    source: Source,
    *,
    heads: int | None = None,
    hidden_act: str | None = None,
    eps: float | None = None,
    image_size: int | None = None,
) -> ViT:
    """A ViT with a copy of these weights, sizes inferred; in eval mode.

    Args:
        source: file, folder, module or state dict of a CLIP, a SigLIP or an EVA, in any naming that keys.rename or
            malmm_keys.rename knows; the text tower and what else a whole model has are passed over.
        heads: default what a config beside the weights tells, or the published, see published_heads.
        hidden_act, eps: default what a config tells, or the published; of a CLIP that tells nothing OpenAI's
            "quick_gelu", with a warning: LAION's and DataComp's have "gelu".
        image_size: pixels; default what a config tells, or whole patches.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, a weight is missing or not understood, a shape differs, or the width does not
            give the heads.
    """
    told = completed(Told(heads, hidden_act, eps, image_size), source, "vision")
    renamed = tower_names(state_of(source))
    return filled(tower_config(renamed, told), renamed)


def tower_names(state: Mapping[str, Tensor]) -> Renamed:
    """The weights of the image tower in a state dict of any known naming under ViT's names."""
    is_eva = any(map(EVA.match, state))
    renamed = malmm_keys.rename(state) if is_eva else rename(state)
    start = "vision." if is_eva else "tower."
    names = {n: n.removeprefix(start) for n in renamed.weights if n.startswith(start) or not is_eva}
    weights = {name: renamed.weights[n] for n, name in names.items()}
    origin = {name: renamed.origin[n] for n, name in names.items()}
    left_out = [key for n, keys in renamed.origin.items() if n not in names for key in keys]
    if is_eva and "norm_post.weight" not in weights:
        head = _eva_head(state)
        weights |= {name: state[key] for name, key in head.items()}
        origin |= {name: [key] for name, key in head.items()}
    placed = {key for keys in origin.values() for key in keys}
    left_out += [key for key in renamed.left_out if key not in placed]
    return replace(renamed, weights=weights, origin=origin, left_out=left_out)


def _eva_head(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The keys of the LayerNorm and the projection of an EVA-CLIP, in whose place BLIP-2's family has its ln_vision, by
    our names."""
    names = {"norm": "norm_post", "head": "projection"}
    matches = [(EVA_END.fullmatch(key), key) for key in state]
    return {f"{names[match[1]]}.{match[2]}": key for match, key in matches if match}


def tower_config(renamed: Renamed, told: Told) -> ViTConfig:
    """Sizes and kind of a tower by the weights there are, under ViT's names.

    Raises:
        ValueError: they do not tell the sizes, or not without what `told` lacks.
    """
    weights, keys = renamed.weights, renamed.keys
    if absent := [name for name in ("position", "patch", "blocks.0.fc1.weight") if name not in weights]:
        raise MissingWeights(f"weights: no sizes without {', '.join(absent)}; the keys are {', '.join(groups(keys))}")
    if weights["patch"].dim() == 2:
        raise ValueError("weights: patches must be of a fixed image size; SigLIP 2 of any size (NaFlex) is not read")
    check_plain(weights, AXES)
    (tokens, width), patch = weights["position"].shape, weights["patch"].shape[-1]
    pool = "class" if "class_token" in weights else "attention" if "pool.probe" in weights else "mean"
    like = SIGLIP_B if pool != "class" else EVA_G if "patch_bias" in weights else None
    projection = weights.get("projection.weight")
    return ViTConfig(
        image_size=math.isqrt(tokens - (pool == "class")) * patch if told.image_size is None else told.image_size,
        patch_size=patch,
        width=width,
        heads=published_heads(width) if told.heads is None else told.heads,
        layers=count_layers(weights, "blocks."),
        mlp_width=len(weights["blocks.0.fc1.weight"]),
        embed_dim=None if projection is None else len(projection),
        hidden_act=told.hidden_act or (like.hidden_act if like else activation(None, stacklevel=4)),
        eps=told.eps if told.eps is not None else like.eps if like else 1e-5,
        norm_eps=EVA_G.norm_eps if any("ln_vision" in key for key in keys) else None,
        pool=pool,
        norm_pre=like is None,
        patch_bias=like is not None,
        projection_bias="projection.bias" in weights,
    )


def filled(config: ViTConfig, renamed: Renamed) -> ViT:
    """A ViT of these sizes with a copy of these weights, under ViT's names; in eval mode.

    Raises:
        ValueError: a weight is missing or not understood, or a shape differs.
    """
    with torch.device("meta"):
        tower = ViT(config)
    assign(tower, renamed.weights, "weights", renamed.unexpected)
    return tower.eval()
