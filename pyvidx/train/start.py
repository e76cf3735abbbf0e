"""What a pretraining starts from: an encoder and a text tower from any of the weights that a configuration may name."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from pyvidx import temporal
from pyvidx.backbones.text import TextTower
from pyvidx.backbones.vit import ViT
from pyvidx.hosts import open_clip
from pyvidx.hosts.open import check_source
from pyvidx.models import BTAdapter, BTAdapterConfig, VideoEncoder, files
from pyvidx.weights.bt_adapter import load_official, state_of
from pyvidx.weights.text_towers import text_tower
from pyvidx.weights.towers import vision_tower

DEFAULT = {"name": "bt_adapter"}
SAVED = {model.kind: model for model in (BTAdapter, VideoEncoder)}


class Start(NamedTuple):
    """What weights gave.

    Attributes:
        model: the encoder.
        text: its text tower, or None where the weights hold none.
        state: the state dict it is from, where it is from one of the authors' own files.
    """

    model: VideoEncoder
    text: TextTower | None
    state: Mapping[str, Tensor]


def start(
    weights: str,
    module: dict | None = None,
    *,
    heads: tuple[int, int] | None = None,
    hidden_act: str | None = None,
) -> Start:
    """An encoder, and a text tower if the weights hold one.

    Args:
        weights: see pyvidx.train.pretrain.Config.
        module: {"name": ..., options} of pyvidx.temporal.create, made anew for the tower of the weights, with random
            weights; None: what the weights hold, or BT-Adapter where they are a tower's alone.
        heads, hidden_act: of towers whose weights do not tell.

    Raises:
        FileNotFoundError, ValueError: weights are not there or do not fit.
        RuntimeError: a library that they need is not installed.
    """
    vision_heads, text_heads = heads or (None, None)
    check_source(weights)
    if weights.startswith(open_clip.SCHEME):
        vision, text = towers(weights)
        return Start(joined(vision, module or DEFAULT), text, {})
    if files.is_ours(weights):
        kind = files.kind(weights)
        if kind not in SAVED:
            raise ValueError(f"train: {weights} holds {kind!r:.100}, which is no encoder")
        # Both codes give the same numbers here but where the public one takes 3 frames for 3 channels.
        modes = {"compat": "paper", "variant": "mma"} if kind == "bt_adapter" else {}
        model = SAVED[kind].from_pretrained(weights, **modes)
        return Start(model if module is None else joined(model.tower, module), None, {})
    state = {} if Path(weights).is_dir() else state_of(weights)
    if any("btadapter" in key or "timesFPN" in key for key in state):
        model, _ = load_official(state, heads=vision_heads, hidden_act=hidden_act, compat="paper", variant="mma")
        text = {key: value for key, value in state.items() if "text_" in key}
        options = {"heads": text_heads, "hidden_act": model.config.vision.hidden_act}
        model = model if module is None else joined(model.tower, module)
        return Start(model, text_tower(text, **options) if text else None, state)
    vision, text = towers(state or weights, heads=heads, hidden_act=hidden_act)
    if vision is None:
        raise ValueError(f"train: {weights} holds no image tower")
    return Start(joined(vision, module or DEFAULT), text, {})


def joined(tower: ViT, module: dict) -> VideoEncoder:
    """The tower and a new module, which takes over from it what its training starts from; BT-Adapter is the class of
    its own, which knows the official names and numbers."""
    name, options = module["name"], {k: v for k, v in module.items() if k != "name"}
    if name == "bt_adapter":
        eps = options.pop("eps", None) or tower.config.eps
        model = BTAdapter(BTAdapterConfig(tower.config, branch_eps=eps, **options))
        model.tower.load_state_dict(tower.state_dict())
    else:
        model = VideoEncoder(tower, temporal.create(name, tower.config, **options))
    model.temporal.init_from(model.tower)
    return model


def towers(
    weights: str | Mapping[str, Tensor],
    *,
    heads: tuple[int, int] | None = None,
    hidden_act: str | None = None,
    image: bool = True,
) -> tuple[ViT | None, TextTower | None]:
    """The towers of a CLIP or SigLIP, in any of the forms of Config.weights and Config.text, or of a state dict;
    image=False leaves that one in a state dict, which may be more than theirs."""
    vision_heads, text_heads = heads or (None, None)
    if isinstance(weights, str) and weights.startswith(open_clip.SCHEME):
        model, _ = open_clip.named(weights)
        return open_clip.vision_tower(model), open_clip.text_tower(model)
    if isinstance(weights, str) and Path(weights).is_dir():
        return vision_tower(weights) if image else None, text_tower(weights)
    state = state_of(weights)
    has_vision = image and any("patch_embed" in key or "conv1.weight" in key for key in state)
    vision = vision_tower(state, heads=vision_heads, hidden_act=hidden_act) if has_vision else None
    has_text = any("token_embedding" in key for key in state)
    hidden_act = hidden_act or (vision and vision.config.hidden_act)
    return vision, text_tower(state, heads=text_heads, hidden_act=hidden_act) if has_text else None
