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
from pyvidx import temporal
from pyvidx.data import motion
from pyvidx.models import BTAdapter, BTAdapterConfig, VideoEncoder
from pyvidx.models.losses import contrastive
from pyvidx.models.pretraining import Pretraining

DEPTH = 4


@dataclass(frozen=True)
class Row:
    """A line of the tables.

    Attributes:
        name: in the tables.
        module, options: of pyvidx.temporal.create; VTC is the loss. "last" is no module: the last frame alone. With
            `pretraining`: BT-Adapter, trained with these options of pyvidx.models.pretraining.Pretraining.
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


def bt_adapter(clip: TinyCLIP) -> BTAdapter:
    """BT-Adapter over the CLIP, as it starts."""
    model = BTAdapter(BTAdapterConfig(clip.vision.config, depth=DEPTH))
    model.tower.load_state_dict(clip.vision.state_dict())
    model.temporal.init_from(model.tower)
    return model


def build(clip: TinyCLIP, row: Row) -> tuple[nn.Module, Callable, Callable]:
    """(what is trained, loss(pixels, layers, text, generator), encode(pixels, layers) -> [B, E])."""
    if row.pretraining is not None:
        model = bt_adapter(clip)
        pretraining = Pretraining(model, copy.deepcopy(clip.text), scale=clip.scale, drop_path=0.0, **row.pretraining)
        return (
            pretraining,
            lambda pixels, xs, text, generator: pretraining.from_layers(xs, text, generator=generator).total,
            lambda pixels, xs: model.from_layers(xs, outputs=("pooled",)).pooled,
        )
    if row.module == "last":
        return clip, None, lambda pixels, xs: clip.vision.embedding(xs[-1][:, -1])
    module = temporal.create(row.module, clip.vision.config, **row.options)
    module.init_from(clip.vision)
    encoder = VideoEncoder(copy.deepcopy(clip.vision), module)
    encoder.tower.requires_grad_(row.tower)

    def encode(pixels, xs):
        if module.reads_only:
            return encoder.from_layers(xs[-len(module.reads) :], outputs=("pooled",)).pooled
        return encoder(pixels(), outputs=("pooled",)).pooled

    return encoder, lambda p, xs, text, _: contrastive(encode(p, xs), text, scale=clip.scale), encode


def parameter_groups(trained: nn.Module, lr: float, row: Row) -> list[dict]:
    """New parameters at lr; a pretrained tower at a tenth. A gate's logit is scale * parameter: at lr / scale it moves
    as fast as anything else."""
    groups: dict[float, list] = {}
    for name, p in trained.named_parameters():
        if p.requires_grad:
            factor = 0.1 if name.startswith("tower.") else 1.0
            factor = {"gate": 1 / 100, "output_gate": 1e-4}.get(name.rsplit(".", 1)[-1], factor)
            groups.setdefault(factor, []).append(p)
    return [{"params": params, "lr": factor * lr} for factor, params in groups.items()]


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
    groups = parameter_groups(trained, budget.lr, row)
    generator = torch.Generator().manual_seed(seed)
    if groups:
        optimizer = torch.optim.AdamW(groups, weight_decay=0.05, betas=(0.9, 0.98))
        rates = [g["lr"] for g in groups]
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
