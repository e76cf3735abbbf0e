"""Published weights into an MALMM and out of it again, with a report of every key.

    model, report = load_malmm("eva_vit_g.pth", "instruct_blip_vicuna7b_trimmed.pth", "fine_tuned.pth")
    print(report)
    save_file(export_malmm(model, "lavis"), "malmm.safetensors")

A later source replaces the weights of an earlier one: a fine-tuned file holds only what was trained. Word for word the
same works with the files of transformers' InstructBLIP and BLIP-2.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyvidx.backbones.vit import EVA_G
from pyvidx.layers.patch import resize_positions
from pyvidx.memory.qformer import QFormerConfig
from pyvidx.models.malmm import MALMM
from pyvidx.models.malmm_config import MALMMConfig
from pyvidx.weights.keys import Renamed, check_plain, groups
from pyvidx.weights.malmm_keys import export, rename
from pyvidx.weights.place import MissingWeights, Report, match, place
from pyvidx.weights.state import Source, naming, state_of

AXES = {
    "vision.position": 2, "vision.patch": 4, "vision.blocks.0.fc1.weight": 2, "qformer.query_tokens": 2,
    "qformer.word": 2, "qformer.position": 2, "qformer.layers.0.feed_query.fc1.weight": 2, "projection.weight": 2,
    "time": 2,
}  # fmt: skip


def load_malmm(
    *sources: Source, allow_missing: Sequence[str] = (), compat: str = "official", **sizes: Any
) -> tuple[MALMM, Report]:
    """A model with the sizes of the given weights.

    Args:
        sources: files, folders, state dicts or modules: eva_vit_g, LAVIS' InstructBLIP or BLIP-2 (with or without its
            vision tower and its language model, which is left out), MA-LMM's fine-tuned files, and transformers'
            InstructBLIP, InstructBLIP-Video or BLIP-2. Weights without a temporal table give a model without one.
        allow_missing: patterns (fnmatch) of parameters that may stay random, e.g. "vision.blocks.*".
        compat: see MALMM.
        sizes: what the weights do not tell, see infer_config.

    Returns:
        the model in eval mode, and the report.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file cannot be read or does not tell the sizes, or see load_malmm_weights.
    """
    with naming(sources):
        tables = [rename(state_of(source)) for source in sources]
        config = infer_config(tables, **sizes)
        with torch.device("meta"):  # nothing is allocated for sizes that the files do not fill
            match(model := MALMM(config, compat=compat), [_resized(table, model) for table in tables], allow_missing)
        model = MALMM(config, compat=compat)
        return model, _fill(model, tables, allow_missing)


def load_malmm_weights(model: MALMM, *sources: Source, allow_missing: Sequence[str] = ()) -> Report:
    """Fill a model from files or state dicts, cast to its dtypes, and set it to eval mode.

    A position table of another grid is resized, bicubic, as the public code does.

    Args:
        allow_missing: patterns (fnmatch) of parameters that may stay as they are, e.g. "time" for weights of
            InstructBLIP in a model that is to be fine-tuned.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file cannot be read, a parameter is missing and not allowed to be, a pattern matches no missing
            one, or a shape differs. The model is not changed then.
        RuntimeError: the model is a folded copy.
    """
    with naming(sources):
        return _fill(model, [rename(state_of(source)) for source in sources], allow_missing)


def export_malmm(model: MALMM, naming: str) -> dict[str, Tensor]:
    """Copies of the weights under the names of "lavis" or of "huggingface", without a language model.

    Raises:
        ValueError: another naming.
        RuntimeError: the model is a folded copy.
    """
    model.check_whole()
    return export(model.state_dict(), naming, cross_every=model.config.qformer.cross_every)


def infer_config(
    tables: Sequence[Renamed],
    *,
    vision_heads: int | None = None,
    heads: int | None = None,
    layers: int | None = None,
    image_size: int | None = None,
    norm_eps: float | None = None,
    time_length: int | None = None,
) -> MALMMConfig:
    """Sizes from renamed weights.

    Args:
        vision_heads, heads: of the tower and of the Q-Former; default those of the published widths: 16 of 1408, and
            width / 64.
        layers: of the tower; default those there are, of EVA-ViT-g's 40 the first 39, as in the public code.
        image_size: pixels; default what the position table is made for.
        norm_eps: of the LayerNorm after the tower; default 1e-5, or 1e-6 where all weights are named as in
            transformers, whose model has that.
        time_length: rows of the temporal table; default those there are, or none. 120 for fine-tuning as published.

    Raises:
        ValueError: the weights do not tell the sizes, or not without one of these arguments.
    """
    names = {name: value for table in tables for name, value in table.weights.items()}
    needed = ["vision.position", "vision.patch", "vision.blocks.0.fc1.weight", "qformer.query_tokens"]
    needed += ["qformer.keys_values.weight", "qformer.layers.0.feed_query.fc1.weight"]
    absent = [name for name in needed if name not in names]
    if absent:
        raise MissingWeights(f"checkpoint: no sizes without {', '.join(absent)}; {_remedy(tables)}")
    check_plain(names, AXES)
    tokens, C = names["vision.position"].shape
    Q, D = names["qformer.query_tokens"].shape
    if vision_heads is None and C != 1408:
        raise ValueError(f"checkpoint: width {C} is not that of EVA-ViT-g, 1408, so pass vision_heads=")
    if heads is None and D % 64:
        raise ValueError(f"checkpoint: the Q-Former's width {D} is not a multiple of 64, so pass heads=")
    if layers is None:
        layers = len(_indices(names, "vision.blocks."))
        layers = 39 if (layers, C) == (40, 1408) else layers
    patch = names["vision.patch"].shape[-1]
    if norm_eps is None:
        keys = [key for table in tables for origin in table.origin.values() for key in origin]
        norm_eps = 1e-6 if any("post_layernorm" in key for key in keys) else 1e-5
    crossing = _indices(names, "qformer.layers.", ".cross.query.weight")
    projection, time = names.get("projection.weight"), names.get("time")
    return MALMMConfig(
        replace(
            EVA_G,
            image_size=math.isqrt(tokens - 1) * patch if image_size is None else image_size,
            patch_size=patch,
            width=C,
            heads=16 if vision_heads is None else vision_heads,
            layers=layers,
            mlp_width=names["vision.blocks.0.fc1.weight"].shape[0],
            norm_eps=norm_eps,
        ),
        QFormerConfig(
            width=D,
            heads=D // 64 if heads is None else heads,
            layers=len(_indices(names, "qformer.layers.")),
            mlp_width=names["qformer.layers.0.feed_query.fc1.weight"].shape[0],
            queries=Q,
            cross_every=crossing[1] - crossing[0] if len(crossing) > 1 else len(_indices(names, "qformer.layers.")),
            encoder_width=C,
            vocab=names["qformer.word"].shape[0] if "qformer.word" in names else None,
            text_length=names["qformer.position"].shape[0] if "qformer.position" in names else 512,
        ),
        llm_width=None if projection is None else projection.shape[0],
        time_length=time_length if time_length is not None else 0 if time is None else len(time),
    )


def _remedy(tables: Sequence[Renamed]) -> str:
    """What the weights look like, and what to do with those."""
    keys = [key for table in tables for key in table.keys]
    names = {name.partition(".")[0] for table in tables for name in table.weights}
    if any("keys_values" in key or key.endswith("blocks.0.qkv.bias") for key in keys):
        remedy = "they are of pyvidx's own save: MALMM.from_pretrained reads that file"
    elif any("btadapter" in key or "timesFPN" in key for key in keys):
        remedy = "they look like BT-Adapter's: pyvidx.weights.bt_adapter.load_official reads those"
    elif names == {"vision"}:
        remedy = "they are the image tower alone: give the file of the Q-Former after it"
    elif names:
        remedy = "the image tower is not among them: give eva_vit_g.pth, and what was trained after it"
    else:
        remedy = "none of them is understood"
    return f"the keys are {', '.join(groups(keys)) or 'none'}; {remedy}"


def _fill(model: MALMM, tables: Sequence[Renamed], allow_missing: Sequence[str]) -> Report:
    return place(model, [_resized(table, model) for table in tables], allow_missing)


def _resized(table: Renamed, model: MALMM) -> Renamed:
    """The table with its position table on the model's grid."""
    positions, own = table.weights.get("vision.position"), model.vision.position
    if positions is None or positions.shape == own.shape or positions.shape[1:] != own.shape[1:]:
        return table
    patches = len(positions) - 1
    if patches < 1 or math.isqrt(patches) ** 2 != patches:  # no square grid: its shape is refused later
        return table
    side = math.isqrt(own.shape[0] - 1)
    shapes = ("vision.position", tuple(positions.shape), tuple(own.shape))
    weights = table.weights | {"vision.position": resize_positions(positions, side, side)}
    return replace(table, weights=weights, reshaped=[*table.reshaped, shapes])


def _indices(names: Iterable[str], prefix: str, suffix: str = "") -> list[int]:
    inner = [name.removeprefix(prefix) for name in names if name.startswith(prefix) and name.endswith(suffix)]
    return sorted({int(name.split(".")[0]) for name in inner})
