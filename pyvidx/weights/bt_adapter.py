"""Published BT-Adapter and CLIP weights into a BTAdapter, with a report of every key.

Nothing stays random in silence: a parameter that no file fills is an error unless it is allowed by name. The authors'
files, with the numbers of the public code:

    model, report = load_official("pretrain_btadapter_weight.pth")  # retrieval
    print(report)  # what became of every key
    video = model(pixels).pooled  # [B, 768]

    model, report = load_official("clip-vit-large-patch14", "sft_btadapter_weight.bin", part="tokens")  # chat
    projector = load_projector("sft_mm_projector.bin")  # pyvidx.weights.projector
    tokens = projector(model(pixels).tokens)  # [B, 257, 4096], for the language model

`model.save("folder")` writes what BTAdapter.from_pretrained reads.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyvidx.backbones.vit import ViT, ViTConfig
from pyvidx.models.bt_adapter import BTAdapter
from pyvidx.models.config import BTAdapterConfig
from pyvidx.weights.keys import Renamed, check_plain, groups, is_official, rename
from pyvidx.weights.place import MissingWeights, Report, match, place
from pyvidx.weights.state import Source as AnySource
from pyvidx.weights.state import naming, state_of
from pyvidx.weights.towers import Told, activation, published_heads, told_by

Source = AnySource | ViT
HALF = "0.5 in every channel, as in the public chat tower: its files hold no gates"
AXES = {
    "tower.position": 2, "tower.patch": 4, "tower.projection.weight": 2, "temporal.branch.time": 2,
    "temporal.branch.spatial.0.fc1.weight": 2,
}  # fmt: skip


def load_official(
    *sources: Source,
    part: str = "full",
    allow_missing: Sequence[str] = (),
    compat: str = "official",
    variant: str | None = None,
    **sizes: Any,
) -> tuple[BTAdapter, Report]:
    """A BTAdapter with the sizes of the given weights.

    Args:
        sources: files, folders, state dicts or modules; later ones replace weights of earlier ones (e.g. a CLIP, then a
            branch). Understood: the mma pretraining file, the llava tower (inference or training), the
            instruction-tuned branch, STAN, transformers', open_clip's and OpenAI's CLIP; in any wrappers and old
            spellings. Or a ViT (from pyvidx.hosts.huggingface or open_clip), which, as a folder with its
            config.json, also brings its heads, activation and eps.
        part: see BTAdapterConfig; "tokens" for the tuned branch (3 of 4 layers) on a CLIP.
        allow_missing: see load_weights.
        compat: see BTAdapter. The default gives the numbers of the public code, for which the weights were made.
        variant: see BTAdapter; default "llava" for parts "tokens" and "features" and where there is no projection, else
            "mma".
        sizes: what the weights do not tell, see infer_config.

    Returns:
        the model in eval mode, and the report. Parts "tokens" and "features" are gated, as the public chat tower is;
        gates that no file holds are 0.5, which report.assumed says.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file cannot be read or does not tell the sizes, or see load_weights.
    """
    with naming(sources):
        tables = [_table(source) for source in sources]
        known = next((told for source in reversed(sources) if (told := _told(source)) is not None), None)
        config = infer_config(tables, part=part, clip=known, **sizes)
        has_projection = any("tower.projection.weight" in table.weights for table in tables)
        variant = variant or ("mma" if has_projection and part == "full" else "llava")
        branch = max(_count(table.weights, "temporal.branch.spatial") for table in tables)
        if part == "full" and branch < config.depth:
            raise ValueError(
                f"checkpoint: the {branch} layers are a tuned branch, which makes tokens for a language model and no "
                'video embedding: pass part="tokens", or depth= if these are all there are'
            )
        assumed = {"temporal.branch.gate": HALF} if part != "full" and config.gated else {}
        with torch.device("meta"):  # nothing is allocated for sizes that the files do not fill
            match(BTAdapter(config, compat=compat, variant=variant), _shifted(tables, config), allow_missing, assumed)
        model = BTAdapter(config, compat=compat, variant=variant)
        return model, place(model, _shifted(tables, config), allow_missing, assumed)


def load_weights(model: BTAdapter, *sources: Source, allow_missing: Sequence[str] = ()) -> Report:
    """Fill a model from files or state dicts of any known naming, cast to its dtypes, and set it to eval mode.

    Layers are matched by their ORIGINAL index: a file of the reserved layers L-d to L-2, which counts them from 0, goes
    to those, and of a whole CLIP a model takes the layers it has.

    Args:
        allow_missing: patterns (fnmatch) of parameters that may stay as they are, e.g. "temporal.branch.gate" for the
            tuned branch, whose file has no gates.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file cannot be read, a parameter is missing and not allowed to be, a pattern matches no missing
            one, or a shape differs. The model is not changed then.
        RuntimeError: the model is a folded copy.
    """
    with naming(sources):
        return place(model, _shifted([_table(source) for source in sources], model.config), allow_missing)


def infer_config(
    tables: Sequence[Renamed],
    *,
    part: str = "full",
    clip: Told | ViTConfig | None = None,
    depth: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
    gated: bool | None = None,
    hidden_act: str | None = None,
) -> BTAdapterConfig:
    """Sizes from renamed weights.

    Args:
        clip: of the backbone, where it is known; in place of the defaults below.
        depth: d; default the branch layers there are, plus one where they come without a whole tower, as in tuning.
        layers: L of the whole CLIP, needed where no source holds a whole one.
        heads: default that of the published CLIPs, see pyvidx.weights.towers.published_heads.
        gated: default whether there are gates; for parts "tokens" and "features" True but of STAN.
        hidden_act: default "quick_gelu", as the official code always runs OpenAI's CLIP; with a warning where the
            backbone is of another file than the authors'.

    Raises:
        ValueError: the weights do not tell the sizes, or not without one of these arguments.
    """
    names = {name: value for table in tables for name, value in table.weights.items()}
    needed = ["tower.position", "temporal.branch.time", "temporal.branch.spatial.0.fc1.weight"]
    absent = [n for n in needed + ["tower.patch"] * (part != "features") if n not in names]
    if absent:
        raise MissingWeights(f"checkpoint: no sizes without {', '.join(absent)}; {_remedy(tables)}")
    check_plain(names, AXES)
    tokens, width = names["tower.position"].shape
    heads = clip.heads if heads is None and clip else heads
    heads = published_heads(width) if heads is None else heads
    if depth is None:
        depth = max(
            _count(table.weights, "temporal.branch.spatial") + (not _is_whole(table))
            for table in tables
            if "temporal.branch.spatial.0.fc1.weight" in table.weights
        )
    if layers is None:
        layers = max((_count(table.weights, "tower.blocks") for table in tables if _is_whole(table)), default=0)
    if layers < depth:
        raise ValueError("checkpoint: no source holds a whole CLIP, so pass layers=L of the one it was")
    patch = names["tower.patch"].shape[-1] if "tower.patch" in names else 1  # not needed behind the embeddings
    projection = names.get("tower.projection.weight") if part == "full" else None
    vision = ViTConfig(
        image_size=math.isqrt(tokens - 1) * patch,
        patch_size=patch,
        width=width,
        heads=heads,
        layers=layers,
        mlp_width=names["temporal.branch.spatial.0.fc1.weight"].shape[0],
        embed_dim=None if projection is None else projection.shape[0],
        hidden_act=hidden_act or (clip.hidden_act if clip else _activation(tables)),
        eps=clip.eps if clip else 1e-5,
    )
    return BTAdapterConfig(
        vision,
        depth=depth,
        time_length=names["temporal.branch.time"].shape[0],
        part=part,
        gated="temporal.branch.gate" in names or (part != "full" and not _is_stan(tables)) if gated is None else gated,
    )


def _activation(tables: Sequence[Renamed]) -> str:
    """OpenAI's, in silence where the backbone is of the authors' own file."""
    holder = next(table for table in reversed(tables) if "tower.position" in table.weights)
    return "quick_gelu" if is_official(holder.keys) else activation(None, stacklevel=5)


def _is_stan(tables: Sequence[Renamed]) -> bool:
    return any("STAN_" in key for table in tables for key in table.origin.get("temporal.branch.time", ()))


def _remedy(tables: Sequence[Renamed]) -> str:
    """What the weights look like, and what to do with those."""
    keys = [key for table in tables for key in table.keys]
    names = {name for table in tables for name in table.weights}
    if any(key.endswith(("blocks.0.qkv.weight", "keys_values.weight")) for key in keys):
        remedy = "they are of pyvidx's own save: from_pretrained of BTAdapter, VideoEncoder or MALMM reads that file"
    elif any("query_tokens" in key or "Qformer" in key for key in keys):
        remedy = "they look like MA-LMM's or BLIP-2's: pyvidx.weights.malmm.load_malmm reads those"
    elif any(name.startswith("temporal.branch.") for name in names):
        remedy = 'they are a branch alone: give its CLIP before it, load_official(clip, branch, part="tokens")'
    elif names:
        remedy = (
            "they are a CLIP alone: give the branch after it, or make an image tower of it with "
            "pyvidx.weights.towers.vision_tower(path)"
        )
    else:
        remedy = "none of them is understood"
    return f"the keys are {', '.join(groups(keys)) or 'none'}; {remedy}"


def _told(source: Source) -> Told | ViTConfig | None:
    if isinstance(source, ViT):
        return source.config
    return told_by(source) if isinstance(source, str | Path) else None


def _table(source: Source) -> Renamed:
    if isinstance(source, ViT):
        weights = {f"tower.{name}": p.detach() for name, p in source.named_parameters()}
        return Renamed(weights, origin={name: [name] for name in weights})
    return rename(state_of(source))


def _shifted(tables: Sequence[Renamed], config: BTAdapterConfig) -> list[Renamed]:
    """The tables with the original indices of their layers."""
    shifted = []
    for table in tables:
        offset = _layer_offset(table, config)
        name = lambda n: re.sub(r"(?<=tower\.blocks\.)\d+", lambda m: str(int(m[0]) + offset), n)  # noqa: B023, E731
        weights = {name(n): value for n, value in table.weights.items()}
        shifted.append(replace(table, weights=weights, origin={name(n): keys for n, keys in table.origin.items()}))
    return shifted


def _is_whole(table: Renamed) -> bool:
    """A whole tower, as against reserved layers or a branch alone."""
    return "tower.class_token" in table.weights


def _layer_offset(table: Renamed, config: BTAdapterConfig) -> int:
    """What to add to a source's backbone layer indices to get the original ones."""
    count = _count(table.weights, "tower.blocks")
    if count in (0, config.vision.layers):
        return 0
    if not _is_whole(table) and count == config.depth - 1:
        return config.fork
    raise ValueError(
        f"checkpoint: {count} backbone layers are neither the {config.vision.layers} of the whole tower "
        f"nor the {config.depth - 1} reserved ones"
    )


def _count(weights: Mapping[str, Tensor], base: str) -> int:
    return len({name[len(base) + 1 :].split(".")[0] for name in weights if name.startswith(base + ".")})
