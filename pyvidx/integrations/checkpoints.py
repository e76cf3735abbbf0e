"""Published BT-Adapter and CLIP weights into a BTAdapter, with a report of every key.

Nothing stays random in silence: a parameter that no file fills is an error unless it is allowed by name.

    model, report = load_official("pretrain_btadapter_weight.pth")           # the whole mma model
    print(report)
    model.save("bt-adapter-l14")                                             # safetensors, read by from_pretrained
"""

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pyvidx.backbones.clip import CLIPVision, CLIPVisionConfig
from pyvidx.integrations.keys import Renamed, rename
from pyvidx.models.bt_adapter import BTAdapter
from pyvidx.models.config import BTAdapterConfig

Source = str | Path | Mapping[str, Tensor] | CLIPVision


@dataclass
class Report:
    """What became of every key and every parameter. print() it.

    Attributes:
        loaded: parameters filled.
        missing: parameters that nothing filled and that were allowed to stay as they were.
        left_out: known keys without a place in a video tower (text tower, training heads).
        unused: keys understood, but not part of this model (e.g. layers that part="tokens" does not have).
        unexpected: keys that are not understood.
        reshaped: (parameter, shape in the file, shape here).
        replaced: parameters that a later source took over from an earlier one.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[tuple[str, tuple, tuple]] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} parameters"]
        for name in ("missing", "unexpected", "unused", "left_out", "replaced"):
            keys = getattr(self, name)
            if keys:
                lines.append(f"{name} {len(keys)}: {', '.join(_groups(keys))}")
        lines += [f"reshaped {name}: {before} -> {after}" for name, before, after in self.reshaped]
        return "\n".join(lines)


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a pickle (.pth, .bin, .pt), which is read with weights_only=True.

    A "state_dict" or "model" entry around them is taken off.

    Raises:
        FileNotFoundError, ValueError: no such file; a pickle that is truncated or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"checkpoint: {path} is not a pickle of plain tensors or is truncated; pickles are only read "
            f"with weights_only=True ({error})"
        ) from error
    return _unwrapped(content, path)


def load_official(
    *sources: Source,
    part: str = "full",
    allow_missing: Sequence[str] = (),
    compat: str = "official",
    tower: str | None = None,
    **sizes,
) -> tuple[BTAdapter, Report]:
    """A BTAdapter with the sizes of the given weights.

    Args:
        sources: files or state dicts; later ones replace weights of earlier ones (e.g. a CLIP, then a branch).
            Understood: the mma pretraining file, the llava tower (inference or training), the instruction-tuned branch,
            STAN, transformers' and open_clip's CLIP; with their wrappers and old spellings. Or a CLIPVision (from
            pyvidx.integrations.huggingface or open_clip), which also brings its heads, activation and eps.
        part: see BTAdapterConfig; "tokens" for the tuned branch (3 of 4 layers) on a CLIP.
        allow_missing: see load_weights.
        compat, tower: see BTAdapter; the default tower is "mma" where there is a projection, else "llava".
        sizes: what the weights do not tell, see infer_config.

    Returns:
        the model in eval mode, and the report.
    """
    tables = [_table(source) for source in sources]
    known = next((source.config for source in sources if isinstance(source, CLIPVision)), None)
    config = infer_config(tables, part=part, clip=known, **sizes)
    has_projection = any("backbone.projection.weight" in table.weights for table in tables)
    model = BTAdapter(config, compat=compat, tower=tower or ("mma" if has_projection else "llava"))
    return model, _fill(model, tables, allow_missing)


def load_weights(model: BTAdapter, *sources: Source, allow_missing: Sequence[str] = ()) -> Report:
    """Fill a model from files or state dicts of any known naming, cast to its dtypes, and set it to eval mode.

    Layers are matched by their ORIGINAL index: a file of the reserved layers L-d to L-2, which counts them from 0, goes
    to those, and of a whole CLIP a model takes the layers it has.

    Args:
        allow_missing: patterns (fnmatch) of parameters that may stay as they are, e.g. "branch.gate" for the tuned
            branch, whose file has no gates.

    Raises:
        ValueError: a parameter is missing and not allowed to be, a pattern matches no missing one, or a shape differs.
            The model is not changed then.
    """
    return _fill(model, [_table(source) for source in sources], allow_missing)


def infer_config(
    tables: Sequence[Renamed],
    *,
    part: str = "full",
    clip: CLIPVisionConfig | None = None,
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
        heads: default width / 64, as in every published CLIP.
        gated: default whether there are gates.
        hidden_act: default "quick_gelu": the official code always runs OpenAI's CLIP.
    """
    names = {name: value for table in tables for name, value in table.weights.items()}
    needed = ["backbone.position", "branch.time", "branch.spatial.0.fc1.weight"]
    absent = [n for n in needed + ["backbone.patch"] * (part != "features") if n not in names]
    if absent:
        raise ValueError(f"checkpoint: no sizes without {', '.join(absent)}")
    tokens, width = names["backbone.position"].shape
    heads = clip.heads if heads is None and clip else heads
    if heads is None and width % 64:
        raise ValueError(f"checkpoint: width {width} is not a multiple of 64, so pass heads=")
    if depth is None:
        depth = max(
            _count(table.weights, "branch.spatial") + (not _is_whole(table))
            for table in tables
            if "branch.spatial.0.fc1.weight" in table.weights
        )
    if layers is None:
        layers = max((_count(table.weights, "backbone.blocks") for table in tables if _is_whole(table)), default=0)
    if layers < depth:
        raise ValueError("checkpoint: no source holds a whole CLIP, so pass layers=L of the one it was")
    patch = names["backbone.patch"].shape[-1] if "backbone.patch" in names else 1  # not needed behind the embeddings
    projection = names.get("backbone.projection.weight") if part == "full" else None
    vision = CLIPVisionConfig(
        image_size=math.isqrt(tokens - 1) * patch,
        patch_size=patch,
        width=width,
        heads=heads or width // 64,
        layers=layers,
        mlp_width=names["branch.spatial.0.fc1.weight"].shape[0],
        embed_dim=None if projection is None else projection.shape[0],
        hidden_act=hidden_act or (clip.hidden_act if clip else "quick_gelu"),
        eps=clip.eps if clip else 1e-5,
    )
    return BTAdapterConfig(
        vision,
        depth=depth,
        time_length=names["branch.time"].shape[0],
        part=part,
        gated="branch.gate" in names if gated is None else gated,
    )


