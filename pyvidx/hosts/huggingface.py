"""CLIP, SigLIP and the BLIP-2 family of transformers into pyvidx. Works on the model object; transformers itself is
needed only to load by name."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pyvidx.backbones.text import TextTower
from pyvidx.backbones.vit import EVA_G, ViT, ViTConfig
from pyvidx.hosts.importing import LOCAL, importing
from pyvidx.memory.qformer import QFormerConfig
from pyvidx.models.malmm import MALMM
from pyvidx.models.malmm_config import MALMMConfig
from pyvidx.weights import text_towers, towers
from pyvidx.weights.malmm_keys import rename
from pyvidx.weights.place import place

EVA_TYPES = ("blip_2_vision_model", "instructblip_vision_model", "instructblipvideo_vision_model")


def vision_tower(model: nn.Module | str, **kwargs: Any) -> ViT:
    """A ViT with the weights of a CLIP, a SigLIP (SigLIP 2 of a fixed resolution too) or the tower of a BLIP-2 or
    InstructBLIP, whole or its vision model.

    Args:
        model: the transformers model (4.x or 5.x), or a folder, or a name for AutoModel.from_pretrained(model,
            **kwargs), which is taken from transformers' cache; with local_files_only=False it is downloaded. Folders
            need no transformers: pyvidx.weights.towers.vision_tower.

    Returns:
        the tower in eval mode, with the dtype of the model, its weights copied.

    Raises:
        ValueError: the model is none of these, or of another activation.
        RuntimeError: a name was given and transformers is not installed, or cannot be imported.
    """
    return towers.vision_tower(_loaded(model, kwargs))


def text_tower(model: nn.Module | str, **kwargs: Any) -> TextTower:
    """A TextTower with the weights of a CLIP or SigLIP, whole or its text model (of CLIP with its projection).

    Arguments, result and errors as of vision_tower; the tower is frozen.
    """
    return text_towers.text_tower(_loaded(model, kwargs))


def _loaded(model: nn.Module | str, kwargs: dict[str, Any]) -> nn.Module:
    if isinstance(model, str):
        with importing("huggingface: loading by name", "transformers"):
            from transformers import AutoModel

            model = AutoModel.from_pretrained(model, **{**LOCAL, **kwargs})
    if not hasattr(getattr(model, "config", None), "to_dict"):
        raise ValueError(f"huggingface: model must be one of transformers, got {type(model).__name__}")
    return model


def malmm(model: nn.Module, *, time_length: int = 0, compat: str = "official") -> MALMM:
    """MALMM with the weights of an InstructBLIP, InstructBLIP-Video or BLIP-2: what MA-LMM is without fine-tuning.

    pyvidx.weights.malmm.export_malmm(model, "huggingface") goes the other way.

    Args:
        model: the transformers model (4.x or 5.x). Its language model stays where it is.
        time_length: rows of the temporal table, which these weights do not have; it starts at zero.
        compat: see MALMM.

    Returns:
        the model in eval mode, with the dtype of the given one, its weights copied.

    Raises:
        ValueError: the model is none of these.
    """
    if not hasattr(model, "qformer") or not hasattr(model, "vision_model"):
        raise ValueError(f"huggingface: model must be an InstructBLIP or BLIP-2, got {type(model).__name__}")
    q, state = model.config.qformer_config, model.state_dict()
    if q.hidden_act != "gelu":
        raise ValueError(f"huggingface: the Q-Former's hidden_act must be gelu, got {q.hidden_act!r}")
    has_text = "qformer.embeddings.word_embeddings.weight" in state
    projection = getattr(model, "language_projection", None)
    config = MALMMConfig(
        _eva_config(model.vision_model),
        QFormerConfig(
            width=q.hidden_size,
            heads=q.num_attention_heads,
            layers=q.num_hidden_layers,
            mlp_width=q.intermediate_size,
            queries=model.query_tokens.shape[1],
            cross_every=q.cross_attention_frequency,
            encoder_width=q.encoder_hidden_size,
            vocab=q.vocab_size if has_text else None,
            text_length=q.max_position_embeddings,
            eps=q.layer_norm_eps,
            dropout=q.hidden_dropout_prob,
        ),
        llm_width=None if projection is None else projection.out_features,
        time_length=time_length,
    )
    result = _empty(lambda c: MALMM(c, compat=compat), config, model.vision_model)
    if result.time is not None:
        nn.init.zeros_(result.time)
    place(result, [rename(state)], ["time"] if time_length else [])
    return result


def _eva_config(vision: nn.Module) -> ViTConfig:
    config = getattr(vision, "config", None)
    if getattr(config, "model_type", None) not in EVA_TYPES or config.hidden_act != "gelu":
        raise ValueError(f"huggingface: model must be an InstructBLIP or BLIP-2 with GELU, got {type(vision).__name__}")
    return replace(
        EVA_G,
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        layers=config.num_hidden_layers,
        mlp_width=config.intermediate_size,
        eps=config.layer_norm_eps,
        norm_eps=config.layer_norm_eps,
    )


def _empty(build: Callable[[Any], nn.Module], config: Any, like: nn.Module) -> Any:
    """A module without its random start, on the device and with the dtype of another."""
    with torch.device("meta"):
        module = build(config)
    parameter = next(like.parameters())
    return module.to(parameter.dtype).to_empty(device=parameter.device)
