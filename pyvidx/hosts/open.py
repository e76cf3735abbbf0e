"""One door for every model: what a command's --model and --module name becomes an encoder, and a word on what it is.

    encoder, loaded = open_model("clip-vit-large-patch14", "stan:depth=2")
    print(loaded)
    encoder(pixels).pooled  # [B, T, 3, h, w] -> [B, E]

`opened` gives a tower alone as it is, `open_text` the text tower beside it.
"""

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyvidx import temporal
from pyvidx.backbones.text import TextTower
from pyvidx.backbones.vit import ViT
from pyvidx.data.tables import read_json
from pyvidx.hosts import open_clip
from pyvidx.models import BTAdapter, BTAdapterConfig, TextVideo, VideoEncoder, files
from pyvidx.spec import parse
from pyvidx.weights.bt_adapter import load_official
from pyvidx.weights.keys import is_official
from pyvidx.weights.place import Report, match
from pyvidx.weights.state import naming, state_of
from pyvidx.weights.text_towers import text_tower
from pyvidx.weights.towers import told_by, tower_names, vision_tower

SAVED = {
    "bt_adapter": BTAdapter.from_pretrained,
    "video_encoder": VideoEncoder.from_pretrained,
    "text_video": lambda path, **compat: TextVideo.load(path, **compat).model,
}


@dataclass(frozen=True)
class Loaded:
    """What was opened; str() of it is the two lines that commands show.

    Attributes:
        model: where the tower is from, and its sizes.
        module: the temporal module, its options, and where its weights are from.
        preset: the preprocessing that the tower was trained with, of pyvidx.preprocess.PRESETS.
        report: what became of every key, where published names were read.
    """

    model: str
    module: str
    preset: str
    report: Report | None = None

    def __str__(self) -> str:
        return f"model: {self.model}, pixels as {self.preset}\nmodule: {self.module}"


Source = str | os.PathLike[str]
OFFICIAL = ("part", "allow_missing", "variant", "depth", "layers", "heads", "gated", "hidden_act")
TOWER = ("heads", "hidden_act", "eps", "image_size")


def open_model(
    source: Source | Sequence[Source] | None = None,
    module: str | None = None,
    *,
    compat: str | None = None,
    **options: Any,
) -> tuple[VideoEncoder, Loaded]:
    """The encoder that a source and a module's name mean, in eval mode, and what was loaded.

    Nothing is downloaded, but by open_clip where a source is open_clip:NAME:TAG.

    Args:
        source: a file or folder that `save` of BTAdapter, VideoEncoder or TextVideo wrote; a folder of transformers; a
            published file (BT-Adapter's, STAN's, a CLIP's, TorchScript or not); open_clip:NAME, with random weights, or
            open_clip:NAME:FILE. None: the model that ships with pyvidx. Several: published files, later ones over
            earlier ones, such as a CLIP and the branch that was trained on it.
        module: a temporal module, NAME or NAME:OPTION=VALUE,..., see `parse_module`. Default the source's own, and
            "mean" for a tower alone. Another one than the source's is made for its tower, with random weights, always
            the same ones.
        compat: of BT-Adapter, see BTAdapter; default as saved, and "official" for published weights.
        options: what published weights do not tell, see pyvidx.weights.bt_adapter.load_official (gated, part, heads,
            ...) and pyvidx.weights.towers.vision_tower (heads, hidden_act, eps, image_size).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read or is no encoder; a module, an option or a combination of them is unknown.
        RuntimeError: open_clip is asked for and not installed, or cannot get its weights.
    """
    name, sizes = (None, {}) if module is None else parse_module(module)
    sources = [] if source is None else [source] if isinstance(source, str | os.PathLike) else list(source)
    found = opened(sources, compat, **options)
    if isinstance(found.what, ViT):
        return _joined(found, found.what, name or "mean", sizes)
    own = _own_module(found.what)
    if name is not None and name != own["name"]:
        return _joined(found, found.what.tower, name, sizes)
    if differing := {k: v for k, v in sizes.items() if {**_options(own["name"]), **own}[k] != v}:
        raise ValueError(
            f"open_model: the model {found.said} holds {_named(own)}, which cannot become {_named(differing, name)}"
        )
    weights = "random weights" if found.random else "its own weights"
    return found.what, _told(found, found.what.tower, f"{_named(own)}, {weights}")