def _table(source: Source) -> Renamed:
    if isinstance(source, CLIPVision):
        weights = {f"backbone.{name}": p.detach() for name, p in source.named_parameters()}
        return Renamed(weights, origin={name: [name] for name in weights})
    return rename(state_of(source))


def state_of(source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict out of its wrappers, or `read` from a file."""
    return _unwrapped(source, "state dict") if isinstance(source, Mapping) else read(source)


def _unwrapped(content, where) -> dict[str, Tensor]:
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"checkpoint: {where} must hold a state dict (name -> tensor)")
    return dict(content)


def _fill(model: BTAdapter, tables: Sequence[Renamed], allow_missing: Sequence[str]) -> Report:
    if model.folded:
        raise RuntimeError("checkpoint: a folded copy does not take weights; load the model and fold again")
    shifted = []
    for table in tables:
        offset = _layer_offset(table, model.config)
        name = lambda n: re.sub(r"(?<=backbone\.blocks\.)\d+", lambda m: str(int(m[0]) + offset), n)  # noqa: B023, E731
        weights = {name(n): value for n, value in table.weights.items()}
        shifted.append(replace(table, weights=weights, origin={name(n): keys for n, keys in table.origin.items()}))
    return place(model, shifted, allow_missing)


def place(model: nn.Module, tables: Sequence[Renamed], allow_missing: Sequence[str] = ()) -> Report:
    """Copy renamed weights into the parameters of these names, later tables over earlier ones, all or nothing.

    The model is in eval mode and not `is_random` afterwards. allow_missing, Raises: as in load_weights.
    """
    report, found, wrong = Report(), {}, []
    own = dict(model.named_parameters())
    for table in tables:
        report.left_out += table.left_out
        report.unexpected += table.unexpected
        report.reshaped += table.reshaped
        for name, value in table.weights.items():
            if name not in own:
                report.unused += table.origin[name]
            elif value.shape != own[name].shape:
                wrong.append(f"{name} is {tuple(own[name].shape)}, the file has {tuple(value.shape)}")
            else:
                report.replaced += [name] if name in found else []
                found[name] = value
    missing = sorted(own.keys() - found.keys())
    refused = [name for name in missing if not any(fnmatch.fnmatchcase(name, p) for p in allow_missing)]
    idle = [p for p in allow_missing if not fnmatch.filter(missing, p)]
    if wrong:
        raise ValueError("checkpoint: shapes differ: " + "; ".join(wrong))
    if refused:
        raise ValueError(
            f"checkpoint: nothing fills {len(refused)} parameters: {', '.join(_groups(refused))}; name "
            f"them in allow_missing to leave them as they are\n{report}"
        )
    if idle:
        raise ValueError(f"checkpoint: allow_missing has patterns that match no missing parameter: {', '.join(idle)}")
    with torch.no_grad():
        for name, value in found.items():
            own[name].copy_(value)
    report.loaded, report.missing = sorted(found), missing
    model.is_random = False
    model.eval()
    return report


def _is_whole(table: Renamed) -> bool:
    """A whole tower, as against reserved layers or a branch alone."""
    return "backbone.class_token" in table.weights


def _layer_offset(table: Renamed, config: BTAdapterConfig) -> int:
    """What to add to a source's backbone layer indices to get the original ones."""
    count = _count(table.weights, "backbone.blocks")
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


def _groups(names: Sequence[str]) -> list[str]:
    """Names for people: indices and weight/bias folded together, with a count."""
    counts: dict[str, int] = {}
    for name in names:
        group = re.sub(r"\.\d+(?=\.)", ".*", re.sub(r"\.(weight|bias)$", "", name))
        counts[group] = counts.get(group, 0) + 1
    return [group if n == 1 else f"{group} ({n})" for group, n in counts.items()]
