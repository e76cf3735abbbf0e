"""What the study trains and tests on: clips of pyvidx.data.motion, seen by a frozen tiny CLIP once."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.motion.clip import TinyCLIP, words
from pyvidx.data import motion
from pyvidx.data.motion import Scene
from pyvidx.preprocess import clip_preprocess

SINGLE = tuple(k for k in motion.KINDS if k not in motion.PAIRED)


class Clips(NamedTuple):
    """n scenes; played backwards, flip(1), each is another clip, its opposite.

    Attributes:
        frames: uint8 [n, T, H, W, 3].
        layers: float16 [n, T, 1+P, C] per cached backbone layer.
        events: [n, 2, E] text embeddings of the event and its opposite.
        looks: [n, E] of what is to be seen in both.
    """

    frames: Tensor
    layers: list[Tensor]
    events: Tensor
    looks: Tensor

    def batch(self, rows: Tensor, backwards: Tensor) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """What makes the pixels of these scenes, those marked in bool [B] played backwards; and their layers."""
        T = self.frames.shape[1]
        order = torch.arange(T).expand(len(rows), T)
        order = torch.where(backwards[:, None], order.flip(1), order)
        at = rows[:, None], order
        size = self.frames.shape[2]
        return lambda: clip_preprocess(self.frames[at], size), [x[at].float() for x in self.layers]


@torch.no_grad()
def seen_by(clip: TinyCLIP, scenes: Sequence[Scene], T: int, layers: Sequence[int]) -> Clips:
    """The clips of these scenes at T frames, with these backbone layers' outputs."""
    size, tokenize = clip.vision.config.image_size, words()
    frames = torch.stack([motion.render(s, T, size) for s in scenes])
    parts = [clip.vision(clip_preprocess(part, size), layers) for part in frames.split(64)]
    captions = [motion.caption(x) for s in scenes for x in (s, motion.opposite(s))]
    return Clips(
        frames,
        [torch.cat([x.half() for x in column]) for column in zip(*parts)],
        clip.text(tokenize(captions)).unflatten(0, (-1, 2)),
        clip.text(tokenize([motion.appearance(s) for s in scenes])),
    )


def event_gallery(objects: Sequence[motion.Object], seed: int, singles: int, pairs: int) -> list[Scene]:
    """Scenes no two of which have the same caption, nor one the opposite's: `singles` events of one object, and `pairs`
    of every kind that has two; as many as there are, at most."""
    rng = random.Random(seed)
    one = [(k, (o,)) for k in SINGLE for o in objects if k != "turn" or o[1] in motion.POINTED]
    chosen = rng.sample(one, min(singles, len(one)))
    for kind in motion.PAIRED:
        two = list(itertools.combinations(objects, 2))
        chosen += [(kind, o) for o in rng.sample(two, min(pairs, len(two)))]
    grounds = tuple(motion.GROUNDS)
    return [Scene(kind, o, rng.choice(grounds), rng.random() < 0.5, rng.randrange(1 << 31)) for kind, o in chosen]


def look_gallery(objects: Sequence[motion.Object], seed: int, singles: int, pairs: int) -> list[Scene]:
    """Scenes no two of which look the same by their caption; what happens in them is drawn."""
    rng = random.Random(seed)
    one = [((o,), g) for o in objects for g in motion.GROUNDS]
    two = [(o, g) for o in itertools.combinations(objects, 2) for g in motion.GROUNDS]
    chosen = rng.sample(one, min(singles, len(one))) + rng.sample(two, min(pairs, len(two)))
    scenes = []
    for o, ground in chosen:
        kinds = motion.PAIRED if len(o) == 2 else [k for k in SINGLE if k != "turn" or o[0][1] in motion.POINTED]
        scenes.append(Scene(rng.choice(kinds), o, ground, rng.random() < 0.5, rng.randrange(1 << 31)))
    return scenes


def recall(similarity: Tensor, target: Tensor, near: float = 1e-5) -> float:
    """Text-to-video R@1 in percent; of videos equally similar (to `near`, rounding) one is drawn.

    similarity [texts, videos], target int64 [texts].
    """
    own = similarity.gather(1, target[:, None])
    above, equal = (similarity > own + near).sum(1), ((similarity - own).abs() <= near).sum(1)
    return 100 * float(torch.where(above == 0, 1 / equal, 0.0).mean())


def scores(video: Tensor, events: Tensor, kinds: Sequence[str], looking: Tensor, looks: Tensor) -> dict:
    """What the tables show, in percent.

    Args:
        video: [n, 2, E] embeddings of event clips and of the same backwards.
        events: [n, 2, E] of their captions.
        kinds: of the n scenes.
        looking, looks: [m, E] of the appearance clips and their captions.
    """
    video, events, looking, looks = (F.normalize(x.float(), dim=-1) for x in (video, events, looking, looks))
    n = len(video)
    own = torch.einsum("nde,nde->nd", video, events)
    other = torch.einsum("nde,nde->nd", video, events.flip(1))
    right = torch.where((own - other).abs() <= 1e-5, 0.5, (own > other).float()).mean(1)  # [n]: video to text
    by_kind = {
        k: 100 * float(right[[i for i, kind in enumerate(kinds) if kind == k]].mean()) for k in dict.fromkeys(kinds)
    }
    return {
        "appearance": recall(looks @ looking.T, torch.arange(len(looks))),
        "time": recall(events.flatten(0, 1) @ video.flatten(0, 1).T, torch.arange(2 * n)),
        "pair": 100 * float(right.mean()),
        "kinds": by_kind,
        "events": 2 * n,
        "looks": len(looks),
    }
