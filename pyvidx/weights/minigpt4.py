"""Published weights into a MiniGPT4, with a report of every key.

    model, report = load_minigpt4("eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth", "btadapter_eva.pth",
                                  "pretrained_minigpt4.pth")
    print(report)

Of the tower the first 39 blocks are taken, of the branch the layers that read them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyvidx.models.minigpt4 import EVA_BRANCH, MiniGPT4, MiniGPT4Config
from pyvidx.weights import malmm, malmm_keys
from pyvidx.weights.keys import Renamed, add, count_layers, groups, without_wrappers
from pyvidx.weights.place import MissingWeights, Report, match, place
from pyvidx.weights.state import Source, naming, state_of

LAYER = re.compile(r"btadapter_([ST])\.(\d+)\.(.+)")
TEMPORAL = {"norm1": "norm", "temporal_fc": "fc"}
# Beside the tower in a file of BT-Adapter's pretraining.
LEFT_OUT = re.compile(r"(text_backbone|extra_proj|loss|llama_model|t5_proj|opt_proj)\.|.*rope\.|logit_scale$")


def load_minigpt4(*sources: Source, allow_missing: Sequence[str] = (), **sizes: Any) -> tuple[MiniGPT4, Report]:
    """A model with the sizes of the given weights.

    Args:
        sources: files, folders, state dicts or modules; later ones replace weights of earlier ones. Understood:
            EVA-ViT-g (eva_vit_g.pth), BLIP-2 of LAVIS or of transformers (its Q-Former and ln_vision), BT-Adapter's
            file of an EVA tower, with the tower or without, and MiniGPT-4's projector (llama_proj).
        allow_missing: patterns (fnmatch) of parameters that may stay random.
        sizes: what the weights do not tell, see infer_config.

    Returns:
        the model in eval mode, and the report.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file cannot be read or does not tell the sizes, a parameter is missing (named), or a shape
            differs.
    """
    with naming(sources):
        tables = [rename(state_of(source)) for source in sources]
        config = infer_config(tables, **sizes)
        with torch.device("meta"):  # nothing is allocated for sizes that the files do not fill
            match(MiniGPT4(config), tables, allow_missing)
        model = MiniGPT4(config)
        return model, place(model, tables, allow_missing)


def rename(state: Mapping[str, Tensor]) -> Renamed:
    """The weights of a file under MiniGPT4's names.

    Raises:
        ValueError: a part of a stacked weight is missing, or two keys mean the same weight.
    """
    result, tower, branch = Renamed(), {}, {"S": {}, "T": {}}
    names = [name.removeprefix("backbone.") for name in without_wrappers(list(state), _is_known)]
    for (key, value), name in zip(state.items(), names):
        if found := LAYER.fullmatch(name):
            branch[found[1]][f"visual_encoder.blocks.{found[2]}.{found[3]}"] = (key, value)
        elif name in ("btadapter_cls", "btadapter_position.weight"):
            seed = name == "btadapter_cls"
            add(
                result,
                "encoder.temporal.branch." + ("seed" if seed else "time"),
                value.flatten() if seed else value,
                key,
            )
        elif LEFT_OUT.match(name):
            result.left_out.append(key)
        else:
            tower[name.replace("llama_proj.", "llm_proj.")] = (key, value)
    _take(result, tower, lambda name: name.replace("vision.norm_post.", "norm.").replace("vision.", "encoder.tower."))
    for kind, layers in branch.items():
        extra = {name: pair for name, pair in layers.items() if ".temporal_fc." in name}
        base = "encoder.temporal.branch." + ("spatial" if kind == "S" else "temporal")
        for name, (key, value) in extra.items():
            add(result, _branch_name(name.replace("visual_encoder.", "vision."), base, kind), value, key)
        rest = {name: pair for name, pair in layers.items() if name not in extra}
        _take(result, rest, lambda name: _branch_name(name, base, kind))  # noqa: B023
    return result


def _is_known(name: str) -> bool:
    name = name.removeprefix("backbone.")
    return bool(LAYER.fullmatch(name) or name.startswith(("btadapter_", "llama_proj.", "query_tokens", "cls_token")))


def _take(result: Renamed, named: Mapping[str, tuple[str, Tensor]], place: Callable[[str], str]) -> None:
    """Rename as MA-LMM's weights are, then by `place`; keys of the report are those of the file."""
    if not named:
        return
    found = malmm_keys.rename({name: value for name, (_, value) in named.items()})
    for name, value in found.weights.items():
        add(result, place(name), value, *(named[n][0] for n in found.origin[name]))
    result.left_out += [named[name][0] for name in found.left_out]
    result.unexpected += [named[name][0] for name in found.unexpected]


def _branch_name(name: str, base: str, kind: str) -> str:
    """vision.blocks.0.norm1.weight -> encoder.temporal.branch.temporal.0.norm.weight."""
    _, _, index, inner, leaf = name.split(".")
    return f"{base}.{index}.{TEMPORAL.get(inner, inner) if kind == 'T' else inner}.{leaf}"


def infer_config(
    tables: Sequence[Renamed],
    *,
    depth: int | None = None,
    layers: int | None = None,
    vision_heads: int | None = None,
    heads: int | None = None,
) -> MiniGPT4Config:
    """Sizes from renamed weights.

    Args:
        depth: d, branch layers of the whole BT-Adapter; default those there are.
        layers: of the whole tower; default those there are, and 40 where 39 of EVA-ViT-g are.
        vision_heads, heads: see pyvidx.weights.malmm.infer_config.

    Raises:
        ValueError: the weights do not tell the sizes, or not without one of these arguments.
    """
    names = {name: value for table in tables for name, value in table.weights.items()}
    needed = ["encoder.temporal.branch.time", "encoder.temporal.branch.spatial.0.fc1.weight", "projection.weight"]
    needed += ["encoder.tower.position", "encoder.tower.blocks.0.fc1.weight", "norm.weight", "qformer.query_tokens"]
    if absent := [name for name in needed if name not in names]:
        keys = [key for table in tables for key in table.keys]
        raise MissingWeights(
            f"minigpt4: no sizes without {', '.join(absent)}; the keys are {', '.join(groups(keys)) or 'none'}; there "
            "must be EVA-ViT-g, BLIP-2's Q-Former, BT-Adapter's branch for EVA, and MiniGPT-4's llama_proj"
        )
    like = [
        replace(table, weights={n.replace("encoder.tower.", "vision."): v for n, v in table.weights.items()})
        for table in tables
    ]
    if layers is None:
        layers = count_layers(names, "encoder.tower.blocks.")
        layers = 40 if (layers, names["norm.weight"].shape[0]) == (39, EVA_BRANCH.vision.width) else layers
    found = malmm.infer_config(like, vision_heads=vision_heads, heads=heads, layers=layers)
    encoder = replace(
        EVA_BRANCH,
        vision=replace(found.vision, norm_eps=None),
        depth=count_layers(names, "encoder.temporal.branch.spatial.") if depth is None else depth,
        time_length=len(names["encoder.temporal.branch.time"]),
    )
    return MiniGPT4Config(
        encoder, replace(found.qformer, vocab=None), llm_width=found.llm_width, norm_eps=found.vision.norm_eps
    )
