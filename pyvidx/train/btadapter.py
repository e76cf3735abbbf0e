"""BT-Adapter as a Task: masked pretraining on videos with captions (arXiv:2309.15785, section 3.2)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from pyvidx.backbones.text import TextTower
from pyvidx.backbones.vit import ViT
from pyvidx.data.captions import KINDS, captioned
from pyvidx.hosts.importing import importing
from pyvidx.models import files
from pyvidx.models.bt_adapter import BTAdapter
from pyvidx.models.config import BTAdapterConfig
from pyvidx.models.losses import GRADIENTS
from pyvidx.models.pretraining import Pretraining
from pyvidx.preprocess import PRESETS
from pyvidx.temporal.grouping import MASK_ORDERS
from pyvidx.temporal.masking import Drops, drop_path_draws, random_mask, tube_mask
from pyvidx.train.data import READERS, Take, generator, sized
from pyvidx.train.distributed import Ranks
from pyvidx.train.features import Features, StoredPairs, digest, store
from pyvidx.train.fields import BELOW_ONE, FRAMES, MANY, SMALLEST, arguments, check_choices, check_ranges, fields
from pyvidx.train.loop import autocast
from pyvidx.train.outputs import written
from pyvidx.train.pairs import Pairs, PairVideos
from pyvidx.train.recipe import Recipe
from pyvidx.train.task import Task
from pyvidx.train.tokens import CONTEXT, ENDS, Tokenize, tokenizer, vocabulary
from pyvidx.weights.bt_adapter import load_official, state_of
from pyvidx.weights.mma_export import export_mma, load_head
from pyvidx.weights.text_towers import text_tower
from pyvidx.weights.towers import vision_tower

MASKS = ("tube", "random")
CHOICES = {
    "mask": MASKS, "mask_order": MASK_ORDERS, "gradient": GRADIENTS, "text_end": ENDS, "preset": PRESETS,
    "reader": READERS, "hidden_act": ("quick_gelu", "gelu"),
}  # fmt: skip
RANGES = {
    "heads": (1, MANY), "depth": (1, MANY), "time_length": (1, FRAMES), "text_length": (2, CONTEXT),
    "frames": (1, FRAMES), "shorter": (1, 2**14), "area": (SMALLEST, 1.0), "mask_rate": (0.0, BELOW_ONE),
    "loss_weights": (0.0, 1e9), "drop_path": (0.0, BELOW_ONE), "micro_batch": (1, MANY),
}  # fmt: skip
# The fields of Config that decide what the towers see.
SEEN = ("text_length", "text_end", "frames", "shorter", "area", "preset")


@dataclass(frozen=True)
class Config:
    """A pretraining run, as in train/configs/btadapter-webvid.json. Paths are relative to where the command runs.

    Attributes:
        out: folder for checkpoint, weights, losses and what could not be read.
        train, held_out: rows, {"kind": ..., ...}, see data.captions.captioned; held_out may be left out.
        weights: what to start from: a file or folder written by BTAdapter.save, the official pretraining file, a
            folder of transformers' CLIP, a CLIP's state dict (transformers, open_clip), or
            {"open_clip": NAME, "pretrained": FILE}.
        text: the text tower's, one of the last four; None: `weights` holds it.
        hidden_act: of a CLIP from a state dict, see ViTConfig; None: OpenAI's, with a warning.
        heads: of such a CLIP and of its text tower; None: width / 64.
        depth, time_length, gated: of a branch that starts from a CLIP, see BTAdapterConfig.
        tokenizer: folder of transformers; None: open_clip's.
        text_length, text_end: see train.tokens.tokenizer.
        frames: T.
        shorter, area, preset, reader: see train.data.Take; held-out clips are whole, cut to a square in the middle.
        mask: "tube", or "random": other patches in every frame.
        mask_rate, mask_order, gradient, loss_weights, drop_path, checkpointing, micro_batch: see Pretraining,
            loss_weights as `weights` there.
        features: store what the frozen towers give instead of computing it in every epoch, see train.features.Features.
        recipe: see Recipe.
    """

    out: str
    train: dict
    weights: str | dict
    held_out: dict | None = None
    text: str | dict | None = None
    hidden_act: str | None = None
    heads: tuple[int, int] | None = None
    depth: int = 4
    time_length: int = 64
    gated: bool = True
    tokenizer: str | None = None
    text_length: int = 64
    text_end: str = "official"
    frames: int = 8
    shorter: int | None = 256
    area: tuple[float, float] = (0.08, 1.0)
    preset: str = "bt_adapter_train"
    reader: str = "auto"
    mask: str = "tube"
    mask_rate: float = 0.7
    mask_order: str = "tube"
    gradient: str = "global"
    loss_weights: tuple[float, float, float] = (1.0, 0.1, 0.1)
    drop_path: float = 0.1
    checkpointing: bool = False
    micro_batch: int | None = None
    features: Features | None = None
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self):
        check_choices(self, CHOICES)
        check_ranges(self, RANGES)
        for name in ("weights", "text"):
            value = getattr(self, name)
            if isinstance(value, dict) and set(value) != {"open_clip", "pretrained"}:
                raise ValueError(f'Config: {name} must be a path or {{"open_clip", "pretrained"}}, got {value}')
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
        return {name: getattr(self, name) for name in (*SEEN, *names)}


class BTAdapterTask(Task):
    """Trained: the branch, the gates and the head of the token loss.

    Masks and DropPath are drawn for each sample from seed, epoch and row, so they depend on neither the number of
    processes nor on where a run was ended.

    Args:
        step: on its device.
        tokenize: captions to ids.
        mask: "tube" or "random".
        seed: of the draws.
    """

    whole_batch = True

    def __init__(self, step: Pretraining, tokenize: Tokenize, *, mask: str = "tube", seed: int = 42):
        super().__init__()
        self.step, self.tokenize, self.mask, self.seed = step, tokenize, mask, seed

    @property
    def model(self) -> BTAdapter:
        return self.step.model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def count(self, batch: Pairs) -> int:
        return len(batch)

    def forward(self, batch: Pairs) -> dict[str, Tensor]:
        """Losses by their names."""
        mask, drops = self.draws(batch.at, batch.frames)
        if isinstance(batch.text, Tensor):
            # Contiguous, as from the backbone: with other strides sums are taken in another order.
            xs = [x.contiguous() for x in batch.video.to(self.device).unbind(1)]
            losses = self.step.from_layers(xs, batch.text.to(self.device), mask=mask, drops=drops)
        else:
            losses = self.step(*self.inputs(batch), mask=mask, drops=drops)
        return losses._asdict()

    def inputs(self, batch: Pairs) -> tuple[Tensor, Tensor]:
        """pixels [B, T, 3, h, w] and ids [B, L]."""
        return batch.video.to(self.device), self.tokenize(batch.text).to(self.device)

    def frozen(self, batch: Pairs) -> tuple[tuple[Tensor, ...], Tensor]:
        """What the frozen towers give, see Pretraining.frozen."""
        return self.step.frozen(*self.inputs(batch))

    def draws(self, at: Sequence[tuple[int, int]], T: int) -> tuple[Tensor, Drops | None]:
        """Masks [B, P] or [B, T*P] of samples, and in training mode their drops."""
        P, rate, depth = self.model.config.vision.patches, self.step.mask_rate, self.model.config.depth
        tube = self.mask == "tube"
        masks, drops = [], []
        for epoch, row in at:
            draws = generator(self.seed, epoch, row, "mask")
            mask = tube_mask(1, P, rate, generator=draws) if tube else random_mask(1, T, P, rate, generator=draws)
            K = int((~mask).sum()) // (1 if tube else T)  # kept in a frame slot
            masks.append(mask)
            drops.append(drop_path_draws(self.step.drop_path, depth, 1, T, K, generator=draws))
        layers = [
            None if layer[0] is None else tuple(torch.cat(part).to(self.device) for part in zip(*layer))
            for layer in zip(*drops)
        ]
        return torch.cat(masks).to(self.device), layers if self.training else None

    def export(self, path: Path, epoch: int) -> None:
        """All weights under the official names: .safetensors, or .pth as the public code writes it."""
        weights = {name: value.cpu().contiguous() for name, value in export_mma(self.step).items()}
        with written(path) as part:
            if path.suffix == ".safetensors":
                save_file(weights, part)
            else:
                torch.save({"meta": {"epoch": epoch}, "state_dict": weights}, part)


def build(config: Config, device: torch.device) -> BTAdapterTask:
    """The pretraining of a configuration.

    Raises:
        FileNotFoundError, ValueError: weights are not there or do not fit.
        RuntimeError: a library that they need is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.recipe.seed)  # what the weights do not bring is the same in every process
        model, text, state = _model(config)
        if config.text is not None:
            text = _clip(config, config.text, image=False)[1]
        if text is None:
            raise ValueError(f"Config: {config.weights} holds no text tower, so text must be given")
        names = ("mask_rate", "mask_order", "gradient", "drop_path", "checkpointing", "micro_batch")
        step = Pretraining(model, text, weights=config.loss_weights, **{name: getattr(config, name) for name in names})
        load_head(step, state)
    task = BTAdapterTask(
        step.float().to(device),  # trained weights have to be float32, whatever the file has; autocast makes the rest
        tokenizer(config.tokenizer, config.text_length, config.text_end),
        mask=config.mask,
        seed=config.recipe.seed,
    )
    task.about = config.about | {"tokenizer": vocabulary(config.tokenizer)}
    return task


