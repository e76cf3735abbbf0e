"""Retrieval and classification without training, from videos or from embeddings made before, as a configuration says.

    {"base": "msrvtt", "annotations": "MSRVTT_JSFUSION_test.csv", "root": "videos/msrvtt",
     "model": "pretrain_btadapter_weight.pth", "tokenizer": "open_clip", "videos": "msrvtt.safetensors"}

Paths are relative to where the command runs. Shipped bases are in eval/configs.
"""

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pyvidx.corpus import embeddings
from pyvidx.corpus.encode import Encoded, encode_videos
from pyvidx.corpus.folder import DTYPES, Corpus, is_corpus, made_of, manifest
from pyvidx.device import usable
from pyvidx.eval.annotations import Sample, parse
from pyvidx.eval.annotations.classes import class_names
from pyvidx.eval.classify import class_embeddings, classification, prompts
from pyvidx.eval.files import Named, read_tensors
from pyvidx.eval.retrieval import retrieval
from pyvidx.eval.text import embed, load_tokenizer, token_ids
from pyvidx.files import check_output, write_tensors
from pyvidx.hosts.open import check_source, open_model, open_text, parse_module
from pyvidx.models.config import known
from pyvidx.preprocess import PRESETS
from pyvidx.tensor_files import note, opened
from pyvidx.train.recipe import load as load_values
from pyvidx.video import sampling
from pyvidx.video.pool import shared

CONFIGS = Path(__file__).parent / "configs"
BROKEN = ("fail", "exclude")
SAVE_EVERY = 100  # videos


class BrokenVideos(RuntimeError):
    """Some videos have no embedding. broken: video -> why."""

    def __init__(self, broken: dict[str, str]):
        super().__init__(f"eval: {len(broken)} videos could not be encoded; broken = 'exclude' leaves them out")
        self.broken = broken


@dataclass(frozen=True)
class Config:
    """What is evaluated on what.

    Attributes:
        format, annotations, options: see pyvidx.eval.annotations.parse.
        root: folder that is searched for the videos, by name, with or without suffix.
        videos: file or folder of video embeddings, as `pyvidx encode` writes it. What is in it is not encoded again;
            what is not is added, if there is a model. A file is written if there is none.
        texts: file of text embeddings, `text` [n, E] in the order of the annotations; written if there is none.
        model, module: see pyvidx.hosts.open.open_model; e.g. the official pretraining file (.pth).
        model_options: of open_model, e.g. {"gated": false}, as the public code evaluates the pretraining file, or
            {"compat": "paper"}.
        text: of the text tower, see pyvidx.hosts.open.open_text; None: what lies in `model`.
        text_options: heads, hidden_act or eps of the text tower, where they are not CLIP's.
        tokenizer: see pyvidx.eval.text.load_tokenizer.
        frames, sampler, preset, reader: see pyvidx.corpus.encode.
        text_length, cut: see pyvidx.eval.text.token_ids.
        broken: "fail" if a video can not be encoded, or "exclude" it and its texts from the test, which is reported.
        ties, dsl, compat: see pyvidx.eval.retrieval.
        classes: class names, one a line. templates: texts with {} for the name.
        device, dtype, batch, workers: of encoding. None: a GPU in float16 if there is one, else float32.
    """

    format: str
    annotations: str | Sequence[str]
    frames: int
    sampler: str
    preset: str
    text_length: int
    options: dict = field(default_factory=dict)
    root: str | None = None
    videos: str | None = None
    texts: str | None = None
    model: str | None = None
    module: str | None = None
    model_options: dict = field(default_factory=dict)
    text: str | None = None
    text_options: dict = field(default_factory=dict)
    tokenizer: str | None = None
    reader: str = "auto"
    cut: str = "end"
    broken: str = "fail"
    ties: str = "average"
    dsl: bool = False
    compat: str | None = None
    classes: str | None = None
    templates: Sequence[str] = ("{}",)
    device: str | None = None
    dtype: str | None = None
    batch: int = 1
    workers: int = 1

    def __post_init__(self):
        chosen = {"broken": BROKEN, "preset": PRESETS, "sampler": sampling.names(aliases=True)}
        for name, choices in chosen.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"eval: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name, least in {"frames": 1, "text_length": 2, "batch": 1, "workers": 1}.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"eval: {name} must be a whole number of at least {least}, got {value!r}")
        for name in ("options", "model_options", "text_options"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"eval: {name} must be an object, got {getattr(self, name)!r}")
        for name in ("root", "videos", "texts", "model", "text", "tokenizer", "classes"):
            if not isinstance(getattr(self, name), str | os.PathLike | None):
                raise ValueError(f"eval: {name} must be a path, got {getattr(self, name)!r}")
        if not isinstance(self.module, str | None):
            raise ValueError(f"eval: module must be a text, got {self.module!r}")

    @classmethod
    def from_file(cls, path: str | Path, **changes) -> "Config":
        """A .json or .toml file, with changes; what it does not say, a shipped one says that it names as its "base"."""
        values = load_values(path, "eval")
        base = values.pop("base", None)
        if base is not None:
            names = sorted(p.stem for p in CONFIGS.glob("*.json"))
            if base not in names:
                raise ValueError(f"eval: base must be one of {', '.join(names)}, got {base!r}")
            values = json.loads((CONFIGS / f"{base}.json").read_text()) | values
        required = ("format", "annotations", "frames", "sampler", "preset", "text_length")
        if lacking := [name for name in required if values.get(name) is None]:
            raise ValueError(f"eval: {path} must have {', '.join(lacking)}")
        return cls(**known(cls, values | changes))

    @property
    def where(self) -> tuple[str, torch.dtype]:
        device = str(usable(self.device or ("cuda" if torch.cuda.is_available() else "cpu")))
        named = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
        if self.dtype is not None and self.dtype not in named:
            raise ValueError(f"eval: dtype must be one of {', '.join(named)}, got {self.dtype!r}")
        return device, named[self.dtype or ("float16" if device.startswith("cuda") else "float32")]


