"""open_clip's towers into pyvidx. Works on the model object; open_clip itself is needed only to build by name."""

import difflib
import sys
from pathlib import Path

import torch
from torch import nn

from pyvidx.backbones.text import TextTower
from pyvidx.backbones.vit import ViT
from pyvidx.hosts.importing import importing
from pyvidx.weights import text_towers
from pyvidx.weights.towers import Told, filled, tower_config, tower_names

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


def vision_tower(model: nn.Module) -> ViT:
    """A ViT with the weights of an open_clip model (CLIP, CustomTextCLIP) or of its image tower: a VisionTransformer,
    or a ViT of timm as SigLIP has it.

    Returns:
        the tower in eval mode, with the dtype of the model, its weights copied.

    Raises:
        ValueError: the tower is not a plain ViT with GELU, its approximation or QuickGELU.
    """
    tower = getattr(model, "visual", model)
    told = _of_timm(tower) if hasattr(tower, "trunk") else _of_open_clip(tower)
    renamed = tower_names(tower.state_dict())
    return filled(tower_config(renamed, told), renamed)


def text_tower(model: nn.Module) -> TextTower:
    """A TextTower with the weights of an open_clip model.

    Returns:
        the tower, frozen and in eval mode, with the dtype of the model, its weights copied.

    Raises:
        ValueError: the text tower is not CLIP's or SigLIP's.
    """
    text = getattr(model, "text", model)
    blocks = getattr(getattr(text, "transformer", None), "resblocks", None)
    if not blocks:
        raise ValueError(f"open_clip: only TextTransformer towers are read, got {type(text).__name__}")
    first = blocks[0]
    pool = getattr(text, "pool_type", getattr(text, "text_pool_type", "argmax"))
    causal, projection = text.attn_mask is not None, text.text_projection
    siglip = isinstance(projection, nn.Linear) and projection.bias is not None
    _refuse_odd(
        "text tower",
        {
            "layer scale": isinstance(first.ls_1, nn.Identity) and isinstance(first.ls_2, nn.Identity),
            "a class embedding": getattr(text, "cls_emb", None) is None,
            f"pooling {pool!r}, {'causal' if causal else 'not causal'}": (pool, causal)
            == (("last", False) if siglip else ("argmax", True)),
            "a mask of the padding": not getattr(text, "use_pad_mask", False),
        },
    )
    state = {key: value for key, value in text.state_dict().items() if not key.startswith("visual.")}
    act = _activation(first.mlp.gelu)
    return text_towers.text_tower(state, heads=first.attn.num_heads, hidden_act=act, eps=text.ln_final.eps)


def _of_open_clip(tower: nn.Module) -> Told:
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
    if not blocks or not hasattr(tower, "conv1"):
        raise ValueError(f"open_clip: only VisionTransformer towers and timm's are read, got {type(tower).__name__}")
    first = blocks[0]
    _refuse_odd(
        "tower",
        {
            "layer scale": isinstance(first.ls_1, nn.Identity) and isinstance(first.ls_2, nn.Identity),
            "no first LayerNorm": isinstance(getattr(tower, "ln_pre", None), nn.LayerNorm),
            "attention pooling": getattr(tower, "attn_pool", None) is None,
            "pooling other than the class token": getattr(tower, "pool_type", "tok") == "tok",
            "LayerNorm before pooling": not getattr(tower, "final_ln_after_pool", False),
        },
    )
    return Told(first.attn.num_heads, _activation(first.mlp.gelu), tower.ln_post.eps, tower.image_size[0])


def _of_timm(tower: nn.Module) -> Told:
    trunk, blocks = tower.trunk, getattr(tower.trunk, "blocks", None)
    if type(trunk).__name__ != "VisionTransformer" or not blocks:
        raise ValueError(f"open_clip: of timm's models only VisionTransformer is read, got {type(trunk).__name__}")
    first, pool = blocks[0], trunk.global_pool
    ends = [*tower.head, *(m for m in (trunk.fc_norm, trunk.head, trunk.norm_pre) if not isinstance(m, nn.Identity))]
    _refuse_odd(
        "tower",
        {
            f"pooling {pool!r}": pool in ("map", "avg", "token") and (pool == "token") == bool(trunk.num_prefix_tokens),
            "register tokens": trunk.num_prefix_tokens <= 1 and not trunk.no_embed_class,
            "another end or beginning": not ends,
            f"blocks of kind {type(first).__name__}": type(first).__name__ == "Block",
        },
    )
    return Told(first.attn.num_heads, _activation(first.mlp.act), trunk.norm.eps, tower.image_size[0])


def _refuse_odd(what: str, plain: dict[str, bool]) -> None:
    if odd := [name for name, ok in plain.items() if not ok]:
        raise ValueError(f"open_clip: this {what} has {', '.join(odd)}, which no tower of pyvidx has")


def _activation(module: nn.Module) -> str:
    if type(module).__name__ == "QuickGELU":
        return "quick_gelu"
    if type(module).__name__ == "GELUTanh" or getattr(module, "approximate", None) == "tanh":
        return "gelu_tanh"
    if getattr(module, "approximate", None) == "none" or type(module).__name__ == "GELU":
        return "gelu"
    raise ValueError(f"open_clip: the activation must be QuickGELU or GELU, got {module}")
