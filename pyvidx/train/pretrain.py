"""Pretraining of any encoder on videos with captions, as configurations are read: BT-Adapter's recipe
(arXiv:2309.15785, section 3.2), and UMT's objective (arXiv:2303.16058)."""

import copy
from dataclasses import dataclass, field

import torch
from torch.utils.data import Dataset

from pyvidx import temporal
from pyvidx.data.captions import KINDS, captioned
from pyvidx.hosts.open_clip import SCHEME
from pyvidx.models.losses import GRADIENTS
from pyvidx.models.pretraining import Pretraining
from pyvidx.models.umt import UnmaskedTeacher
from pyvidx.preprocess import PRESETS
from pyvidx.temporal.grouping import MASK_ORDERS
from pyvidx.train.data import READERS, Take, sized
from pyvidx.train.distributed import Ranks
from pyvidx.train.features import Features, StoredPairs, digest, store
from pyvidx.train.fields import BELOW_ONE, FRAMES, MANY, SMALLEST, arguments, check_choices, check_ranges, fields, typed
from pyvidx.train.loop import autocast
from pyvidx.train.pairs import Pairs, PairVideos
from pyvidx.train.pretrain_tasks import ContrastiveTask, UMTTask
from pyvidx.train.recipe import Recipe
from pyvidx.train.start import Start, start, text_of
from pyvidx.train.task import Task
from pyvidx.train.tokens import CONTEXT, ENDS, tokenizer, vocabulary
from pyvidx.weights.mma_export import load_head

MASKS = ("tube", "random")
OBJECTIVES = ("contrastive", "umt")
CHOICES = {
    "mask": MASKS, "mask_order": MASK_ORDERS, "gradient": GRADIENTS, "text_end": ENDS, "preset": PRESETS,
    "held_out_preset": PRESETS, "objective": OBJECTIVES, "reader": READERS, "hidden_act": ("quick_gelu", "gelu"),
}  # fmt: skip
RANGES = {
    "heads": (1, MANY), "text_length": (2, CONTEXT),
    "frames": (1, FRAMES), "shorter": (1, 2**14), "area": (SMALLEST, 1.0), "mask_rate": (0.0, BELOW_ONE),
    "loss_weights": (0.0, 1e9), "drop_path": (0.0, BELOW_ONE), "micro_batch": (1, MANY),
    "taps": (1, MANY), "mask_ratio": (0.0, BELOW_ONE),
}  # fmt: skip
# Largest number among a module's options: rows of a table, a width, layers.
LARGEST_OPTION = FRAMES
# The fields of Config that decide what the towers see.
SEEN = ("text_length", "text_end", "frames", "shorter", "area", "preset")


