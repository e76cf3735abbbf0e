"""Tiny random models of every host, and prompts for them as their processors would make them.

A host's entry is a class in a file tiny_<model_type>.py of this folder, a `Tiny` named `ENTRY`; the tests in
test_compress.py take all of them.
"""

import importlib
import pkgutil
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.torchvision_shim import mend_torchvision

mend_torchvision()

TEXT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=300, max_position_embeddings=2048,
)  # fmt: skip
CLIP = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=4, image_size=32, patch_size=8)  # fmt: skip
IMAGE, VIDEO, PAD = 290, 291, 0


@dataclass(frozen=True)
class Video:
    steps: int
    seed: int = 0
    first: int = 0  # steps of the same video before this part of it


@dataclass(frozen=True)
class Image:
    seed: int = 0


class Tiny:
    """One host. Its model's ids are IMAGE and VIDEO."""

    kind: str  # config.model_type
    images = True  # takes images beside videos
    ragged = False  # takes any number of tokens
    in_place = False  # those must have places in a step
    square = True  # the tokens of a step are a picture
    timeless = True  # slots have no times to it, so that what is kept of a video is like a shorter video
    embedded = False  # slots are handed in inputs_embeds, and have no ids of their own
    processor = None  # where compress needs it
    needs = ()  # packages
    rows = [[5, Video(6, 1), 7], [8, 9, 10, Video(3, 2), 5, 5, 6], [5, 6, 7], [5, Video(5, 3), 6, 7, Video(5, 4), 9]]

    def build(self):
        """The model, random."""
        raise NotImplementedError

    def block(self, steps: int) -> list[int]:
        """The tokens of a video."""
        raise NotImplementedError

    def picture(self) -> list[int]:
        """The tokens of an image."""
        raise NotImplementedError

    def frames(self, video: Video) -> Tensor:
        """Pixels of the steps of a video, the first dimension the steps; of every seed another video."""
        generator = torch.Generator().manual_seed(video.seed)
        return torch.randn(video.first + video.steps, 3, 32, 32, generator=generator)[video.first :]

    def ordered(self, parts: list[Video | Image]) -> dict:
        """What the processor adds to the ids."""
        return self.pixels(*([p for p in parts if isinstance(p, kind)] for kind in (Video, Image)))

    def pixels(self, videos: list[Video], images: list[Image]) -> dict:
        """The same, of hosts to whom those are two. Videos of unequal lengths: a list, where it makes no batch."""
        found = {}
        if videos:
            clips = [self.frames(v) for v in videos]
            alike = len({len(x) for x in clips}) == 1
            found["pixel_values_videos"] = torch.stack(clips) if alike else clips
        if images:
            found |= self.image_pixels(images)
        return found

    def image_pixels(self, images: list[Image]) -> dict:
        raise NotImplementedError

    def model(self):
        torch.manual_seed(0)
        return self.build().eval()

    def tokens(self, row) -> list[int]:
        found = []
        for part in row:
            found += self.block(part.steps) if isinstance(part, Video) else [part] if isinstance(part, int) else []
            found += self.picture() if isinstance(part, Image) else []
        return found

    def inputs(self, *rows, side: str = "left", types: bool = False) -> dict:
        """As of the processor. rows: lists of token ids, Video and Image."""
        ids = [self.tokens(row) for row in rows]
        length = max(map(len, ids))

        def padded(lists, fill):
            more = [[fill] * (length - len(x)) for x in lists]
            return torch.tensor([m + x if side == "left" else x + m for x, m in zip(lists, more)])

        found = {"input_ids": padded(ids, PAD), "attention_mask": padded([[1] * len(x) for x in ids], 0)}
        if types:
            found["mm_token_type_ids"] = (found["input_ids"] == VIDEO) * 2 + (found["input_ids"] == IMAGE) * 1
        parts = [part for row in rows for part in row]
        return found | self.ordered([part for part in parts if isinstance(part, Video | Image)])


def entries() -> dict[str, Tiny]:
    package = importlib.import_module("tests.hosts")
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name.startswith("tiny_")]
    found = [importlib.import_module(f"tests.hosts.{name}").ENTRY for name in names]
    return {entry.kind: entry for entry in found}