def check(config: Config) -> None:
    """Raise before any work is done if a device is not here, or a cache cannot be written.

    Raises:
        ValueError, RuntimeError: see pyvidx.device.usable and pyvidx.corpus.embeddings.check_format.
        OSError: see pyvidx.files.check_output.
    """
    config.where  # noqa: B018
    if config.module is not None:
        parse_module(config.module)
    cached = {"model": config.videos, "text": config.texts}
    for name, cache in cached.items():
        source = getattr(config, name)
        if source is not None and not (cache and Path(cache).exists()):
            check_source(os.fspath(source))
    if config.videos is not None and not Path(config.videos).exists():
        embeddings.check_format(config.videos)
    for cache in (config.videos, config.texts):
        if cache is not None and not Path(cache).exists():
            check_output(cache)


def run_retrieval(config: Config) -> tuple[dict[str, dict[str, float]], dict]:
    """The table of pyvidx.eval.retrieval, and what was run.

    Raises:
        BrokenVideos: a video has no embedding and config.broken is "fail".
    """
    check(config)
    samples = parse(config.format, config.annotations, **config.options)
    if bare := [s.id for s in samples if not s.captions]:
        raise ValueError(f"eval: {config.format} has no captions, e.g. of {bare[0]}; it is no retrieval test")
    video, about, kept = video_embeddings(config, samples)
    words, of_text = text_embeddings(config, [t for s in samples for t in s.captions])
    owner = torch.repeat_interleave(torch.tensor([len(s.captions) for s in samples]))
    words = words[torch.isin(owner, torch.tensor(kept))]
    counts = [len(samples[i].captions) for i in kept]
    similarity = normalize(words, dim=1) @ normalize(video, dim=1).T
    captions = None if all(len(s.captions) == 1 for s in samples) else counts
    found = retrieval(similarity, captions, ties=config.ties, dsl=config.dsl, compat=config.compat)
    rule = {"ties": config.ties, "compat": config.compat, "dsl": config.dsl}
    return found, about | of_text | {"texts": len(words)} | rule


