"""What a pretraining starts from: an encoder and a text tower from any of the weights that a configuration may name."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from pyvidx.backbones.text import TextTower
from pyvidx.backbones.vit import ViT
from pyvidx.hosts.open import holds_text, is_published, open_text, opened, with_module
from pyvidx.models import BTAdapter, VideoEncoder
from pyvidx.weights.keys import is_official
from pyvidx.weights.state import state_of
from pyvidx.weights.towers import told_by

DEFAULT = {"name": "bt_adapter"}
Heads = tuple[int, int] | None


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


def start(weights: str, module: dict | None = None, *, heads: Heads = None, hidden_act: str | None = None) -> Start:
    """An encoder, and a text tower if the weights hold one.

    Args:
        weights: see pyvidx.hosts.open.open_model.
        module: {"name": ..., options} of pyvidx.temporal.create, made anew for the tower of the weights, with random
            weights; None: what the weights hold, or BT-Adapter where they are a tower's alone.
        heads, hidden_act: of towers whose weights do not tell.

    Raises:
        FileNotFoundError, ValueError: weights are not there or do not fit.
        RuntimeError: a library that they need is not installed.
    """
    told = {"heads": heads and heads[0], "hidden_act": hidden_act} if is_published(weights) else {}
    found = opened([weights], **{name: value for name, value in told.items() if value is not None}).what
    if isinstance(found, BTAdapter):
        # Both codes give the same numbers here but where the public one takes 3 frames for 3 channels.
        found.temporal.compat, found.temporal.variant = "paper", "mma"
    tower = found if isinstance(found, ViT) else found.tower
    model = found
    if module is not None or isinstance(found, ViT):
        options = dict(module or DEFAULT)
        model = with_module(tower, options.pop("name"), options)
    text = text_of(weights, tower, heads=heads, hidden_act=hidden_act) if holds_text(weights) else None
    state = state_of(weights) if is_published(weights) else {}
    return Start(model, text, state if is_official(state) else {})


def text_of(weights: str, tower: ViT, *, heads: Heads = None, hidden_act: str | None = None) -> TextTower:
    """The text tower of weights; where these do not tell its activation it is that of the image tower."""
    if not is_published(weights):
        return open_text(weights)
    if hidden_act is None and told_by(weights, "text") is None:
        hidden_act = tower.config.hidden_act
    told = {"heads": heads and heads[1], "hidden_act": hidden_act}
    return open_text(weights, **{name: value for name, value in told.items() if value is not None})
