"""open_clip's image towers into pyvidx. Works on the model object; open_clip itself is not imported."""

from torch import nn

from pyvidx.backbones.vit import ViT, ViTConfig
from pyvidx.weights.clip import fill


def clip_vision(model: nn.Module) -> ViT:
    """ViT with the weights of an open_clip model (CLIP, CustomTextCLIP) or of its VisionTransformer.

    Returns:
        the tower in eval mode, with the dtype of the model, its weights copied.

    Raises:
        ValueError: the tower is not a plain ViT with GELU or QuickGELU.
    """
    tower = getattr(model, "visual", model)
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
    if not blocks or not hasattr(tower, "conv1") or not hasattr(tower, "ln_pre"):
        raise ValueError(f"open_clip: only VisionTransformer towers are read, got {type(tower).__name__}")
    first = blocks[0]
    plain = {
        "layer scale": isinstance(first.ls_1, nn.Identity) and isinstance(first.ls_2, nn.Identity),
        "attention pooling": getattr(tower, "attn_pool", None) is None,
        "pooling other than the class token": getattr(tower, "pool_type", "tok") == "tok",
        "no first LayerNorm": isinstance(tower.ln_pre, nn.LayerNorm),
        "LayerNorm before pooling": not getattr(tower, "final_ln_after_pool", False),
    }
    odd = [what for what, ok in plain.items() if not ok]
    if odd:
        raise ValueError(f"open_clip: this tower has {', '.join(odd)}, which ViT does not")
    return fill(
        ViTConfig(
            image_size=tower.image_size[0],
            patch_size=tower.patch_size[0],
            width=tower.conv1.out_channels,
            heads=first.attn.num_heads,
            layers=len(blocks),
            mlp_width=first.mlp.c_fc.out_features,
            embed_dim=None if tower.proj is None else tower.proj.shape[1],
            hidden_act=_activation(first.mlp.gelu),
            eps=tower.ln_pre.eps,
        ),
        tower.state_dict(),
    )


def _activation(module: nn.Module) -> str:
    if type(module).__name__ == "QuickGELU":
        return "quick_gelu"
    if isinstance(module, nn.GELU) and module.approximate == "none":
        return "gelu"
    raise ValueError(f"open_clip: the activation must be QuickGELU or GELU, got {module}")
