"""A tiny CLIP for the world of pyvidx.data.motion, trained on single frames and their captions."""

import math
import random
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvidx.backbones import TextConfig, TextTower, ViT, ViTConfig
from pyvidx.backbones.words import Words
from pyvidx.data import motion
from pyvidx.preprocess import clip_preprocess

CONTEXT = 12
VISION = ViTConfig(image_size=32, patch_size=8, width=64, heads=4, layers=6, mlp_width=128, embed_dim=64)


def words() -> Words:
    return Words(motion.vocabulary(), CONTEXT)


def text_config(vocab: int) -> TextConfig:
    return TextConfig(vocab, CONTEXT, width=64, heads=4, layers=2, mlp_width=128, embed_dim=64)


class TinyCLIP(nn.Module):
    """Both towers and the learned logit scale."""

    def __init__(self):
        super().__init__()
        self.vision, self.text = ViT(VISION), TextTower(text_config(len(words())))
        for p in (self.vision.position, self.vision.class_token, self.text.position):
            nn.init.normal_(p)  # as large as what a patch or word brings: from small ones place is learned late
        self.log_scale = nn.Parameter(torch.tensor(math.log(14.0)))

    @property
    def scale(self) -> float:
        return self.log_scale.exp().item()

    def loss(self, pixels: Tensor, ids: Tensor) -> Tensor:
        (x,) = self.vision(pixels)
        image, text = F.normalize(self.vision.embedding(x), dim=-1), F.normalize(self.text(ids), dim=-1)
        logits = self.log_scale.exp().clamp(max=100) * image @ text.T
        target = torch.arange(len(ids))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def stills(n: int, seed: int) -> tuple[Tensor, list[str]]:
    """Photographs of n scenes as the web has them.

    Of an event people show the outcome: 85 % of the stills with an event's caption are from its last third, the others
    from any moment. Stills with a caption of what is to be seen are from any moment.

    Returns:
        uint8 [3 n, H, W, 3] and their captions; of every scene the event, its opposite, and what is to be seen.
    """
    rng, frames, captions = random.Random(seed), [], []
    for scene in motion.random_scenes(n, seed):
        both = scene, motion.opposite(scene)
        late = [1 - rng.random() / 3 if rng.random() < 0.85 else rng.random() for _ in both]
        moments = [*zip(both, late, map(motion.caption, both))]
        moments.append((scene, rng.random(), motion.appearance(scene)))
        for s, moment, text in moments:
            frames.append(motion.render_at(s, torch.tensor([moment]), VISION.image_size)[0])
            captions.append(text)
    return torch.stack(frames), captions


def train(steps: int, *, count: int, batch: int = 96, lr: float = 2e-3, seed: int = 0, say=print) -> TinyCLIP:
    """count: scenes that are photographed; batch: stills, of batch / 3 scenes."""
    torch.manual_seed(seed)
    model, tokenize = TinyCLIP(), words()
    frames, captions = stills(count, seed + 1)
    frames, ids = frames.unflatten(0, (count, 3)), tokenize(captions).unflatten(0, (count, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(steps):
        rows = torch.randint(count, (batch // 3,))
        pixels = clip_preprocess(frames[rows].flatten(0, 1), VISION.image_size)
        loss = model.loss(pixels, ids[rows].flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            say(f"clip step {step}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s")
    return model.eval().requires_grad_(False)