class Opened(NamedTuple):
    """A whole encoder, or a tower alone; where it is from; what became of its keys; whether it is from no file; whether
    a configuration beside it says that its images are resized bilinearly."""

    what: VideoEncoder | ViT
    said: str
    report: Report | None = None
    random: bool = False
    bilinear: bool = False


def open_text(source: Source, **options: Any) -> TextTower:
    """The text tower that lies with a model, frozen and in eval mode.

    Args:
        source: as of open_model: a TextVideo's file, a folder of transformers, a published file with a text tower, or
            open_clip:NAME[:FILE].
        options: what published weights do not tell: heads, hidden_act, eps.

    Raises:
        FileNotFoundError, RuntimeError: see open_model.
        ValueError: it holds no text tower, or cannot be read.
    """
    source = os.fspath(source)
    check_source(source)
    if source.startswith(open_clip.SCHEME):
        _only((), options, source)
        return open_clip.text_tower(open_clip.named(source)[0])
    if not files.is_ours(source):
        with naming([source]):
            return text_tower(source, **options)
    if (kind := files.kind(source)) != "text_video":
        raise ValueError(f"open_text: {source} holds a {kind}, without a text tower: name the file that has it")
    _only((), options, source)
    return TextVideo.load(source).text


def holds_text(source: Source) -> bool:
    """Whether there is a text tower for open_text.

    Raises:
        FileNotFoundError, ValueError: it is not there or cannot be read.
    """
    source = os.fspath(source)
    if not is_published(source):
        return source.startswith(open_clip.SCHEME) or files.kind(source) == "text_video"
    return any("token_embedding" in key for key in state_of(source))


def is_published(source: Source) -> bool:
    """A file or folder that is not pyvidx's own."""
    return not os.fspath(source).startswith(open_clip.SCHEME) and not files.is_ours(source)


def parse_module(text: str) -> tuple[str, dict[str, Any]]:
    """A temporal module and its options: "stan" or "stan:depth=2,per_frame=True".

    Raises:
        ValueError: the name or an option is unknown, or it does not read.
    """
    name, options = parse(text)
    if name not in temporal.MODULES:
        raise ValueError(f"module: it must be one of {', '.join(temporal.names())}, got {name!r:.100}")
    known = _options(name)
    if unknown := [option for option in options if option not in known]:
        takes = f"takes {', '.join(known)}" if known else "takes no options"
        raise ValueError(f"module: {name} {takes}, got {', '.join(unknown)}")
    return name, options


def check_source(source: str) -> None:
    """Raise before anything is loaded if there is no such model to open.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is a URL, or open_clip knows no such name.
        RuntimeError: open_clip is asked for and not installed.
    """
    if source.startswith(open_clip.SCHEME):
        open_clip.parse(source)
        return
    if "://" in source:
        raise ValueError(f"pyvidx reads files: download {source} and give its path")
    path = Path(source)
    if source and os.path.exists(path):
        return
    hub = source.count("/") == 1 and not path.parent.is_dir() and not path.suffix
    hint = "; pyvidx downloads nothing: if it is a name on a hub, download it and give the folder" if hub else ""
    raise FileNotFoundError(f"there is no {source or repr(source)}{hint}")


def opened(sources: Sequence[Source], compat: str | None = None, **options: Any) -> Opened:
    """What sources hold: a whole encoder, or a tower alone. Arguments and errors as of open_model."""
    sources = [os.fspath(source) for source in sources]
    given = {} if compat is None else {"compat": compat}
    for source in sources:
        check_source(source)
    if not sources:
        _only((), options, "the model that ships with pyvidx")
        return Opened(TextVideo.default(**given).model, "that ships with pyvidx")
    if len(sources) == 1 and sources[0].startswith(open_clip.SCHEME):
        _only((), options | given, sources[0])
        model, said = open_clip.named(sources[0])
        return Opened(open_clip.vision_tower(model), said, random=sources[0].count(":") == 1)
    if len(sources) == 1 and not is_published(sources[0]):
        return _saved(sources[0], given, options)
    if wrong := [source for source in sources if not is_published(source)]:
        raise ValueError(f"open_model: several sources must be published files, {wrong[0]} is none")
    with naming(sources):
        return _published(sources, given, options)


def _saved(source: str, given: dict[str, Any], options: dict[str, Any]) -> Opened:
    kind = files.kind(source)
    if kind == "malmm":
        raise ValueError(
            f"open_model: {source} holds an MA-LMM, which answers questions and encodes no clip by itself: "
            "MALMM.from_pretrained opens it, `pyvidx eval predict` and `pyvidx train malmm` use it"
        )
    if kind not in SAVED:
        raise ValueError(f"open_model: {source} holds {kind!r:.100}, which is no encoder of videos")
    _only((), options | (given if kind == "video_encoder" else {}), source)
    encoder = SAVED[kind](source, **given)
    return Opened(encoder, f"of {source}", random=encoder.is_random)