def run_classification(config: Config) -> tuple[dict[str, dict[str, float]], dict]:
    """Top-1 and top-5 of the videos of a format with extra["label"], against config.classes; and what was run."""
    check(config)
    samples = parse(config.format, config.annotations, **config.options)
    if config.classes is None or any("label" not in s.extra for s in samples):
        raise ValueError("eval: classification needs classes (a file of names) and a format with labels")
    names = class_names(config.classes)
    video, about, kept = video_embeddings(config, samples)
    words, of_text = text_embeddings(config, prompts(names, config.templates))
    found = classification(
        video, class_embeddings(words, len(config.templates)), [samples[i].extra["label"] for i in kept],
        ties=config.ties,
    )  # fmt: skip
    more = {"classes": len(names), "templates": list(config.templates), "ties": config.ties}
    return {"zero-shot": found}, about | of_text | more


def video_embeddings(config: Config, samples: Sequence[Sample]) -> tuple[Tensor, dict, list[int]]:
    """Embeddings [n, E] of the samples' videos, what was run, and the n samples that have one."""
    spans = {(s.start, s.end) for s in samples}
    if len(spans) > 1:
        raise ValueError("eval: all videos must be read over the same seconds; clips of one video are not supported")
    (start, end) = spans.pop()
    # Strings, as `pyvidx encode` notes its options.
    asked = {"frames": config.frames, "sampler": config.sampler, "preset": config.preset, "start": start, "end": end}
    asked |= {"module": config.module}
    asked |= {"model_options": json.dumps(config.model_options, sort_keys=True) if config.model_options else None}
    asked = {name: str(value) for name, value in asked.items() if value not in (None, 0.0)}
    results, about = [], {}
    cache = None if config.videos is None else Path(config.videos)
    if cache is not None and cache.exists():
        results, about = embeddings.load(cache, ["pooled"])
        wanted = asked | ({"model": config.model} if config.model else {})
        differing = [
            k for k in {*wanted, "start", "end", "module", "model_options"} if _noted(about, k) != wanted.get(k)
        ]
        if differing:
            said = ", ".join(f"{k} = {about.get(k)}, not {wanted.get(k)}" for k in sorted(differing))
            raise ValueError(f"eval: {cache} must be of this configuration, it has {said}")
    elif config.model is None:
        raise ValueError("eval: there must be a model, or videos must name a file of embeddings that exists")
    names = [s.video for s in samples]
    have = Named(r.path for r in results if r.error is None)
    missing = list(dict.fromkeys(name for name in names if have.find(name) is None))
    broken = {}
    if missing and config.model is not None:
        if config.root is None:
            raise ValueError(f"eval: root must be the folder of {len(missing)} videos without an embedding")
        files = Named.under(config.root)
        found = {name: files.find(name) for name in missing}
        broken = {name: f"not in {config.root}" for name, path in found.items() if path is None}
        about = asked | {"model": config.model}
        # Files that failed before are tried again.
        results = [r for r in results if r.error is None]
        results, about = _encode([p for p in found.values() if p], results, config, about, start, end)
    have = Named(r.path for r in results if r.error is None)
    errors = Named(r.path for r in results if r.error is not None)
    by_path = {r.path: r for r in results}
    for name in missing:
        if have.find(name) is None and name not in broken:
            failed = errors.find(name)
            broken[name] = by_path[failed].error if failed else f"not in {config.videos}"
    broken = {name: broken[name] for name in missing if name in broken}
    kept = [i for i, name in enumerate(names) if name not in broken]
    if broken and (config.broken == "fail" or not kept):
        raise BrokenVideos(broken)
    rows = [by_path[have.find(names[i])].encoding.pooled for i in kept]
    if any(row is None for row in rows):
        raise ValueError(f"eval: {cache} must hold pooled embeddings: pyvidx encode --outputs pooled")
    random = about.get("is_random") in (True, "True")
    named = {name: about.get(name) for name in ("model", "tower and module")}
    about = {**asked, **named, "videos": len(kept), "excluded videos": broken, "random weights": random}
    return torch.cat(rows).float(), about, kept