@dataclass(frozen=True)
class Config:
    """A pretraining run, as in train/configs/btadapter-webvid.json. Paths are relative to where the command runs.

    Attributes:
        out: folder for checkpoint, weights, losses and what could not be read.
        train, held_out: rows, {"kind": ..., ...}, see data.captions.captioned; held_out may be left out.
        weights: what to start from, see pyvidx.hosts.open.open_model: what pyvidx saved, the official pretraining file,
            a folder or file of a CLIP, a SigLIP or an EVA, or open_clip:NAME:FILE.
        module: {"name": ..., options}, a temporal module to train on the tower of the weights, see pyvidx.temporal;
            None: the weights' own, or BT-Adapter for a tower alone.
        train_tower: train the image tower as well; `multipliers` of the recipe give it a rate of its own.
        objective: "contrastive", see Pretraining, or "umt", see pyvidx.models.umt, which reads no captions.
        text: the text tower's, see pyvidx.hosts.open.open_text; None: `weights` holds it. "umt" needs none.
        hidden_act: of a CLIP from a state dict, see ViTConfig; None: OpenAI's, with a warning.
        heads: of such a CLIP and of its text tower; None: width / 64.
        tokenizer: folder of transformers; None: open_clip's.
        text_length, text_end: see train.tokens.tokenizer.
        frames: T.
        shorter, area, preset, reader: see train.data.Take; held-out clips are whole, by held_out_preset cut to a square
            in the middle.
        mask: of a branch: "tube", or "random": other patches in every frame.
        mask_rate, mask_order, gradient, loss_weights, drop_path, checkpointing, micro_batch: see Pretraining,
            loss_weights as `weights` there.
        taps, mask_ratio: of "umt", see UnmaskedTeacher. The teacher is the tower as it starts.
        features: store what the frozen towers give instead of computing it in every epoch, see train.features.Features;
            of modules with a branch.
        recipe: see Recipe.
    """

    out: str
    train: dict
    weights: str
    module: dict | None = None
    train_tower: bool = False
    objective: str = "contrastive"
    held_out: dict | None = None
    text: str | None = None
    hidden_act: str | None = None
    heads: tuple[int, int] | None = None
    tokenizer: str | None = None
    text_length: int = 64
    text_end: str = "official"
    frames: int = 8
    shorter: int | None = 256
    area: tuple[float, float] = (0.08, 1.0)
    preset: str = "bt_adapter_train"
    held_out_preset: str = "bt_adapter_retrieval"
    reader: str = "auto"
    mask: str = "tube"
    mask_rate: float = 0.7
    mask_order: str = "tube"
    gradient: str = "global"
    loss_weights: tuple[float, float, float] = (1.0, 0.1, 0.1)
    drop_path: float = 0.1
    checkpointing: bool = False
    micro_batch: int | None = None
    taps: int = 6
    mask_ratio: float = 0.8
    features: Features | None = None
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self):
        check_choices(self, CHOICES)
        check_ranges(self, RANGES)
        for name in ("weights", "text"):
            value = getattr(self, name) or ""
            if value.startswith(SCHEME) and value.count(":") < 2:  # whose weights would be random, and frozen
                raise ValueError(f"Config: {name} must be a path or open_clip:NAME:FILE, got {value}")
        if self.module is not None:
            check_module(self.module)
        if self.objective == "umt" and self.features is not None:
            raise ValueError("Config: features must not be given with umt, whose student sees pixels")
        if self.area[0] > self.area[1]:
            raise ValueError(f"Config: area must be two shares in (0, 1], ascending, got {self.area}")
        for name in ("train", "held_out"):
            source = dict(getattr(self, name) or {})
            if source and source.get("kind") not in tuple(KINDS):
                raise ValueError(f"Config: {name} must have a kind, one of {', '.join(KINDS)}, got {source}")
            if source:
                arguments(KINDS[source.pop("kind")], source, f"Config: {name}")

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """Raises ValueError for fields that are unknown, missing or not of their types."""
        return cls(**fields(cls, values, ("out", "train", "weights")))

    @property
    def about(self) -> dict:
        """What of it makes another run, beside the recipe."""
        names = ("mask", "mask_rate", "mask_order", "gradient", "loss_weights", "drop_path")
        names = names if self.objective == "contrastive" else ("taps", "mask_ratio")
        return {name: getattr(self, name) for name in (*SEEN, "objective", "train_tower", *names)}


def check_module(module: dict) -> None:
    """Raise ValueError where this is not {"name": a module's, options of its types and of sizes that may be}."""
    options = dict(module)
    name = options.pop("name", None)
    if name not in temporal.names():
        raise ValueError(f"Config: module must have a name, one of {', '.join(temporal.names())}, got {name!r:.100}")
    for key, value in typed(temporal.MODULES[name].__init__, options, f"Config: module {name}").items():
        for number in value if isinstance(value, list) else (value,):
            if isinstance(number, int) and not 0 <= number <= LARGEST_OPTION:
                raise ValueError(f"Config: module {name}: {key} must be in [0, {LARGEST_OPTION}], got {number}")