def datasets(config: Config, task: BTAdapterTask, ranks: Ranks) -> tuple[Dataset, Dataset | None]:
    """Training rows, from stored features if the configuration says so (made where they are not there), and held-out
    ones.

    Raises:
        FileNotFoundError, ValueError: rows are not there or do not parse; stored features are of something else.
    """
    size, recipe = task.model.config.vision.image_size, config.recipe
    take = Take(
        config.frames, "random_segment", sized(config.preset, size), config.shorter, config.area, reader=config.reader
    )
    data, held_out = PairVideos(captioned(config.train), take, recipe.seed), None
    if config.held_out is not None:
        whole = Take(config.frames, "uniform", sized("bt_adapter_retrieval", size), reader=config.reader)
        held_out = PairVideos(captioned(config.held_out), whole, recipe.seed)
    if config.features is None:
        return data, held_out
    about = {name: getattr(config, name) for name in SEEN}
    about |= {"rows": data.source.digest(), "towers": digest(task.model.tower, task.step.text), "seed": recipe.seed,
              "depth": task.model.config.depth, "tokenizer": config.tokenizer, "amp": recipe.amp}  # fmt: skip

    def frozen(batch: Pairs):
        with autocast(recipe, ranks):
            return task.frozen(batch)

    model = task.model.config
    shape = (model.depth, config.frames, 1 + model.vision.patches, model.vision.width, model.vision.embed_dim)
    store(config.features, data, frozen, about, ranks, recipe.batch, recipe.workers, shape=shape)
    return StoredPairs(config.features, about), held_out