def text_embeddings(config: Config, texts: Sequence[str]) -> tuple[Tensor, dict]:
    """Embeddings [n, E] of the texts, in their order, and what was run."""
    about = {"text_length": config.text_length, "cut": config.cut}
    cache = None if config.texts is None else Path(config.texts)
    if cache is not None and cache.exists():
        found = read_tensors(cache, {"text": 2})["text"].float()
        with opened(cache, "eval") as file:
            noted = note(file, cache, "pyvidx") or {}
        if len(found) != len(texts) or noted.get("texts", list(texts)) != list(texts):
            raise ValueError(f"eval: {cache} must hold the {len(texts)} texts of the annotations, got {len(found)}")
        if differing := [k for k, v in about.items() if noted.get(k, v) != v]:
            raise ValueError(f"eval: {cache} must be of this configuration, it differs in {', '.join(differing)}")
        return found, {k: noted.get(k) for k in about} | {"cut texts": noted.get("cut texts")}
    weights = config.text or config.model
    if weights is None or config.tokenizer is None:
        raise ValueError("eval: there must be text weights and a tokenizer, or texts must name a file that exists")
    device, _ = config.where
    tower = open_text(weights, **config.text_options).float().to(device)
    if tower.config.pool != "end":
        raise ValueError(
            f"eval: the text tower of {weights} is SigLIP's, whose tokenizer is not CLIP's: work its embeddings out "
            "with transformers, and give them as texts (a safetensors file of text [n, E])"
        )
    if config.text_length > tower.config.context:
        raise ValueError(f"eval: text_length must be at most {tower.config.context}, got {config.text_length}")
    ids, about["cut texts"] = token_ids(texts, load_tokenizer(config.tokenizer), config.text_length, cut=config.cut)
    found = embed(tower, ids)
    if cache is not None:
        write_tensors(cache, {"text": found}, {"pyvidx": json.dumps({"texts": list(texts), **about})})
    return found, about


def _noted(about: dict, name: str) -> str | None:
    value = about.get(name)
    return None if value in (None, "None", "0.0") else str(value)


def _encode(
    paths: list[str], results: list[Encoded], config: Config, about: dict, start: float | None, end: float | None
) -> tuple[list[Encoded], dict]:
    """results with those of `paths`, written to config.videos on the way, so that an ended run goes on; and `about`
    with what encoded them."""
    shared(config.workers)  # they start while the model is loaded
    device, dtype = config.where
    model, loaded = open_model(config.model, config.module, **config.model_options)
    about = about | {"tower and module": f"{loaded.model}; {loaded.module}", "is_random": model.is_random}
    of_model = made_of(model)
    model = model.to(device).fold(dtype)
    results, paths = list(results), list(dict.fromkeys(paths))

    cache = config.videos
    if cache is not None and is_corpus(cache):
        made = manifest(cache)
        folder = Corpus(cache, replace(made, options=made.options | of_model), resume=True, retry_errors=True)
        outputs, dtype = tuple(made.widths), DTYPES[made.dtype]
    else:
        folder, outputs, dtype = None, ("pooled",), torch.float32

    def save():
        if folder is None and cache is not None and any(r.error is None for r in results):
            embeddings.save(cache, results, about)

    encoded = encode_videos(
        paths, model, frames=config.frames, sampler=config.sampler, reader=config.reader, preset=config.preset,
        start=start, end=end, outputs=outputs, dtype=dtype, batch=config.batch, workers=config.workers,
    )  # fmt: skip
    with folder or nullcontext():
        for n, result in enumerate(encoded, 1):
            if folder is not None:
                folder.add(result)
            results.append(embeddings.only(result, ["pooled"]))
            if n % SAVE_EVERY == 0:
                save()
    save()
    return results, about
