"""Published weights into pyvidx's files and back, with a report of every key.

converted = to_pyvidx(["clip-vit-large-patch14", "sft_btadapter_weight.bin"], part="tokens")
print(converted)
converted.save("chat.safetensors")
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyvidx.files import whole, write_tensors
from pyvidx.hosts import open_clip
from pyvidx.hosts.open import check_source, is_published, open_model
from pyvidx.models import MALMM, BTAdapter, TextVideo, files
from pyvidx.weights.malmm import export_malmm, load_malmm
from pyvidx.weights.malmm_keys import is_malmm
from pyvidx.weights.mma_export import export_names
from pyvidx.weights.place import Report
from pyvidx.weights.state import naming, state_of

NAMINGS = ("official", "lavis", "huggingface")


@dataclass(frozen=True)
class Converted:
    """What was read, to be written.

    Attributes:
        what: it is, in a line or two.
        content: a model with `save`, or weights under published names.
        report: what became of every key; None where a file of pyvidx was read, which holds just its model.
        names: key -> the name it got, of all keys that were placed.
    """

    what: str
    content: nn.Module | dict[str, Tensor]
    report: Report | None = None
    names: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.report is None:
            return self.what
        changed = sum(key != name for key, name in self.names.items())
        placed = f"placed {len(self.names)} keys, {changed} of them under another name"
        return f"{self.what}\n{placed}\n{self.report}"

    def save(self, path: str | Path) -> Path:
        """Write it: pyvidx's file, or published names as .safetensors or, as the public code does, .pth."""
        if isinstance(self.content, nn.Module):
            return self.content.save(path)
        if Path(path).suffix == ".safetensors":
            return write_tensors(path, self.content, {})
        with whole(path) as part:
            torch.save({"meta": {}, "state_dict": self.content}, part)
        return Path(path)


def to_pyvidx(sources: Sequence[str], module: str | None = None, **options: Any) -> Converted:
    """A model of pyvidx from published weights, or from its own file another module or compat.

    Args:
        sources: see open_model; of BT-Adapter and MA-LMM several, later ones over earlier ones.
        module: see open_model. Files with a Q-Former become an MA-LMM without one, with one their image tower is taken.
        options: of open_model, load_official or load_malmm.

    Raises:
        MissingWeights: none of the files fills a parameter.
        FileNotFoundError, RuntimeError, ValueError: see open_model and load_malmm.
    """
    if not sources:
        raise ValueError("convert: there must be a source at least, got none")
    states = [state_of(source) for source in sources] if not module and all(map(is_published, sources)) else []
    if any(map(is_malmm, states)):
        if wrong := options.keys() - {"allow_missing", "compat", "heads", "vision_heads"}:
            raise ValueError(f"convert: {', '.join(sorted(wrong))} must not be given for an MA-LMM")
        with naming(sources):
            model, report = load_malmm(*states, **options)
        return Converted(f"MA-LMM of {', '.join(sources)}", model, report, _names(report))
    encoder, loaded = open_model(sources, module, **options)
    return Converted(str(loaded), encoder, loaded.report, _names(loaded.report))


def to_published(source: str, naming: str) -> Converted:
    """The weights of a file of pyvidx under published names.

    Args:
        naming: "official", of BT-Adapter's pretraining file (a TextVideo's text tower is with it), or "lavis" or
            "huggingface", of MA-LMM. LAVIS has no bias of the image tower's keys, which has no influence either: it
            adds the same number to all scores of a query.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or its model has no such names.
    """
    check_source(source)
    if source.startswith(open_clip.SCHEME) or is_published(source):
        raise ValueError(f"convert: only what pyvidx saved gets published names, {source} is not of it")
    kind = files.kind(source)
    wanted = ("malmm",) if naming != "official" else ("bt_adapter", "text_video")
    if kind not in wanted:
        raise ValueError(f"convert: {naming} names are those of a {' or '.join(wanted)}, {source} holds a {kind}")
    if kind == "malmm":
        weights = export_malmm(MALMM.from_pretrained(source), naming)
    else:
        weights = export_names(_parameters(source, kind))
    return Converted(f"{kind} of {source} under {naming} names, {len(weights)} keys", weights)


def _parameters(source: str, kind: str) -> Mapping[str, Tensor]:
    if kind == "bt_adapter":
        model, text = BTAdapter.from_pretrained(source), None
    else:
        both = TextVideo.load(source)
        model, text = both.model, both.text
    if model.config.part != "full":
        raise ValueError(f"convert: {source} holds part {model.config.part!r} of a BT-Adapter, which has no file")
    found = {f"model.{name}": p for name, p in model.named_parameters()}
    return found | ({} if text is None else {f"text.{name}": p for name, p in text.named_parameters()})


def _names(report: Report | None) -> dict[str, str]:
    return {} if report is None else {key: name for name, keys in report.origin.items() for key in keys}