def _model(config: Config) -> tuple[BTAdapter, TextTower | None, dict[str, Tensor]]:
    """The model, the text tower if it is with it, and the state dict it is from, if it is."""
    # Both codes give the same numbers here but where the public one takes 3 frames for 3 channels.
    modes = {"compat": "paper", "variant": "mma"}
    if isinstance(config.weights, str) and files.is_ours(config.weights):
        return BTAdapter.from_pretrained(config.weights, **modes), None, {}
    state = {} if isinstance(config.weights, dict) or Path(config.weights).is_dir() else state_of(config.weights)
    if any("btadapter" in key or "timesFPN" in key for key in state):
        heads, text_heads = config.heads or (None, None)
        model, _ = load_official(state, heads=heads, hidden_act=config.hidden_act, **modes)
        text = {key: value for key, value in state.items() if "text_" in key}
        options = {"heads": text_heads, "hidden_act": model.config.vision.hidden_act}
        return model, text_tower(text, **options) if text else None, state
    vision, text = _clip(config, state or config.weights)
    if vision is None:
        raise ValueError(f"Config: {config.weights} holds no image tower")
    sizes = {"depth": config.depth, "time_length": config.time_length, "gated": config.gated}
    model = BTAdapter(BTAdapterConfig(vision.config, **sizes), **modes)
    model.tower.load_state_dict(vision.state_dict())
    model.temporal.init_from(model.tower)
    return model, text, {}


def _clip(config: Config, weights: str | dict, *, image: bool = True) -> tuple[ViT | None, TextTower | None]:
    """The towers of a CLIP, in any of the forms of Config.weights and Config.text, or of a state dict; image=False
    leaves that one in a state dict, which may be more than CLIP's."""
    heads, text_heads = config.heads or (None, None)
    if isinstance(weights, dict) and "open_clip" in weights:
        return _open_clip(**weights)
    if isinstance(weights, str) and Path(weights).is_dir():
        return vision_tower(weights) if image else None, text_tower(weights)
    state = state_of(weights)
    has_vision = image and any("class_embedding" in key for key in state)
    vision = vision_tower(state, heads=heads, hidden_act=config.hidden_act) if has_vision else None
    has_text = any("token_embedding" in key for key in state)
    hidden_act = config.hidden_act or (vision and vision.config.hidden_act)
    return vision, text_tower(state, heads=text_heads, hidden_act=hidden_act) if has_text else None


def _open_clip(open_clip: str, pretrained: str) -> tuple[ViT, TextTower]:
    from pyvidx.hosts import open_clip as ours

    if not Path(pretrained).is_file():
        raise FileNotFoundError(f"train: there is no file {pretrained}")  # open_clip would ask the network for it
    with importing("train", "open_clip"):
        from open_clip import create_model
    model = create_model(open_clip, pretrained=pretrained)
    return ours.vision_tower(model), ours.text_tower(model)
