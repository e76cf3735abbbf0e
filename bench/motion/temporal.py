"""One run of the study: a temporal module trained beside or inside the frozen tiny CLIP, and its scores."""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bench.motion import world
from bench.motion.clip import TinyCLIP, words
from pyvidx.data import motion
from pyvidx.hosts.open import with_module
from pyvidx.models import VideoEncoder
from pyvidx.models.pretraining import Pretraining
from pyvidx.train import loop
from pyvidx.train.data import generator
from pyvidx.train.distributed import Ranks
from pyvidx.train.pairs import Pairs
from pyvidx.train.pretrain_tasks import ContrastiveTask
from pyvidx.train.recipe import Recipe
from pyvidx.train.task import trained

DEPTH = 4  # of the branches


@dataclass(frozen=True)
class Row:
    """A line of the tables.

    Attributes:
        name: in the tables.
        module, options: of pyvidx.temporal.create. "last" is no module: the last frame alone.
        pretraining: options of pyvidx.models.pretraining.Pretraining; None: PLAIN.
        tower: the tower is trained too.
        frames: T.
    """

    name: str
    module: str = "bt_adapter"
    options: dict = field(default_factory=dict)
    pretraining: dict | None = None
    tower: bool = False
    frames: int = 8


# Without a pretraining of its own: the video-text contrast alone, of all patches.
PLAIN = {"weights": (1.0, 0.0, 0.0), "mask_rate": 0.0}
# Of new parameters the rate is the recipe's. A gate's logit is scale * parameter: at lr / scale it moves as fast as
# anything else.
RATES = {"model.tower.": 0.1, "branch.gate": 1 / 100, "output_gate": 1e-4}


def encoder_of(clip: TinyCLIP, row: Row) -> VideoEncoder:
    """The row's module on the CLIP, as it starts."""
    return with_module(copy.deepcopy(clip.vision), row.module, row.options)


def build(clip: TinyCLIP, row: Row) -> tuple[nn.Module, Callable]:
    """(what is trained, a Pretraining if there is anything, and encode(pixels, layers) -> [B, E])."""
    if row.module == "last":
        return clip, lambda pixels, xs: clip.vision.embedding(xs[-1][:, -1])
    encoder = encoder_of(clip, row)
    reads = len(encoder.temporal.reads)

    def encode(pixels, xs):
        if encoder.temporal.reads_only:
            return encoder.from_layers(xs[-reads:], outputs=("pooled",)).pooled
        return encoder(pixels(), outputs=("pooled",)).pooled

    if not (row.tower or list(encoder.temporal.parameters())):
        return encoder, encode
    options = {"scale": clip.scale, "drop_path": 0.0, "train_tower": row.tower, **(row.pretraining or PLAIN)}
    return Pretraining(encoder, copy.deepcopy(clip.text), **options), encode


class Contrast(ContrastiveTask):
    """The task of `pyvidx train` where pixels, too, come with texts that are embedded already."""

    def forward(self, batch: Pairs) -> dict[str, Tensor]:
        return super().forward(batch) if self.step.storable else self.step.from_pixels(batch.video, batch.text).named


@dataclass(frozen=True, eq=False)
class Drawn(Dataset):
    """As many rows as there are clips. What a step has is drawn from the seed and the first of its rows: 3/4 are pairs
    of opposites with their events' captions, 1/4 have captions of what is to be seen."""

    clips: world.Clips
    step: Pretraining
    seed: int

    def __len__(self) -> int:
        return 2 * len(self.clips.frames)

    def __getitem__(self, at: tuple[int, int]) -> tuple[int, int]:
        return at

    def collate(self, at: list[tuple[int, int]]) -> Pairs:
        clips, draws, pairs = self.clips, generator(self.seed, *at[0], "clips"), 3 * len(at) // 8
        rows = torch.randint(len(clips.frames), (len(at) - pairs,), generator=draws)
        event, look = rows[:pairs].repeat(2), rows[pairs:]
        backwards = torch.cat([torch.arange(2 * pairs) >= pairs, torch.rand(len(look), generator=draws) < 0.5])
        pixels, xs = clips.batch(torch.cat([event, look]), backwards)
        text = torch.cat([clips.events[event, backwards[: 2 * pairs].long()], clips.looks[look]])
        reads = len(self.step.model.temporal.reads)
        return Pairs(at, text, torch.stack(xs[-reads:], 1) if self.step.storable else pixels(), {})


def train(clip: TinyCLIP, clips: world.Clips, row: Row, recipe: Recipe, seed: int) -> tuple[nn.Module, Callable]:
    """-> (what was trained, encode)."""
    torch.manual_seed(seed)
    step, encode = build(clip, row)
    if isinstance(step, Pretraining):
        rates = {key: rate for key, rate in RATES.items() if any(key in name for name in trained(step))}
        recipe, task = replace(recipe, multipliers=rates, seed=seed), Contrast(step, words(), seed=seed)
        with tempfile.TemporaryDirectory() as out:
            loop.train(task, Drawn(clips, step, seed), recipe, Ranks(), Path(out))
    return step.eval(), encode


class Gallery(NamedTuple):
    """Clips to be found by captions: of events, each forward and backward, and of looks."""

    events: world.Clips
    kinds: list[str]
    looks: world.Clips

    @classmethod
    def of(cls, clip: TinyCLIP, objects: Sequence[motion.Object], seed: int, T: int, layers, sizes: dict[str, int]):
        """sizes: "singles" and "pairs" of world.event_gallery; "looks" clips with one object and as many with two."""
        events = world.event_gallery(objects, seed, sizes["singles"], sizes["pairs"])
        looks = world.look_gallery(objects, seed + 1, sizes["looks"], sizes["looks"])
        seen = [world.seen_by(clip, scenes, T, layers) for scenes in (events, looks)]
        return cls(seen[0], [s.kind for s in events], seen[1])

    @torch.no_grad()
    def scores(self, encode: Callable) -> dict:
        """See world.scores."""
        events, looks = world.Clips(*self.events), world.Clips(*self.looks)

        def embeddings(clips, backwards):
            rows = torch.arange(len(clips.frames)).split(64)
            return torch.cat([encode(*clips.batch(r, torch.full(r.shape, backwards))) for r in rows])

        video = torch.stack([embeddings(events, back) for back in (False, True)], dim=1)
        return world.scores(video, events.events, self.kinds, embeddings(looks, False), looks.looks)
