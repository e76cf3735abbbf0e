"""One run of the study: a temporal module trained beside or inside the frozen tiny CLIP, and its scores."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.motion import world
from bench.motion.clip import TinyCLIP
from pyvidx.data import motion
from pyvidx.hosts.open import with_module
from pyvidx.models import VideoEncoder
from pyvidx.models.pretraining import Pretraining
from pyvidx.train.recipe import Recipe, groups

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


@dataclass(frozen=True)
class Budget:
    """Steps, clips a step and peak learning rate, the same for all rows."""

    steps: int
    batch: int
    lr: float


# Without a pretraining of its own: the video-text contrast alone, of all patches.
PLAIN = {"weights": (1.0, 0.0, 0.0), "mask_rate": 0.0}


def encoder_of(clip: TinyCLIP, row: Row) -> VideoEncoder:
    """The row's module on the CLIP, as it starts."""
    return with_module(copy.deepcopy(clip.vision), row.module, row.options)


def build(clip: TinyCLIP, row: Row) -> tuple[nn.Module, Callable | None, Callable]:
    """(what is trained, loss(pixels, layers, text, generator), encode(pixels, layers) -> [B, E]); of what has nothing
    to be trained there is no loss."""
    if row.module == "last":
        return clip, None, lambda pixels, xs: clip.vision.embedding(xs[-1][:, -1])
    encoder = encoder_of(clip, row)
    reads = len(encoder.temporal.reads)

    def encode(pixels, xs):
        if encoder.temporal.reads_only:
            return encoder.from_layers(xs[-reads:], outputs=("pooled",)).pooled
        return encoder(pixels(), outputs=("pooled",)).pooled

    if not (row.tower or list(encoder.temporal.parameters())):
        return encoder, None, encode
    options = {"scale": clip.scale, "drop_path": 0.0, "train_tower": row.tower, **(row.pretraining or PLAIN)}
    step = Pretraining(encoder, copy.deepcopy(clip.text), **options)

    def loss(pixels, xs, text, generator):
        if step.storable:
            return step.from_layers(xs[-reads:], text, generator=generator).total
        return step.from_pixels(pixels(), text, generator=generator).total

    return step, loss, encode


def parameter_groups(trained: nn.Module, lr: float) -> list[dict]:
    """New parameters at lr; a pretrained tower at a tenth. A gate's logit is scale * parameter: at lr / scale it moves
    as fast as anything else."""
    factors = {"model.tower.": 0.1, "branch.gate": 1 / 100, "output_gate": 1e-4}
    names = [name for name, p in trained.named_parameters() if p.requires_grad]
    own = {key: factor for key, factor in factors.items() if any(key in name for name in names)}
    recipe = Recipe(multipliers=own, decay="all")
    return [{"params": group["params"], "lr": group["multiplier"] * lr} for group in groups(trained, recipe)]


def draw(clips: world.Clips, size: int, generator: torch.Generator) -> tuple[Callable, list[Tensor], Tensor]:
    """A batch of clips and their texts: 3/4 are pairs of opposites with their events' captions, 1/4 have captions of
    what is to be seen."""
    pairs = 3 * size // 8
    rows = torch.randint(len(clips.frames), (size - pairs,), generator=generator)
    event, look = rows[:pairs].repeat(2), rows[pairs:]
    backwards = torch.cat([torch.arange(2 * pairs) >= pairs, torch.rand(len(look), generator=generator) < 0.5])
    pixels, xs = clips.batch(torch.cat([event, look]), backwards)
    text = torch.cat([clips.events[event, backwards[: 2 * pairs].long()], clips.looks[look]])
    return pixels, xs, text


def train(
    clip: TinyCLIP, clips: world.Clips, row: Row, budget: Budget, seed: int, say=print
) -> tuple[nn.Module, Callable]:
    """-> (what was trained, encode)."""
    torch.manual_seed(seed)
    trained, loss_of, encode = build(clip, row)
    generator = torch.Generator().manual_seed(seed)
    if loss_of is not None:
        own = parameter_groups(trained, budget.lr)
        optimizer = torch.optim.AdamW(own, weight_decay=0.05, betas=(0.9, 0.98))
        rates = [g["lr"] for g in own]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, budget.steps, pct_start=0.1)
        start = time.perf_counter()
        for step in range(budget.steps):
            loss = loss_of(*draw(clips, budget.batch, generator), generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 50 == 0 or step == budget.steps - 1:
                say(f"{row.name}: step {step}, loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s")
    return trained.eval(), encode


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
