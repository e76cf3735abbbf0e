"""transformers' CLIP into pyvidx. Works on the model object; transformers itself is needed only to load by name."""

from torch import nn

from pyvidx.backbones.clip import CLIPVision, CLIPVisionConfig
from pyvidx.integrations.clip_weights import fill


def clip_vision(model: nn.Module | str, **kwargs) -> CLIPVision:
    """CLIPVision with the weights of a CLIPModel, CLIPVisionModel or CLIPVisionModelWithProjection.

    Args:
        model: the transformers model (4.x or 5.x), or a name or folder for CLIPModel.from_pretrained(model, **kwargs).

    Returns:
        the tower in eval mode, with the dtype of the model, its weights copied.

    Raises:
        ValueError: the model is not a CLIP with a known activation.
        RuntimeError: a name was given and transformers is not installed.
    """
    if isinstance(model, str):
        try:
            from transformers import CLIPModel
        except ImportError as error:
            raise RuntimeError("huggingface: loading by name needs transformers: pip install pyvidx[hosts]") from error
        model = CLIPModel.from_pretrained(model, **kwargs)
    config = getattr(model, "config", None)
    vision = getattr(config, "vision_config", config)
    if getattr(vision, "model_type", None) != "clip_vision_model":
        raise ValueError(f"huggingface: model must be a CLIP of transformers, got {type(model).__name__}")
    projection = getattr(model, "visual_projection", None)
    return fill(
        CLIPVisionConfig(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            width=vision.hidden_size,
            heads=vision.num_attention_heads,
            layers=vision.num_hidden_layers,
            mlp_width=vision.intermediate_size,
            embed_dim=None if projection is None else projection.out_features,
            hidden_act=vision.hidden_act,
            eps=vision.layer_norm_eps,
        ),
        model.state_dict(),
    )
