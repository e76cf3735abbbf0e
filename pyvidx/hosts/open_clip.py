"""open_clip's image towers into pyvidx. Works on the model object; open_clip itself is needed only to build by name."""

import difflib
import sys
from pathlib import Path

import torch
from torch import nn

from pyvidx.backbones.clip import CLIPVision, CLIPVisionConfig
from pyvidx.hosts.importing import importing
from pyvidx.weights.clip import fill

SCHEME = "open_clip:"


def parse(source: str) -> tuple[str, str | None]:
    """open_clip:NAME, open_clip:NAME:FILE or open_clip:NAME:TAG -> NAME, and FILE, TAG or None.

    Raises:
        FileNotFoundError: there is no such file, nor such a tag.
        ValueError: open_clip knows no such name.
        RuntimeError: it is not installed.
    """
    name, _, weights = source.removeprefix(SCHEME).partition(":")
    with importing(f"--model {SCHEME}NAME", "open_clip"):
        import open_clip
    names = open_clip.list_models()
    if name not in names:
        near = difflib.get_close_matches(name, names, 5, 0.4) or names[:5]
        raise ValueError(f"open_clip: it knows no model {name!r}; there are {', '.join(near)} and others")
    if weights and not Path(weights).is_file() and open_clip.get_pretrained_cfg(name, weights) == {}:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise FileNotFoundError(f"open_clip: there is no file {weights}, and of {name}'s tags ({tags}) it is none")
    return name, weights or None


def named(source: str) -> tuple[nn.Module, str]:
    """The model of open_clip that open_clip:NAME[:FILE or TAG] means, and where its weights are from.

    Without FILE or TAG they are random, always the same ones. A TAG is open_clip's own: it takes these weights from its
    cache, or downloads them, which is said on stderr first.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: see `parse`; the file does not fit the model.
    """
    name, weights = parse(source)
    import open_clip

    where = "random weights"
    if weights:
        where = weights if Path(weights).is_file() else f"open_clip's {weights!r}"
        if not Path(weights).is_file():
            print(f"NOTE: open_clip takes {weights!r} from its cache, or downloads it", file=sys.stderr)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            # The base weights of a text tower would be another download, for a tower that is not kept.
            model = open_clip.create_model(name, pretrained=weights, pretrained_text=False)
        except Exception as error:  # whatever a file that holds no such weights makes it raise
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RuntimeError(f"open_clip: {name} cannot be made with {where}: {line}") from error
    return model, f"of open_clip's {name}, {where}"


def clip_vision(model: nn.Module) -> CLIPVision:
    """CLIPVision with the weights of an open_clip model (CLIP, CustomTextCLIP) or of its VisionTransformer.

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
        raise ValueError(f"open_clip: this tower has {', '.join(odd)}, which CLIPVision does not")
    return fill(
        CLIPVisionConfig(
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