def _published(sources: list[str], given: dict[str, Any], options: dict[str, Any]) -> Opened:
    states, said = [state_of(source) for source in sources], f"of {', '.join(sources)}"
    if any(map(is_official, states)):
        _only(OFFICIAL, options, said)
        # Paths where they bring a config.json, which the weights alone do not have.
        known = [source if told_by(source) else state for source, state in zip(sources, states)]
        model, report = load_official(*known, **given, **options)
        return Opened(model, f"published BT-Adapter weights {said}", report)
    if len(sources) > 1:
        raise ValueError(f"open_model: none of {', '.join(sources)} holds a branch; give one of them")
    _only(TOWER, options | given, f"{sources[0]}, which holds no BT-Adapter")
    told = told_by(sources[0])
    tower = vision_tower(states[0], **({} if told is None else told._asdict()) | options)
    report, _ = match(tower, [tower_names(states[0])])
    return Opened(tower, said, report, bilinear=_bilinear(Path(sources[0])))


def _bilinear(folder: Path) -> bool:
    """What the preprocessor_config.json of transformers or the open_clip_config.json in a folder says."""
    if (file := folder / "preprocessor_config.json").is_file():
        return read_json(file, dict).get("resample") == 2  # Pillow's number
    if (file := folder / "open_clip_config.json").is_file():
        values = read_json(file, dict).get("preprocess_cfg")
        return isinstance(values, dict) and values.get("interpolation") == "bilinear"
    return False


def _joined(found: Opened, tower: ViT, name: str, sizes: dict[str, Any]) -> tuple[VideoEncoder, Loaded]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same in every process
        encoder = with_module(tower, name, sizes).eval()
    has_weights = any(True for _ in encoder.temporal.parameters())
    encoder.is_random = found.random or has_weights
    what = "random weights, never trained" if has_weights else "without weights of its own"
    return encoder, _told(found, tower, f"{_named({'name': name, **sizes})}, {what}")


def with_module(tower: ViT, name: str, options: dict[str, Any]) -> VideoEncoder:
    """The tower and a new temporal module, which takes over from it what its training starts from; BT-Adapter is the
    class of its own, which knows the official names and numbers."""
    if name == "bt_adapter":
        eps = options.get("eps", tower.config.eps)
        config = BTAdapterConfig(tower.config, branch_eps=eps, **{k: v for k, v in options.items() if k != "eps"})
        model = BTAdapter(config)
        model.tower.load_state_dict(tower.state_dict())
    else:
        model = VideoEncoder(tower, temporal.create(name, tower.config, **options))
    weight = next(tower.parameters())
    model.temporal.init_from(model.tower)
    return model.to(weight.device, weight.dtype)


def _options(name: str) -> dict[str, Any]:
    """The options of a module, and their defaults."""
    parameters = list(inspect.signature(temporal.MODULES[name]).parameters.values())[1:]
    return {p.name: p.default for p in parameters}


def _own_module(encoder: VideoEncoder) -> dict[str, Any]:
    if not isinstance(encoder, BTAdapter):
        return encoder.temporal.spec
    c = encoder.config
    sizes = {name: getattr(c, name) for name in _options("bt_adapter") if hasattr(c, name)}
    return {"name": "bt_adapter", **sizes, "eps": c.branch_eps}


def _named(spec: dict[str, Any], name: str | None = None) -> str:
    options = ", ".join(f"{k}={v}" for k, v in spec.items() if k != "name")
    return (name or spec["name"]) + (f" ({options})" if options else "")


def _told(found: Opened, tower: ViT, module: str) -> Loaded:
    c = tower.config
    sizes = f"ViT of {c.layers} layers, width {c.width}, {c.image_size} pixels in patches of {c.patch_size}"
    preset = "clip" if c.pool == "class" else "siglip2" if found.bilinear else "siglip"
    return Loaded(f"{sizes}, {found.said}", module, preset, found.report)


def _only(allowed: Sequence[str], options: dict[str, Any], what: str) -> None:
    if wrong := [name for name in options if name not in allowed]:
        raise ValueError(f"open_model: {', '.join(wrong)} must not be given for {what}")