def build(config: Config, device: torch.device) -> Task:
    """The pretraining of a configuration.

    Raises:
        FileNotFoundError, ValueError: weights are not there or do not fit.
        RuntimeError: a library that they need is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.recipe.seed)  # what the weights do not bring is the same in every process
        told = {"heads": config.heads, "hidden_act": config.hidden_act}
        begun = start(config.weights, config.module, **told)
        task = _contrastive(config, begun, told) if config.objective == "contrastive" else _umt(config, begun)
    # Trained weights have to be float32, whatever the file has; autocast makes the rest.
    task = task.float().to(device)
    task.about = config.about | {"tokenizer": vocabulary(config.tokenizer), "module": task.model.temporal.name}
    trained = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    task.said = (
        f"{task.model.temporal.name} on the tower of {config.weights}, {config.objective}: {trained:,} of "
        f"{sum(p.numel() for p in task.model.parameters()):,} values are trained"
    )
    return task


def _contrastive(config: Config, begun: Start, told: dict) -> ContrastiveTask:
    text = begun.text if config.text is None else text_of(config.text, begun.model.tower, **told)
    if text is None:
        raise ValueError(f"Config: {config.weights} holds no text tower, so text must be given")
    if text.config.pool == "last" and (config.text_end, config.text_length) != ("kept", text.config.context):
        raise ValueError(
            f'Config: a SigLIP reads its texts at the last place: text_end must be "kept" and text_length '
            f"{text.config.context}, got {config.text_end!r} and {config.text_length}"
        )
    names = ("train_tower", "mask_rate", "mask_order", "gradient", "drop_path", "checkpointing", "micro_batch")
    options = {name: getattr(config, name) for name in names}
    step = Pretraining(begun.model, text, weights=config.loss_weights, **options)
    load_head(step, begun.state)
    if config.features is not None and not step.storable:
        raise ValueError(f"Config: features are of a branch beside a frozen tower, got {begun.model.temporal.name}")
    tokenize = tokenizer(config.tokenizer, config.text_length, config.text_end)
    return ContrastiveTask(step, tokenize, mask=config.mask, seed=config.recipe.seed)


def _umt(config: Config, begun: Start) -> UMTTask:
    model = begun.model
    teacher = copy.deepcopy(model.tower)
    model.tower.requires_grad_(config.train_tower)
    step = UnmaskedTeacher(model, teacher, taps=config.taps, mask_ratio=config.mask_ratio)
    return UMTTask(step, seed=config.recipe.seed)


def datasets(config: Config, task: Task, ranks: Ranks) -> tuple[Dataset, Dataset | None]:
    """Training rows, from stored features if the configuration says so (made where they are not there), and held-out
    ones.

    Raises:
        FileNotFoundError, ValueError: rows are not there or do not parse; stored features are of something else.
    """
    size, recipe = task.model.tower.config.image_size, config.recipe
    take = Take(
        config.frames, "random_segment", sized(config.preset, size), config.shorter, config.area, reader=config.reader
    )
    data, held_out = PairVideos(captioned(config.train), take, recipe.seed), None
    if config.held_out is not None:
        whole = Take(config.frames, "uniform", sized(config.held_out_preset, size), reader=config.reader)
        held_out = PairVideos(captioned(config.held_out), whole, recipe.seed)
    if config.features is None:
        return data, held_out
    about = {name: getattr(config, name) for name in SEEN}
    about |= {"rows": data.source.digest(), "towers": digest(task.model.tower, task.step.text), "seed": recipe.seed,
              "depth": task.model.temporal.depth, "tokenizer": config.tokenizer, "amp": recipe.amp}  # fmt: skip

    def frozen(batch: Pairs):
        with autocast(recipe, ranks):
            return task.frozen(batch)

    v = task.model.tower.config
    shape = (task.model.temporal.depth, config.frames, 1 + v.patches, v.width, task.step.text.config.embed_dim)
    store(config.features, data, frozen, about, ranks, recipe.batch, recipe.workers, shape=shape)
    return StoredPairs(config.features, about), held_out
