"""Videos with captions to batches that are always full: a row that cannot be read gives its place to another."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyvidx.data.captions import Captioned
from pyvidx.train.data import Take, generator

# A folder that is wrong as a whole should not be searched to its end.
TRIES = 100


class Pair(NamedTuple):
    """A video and its caption, as seen in an epoch.

    Attributes:
        at: (epoch, row) of what it is; with the seed it decides all that is drawn for it.
        text: the caption, or its embedding [E] where that is stored.
        video: pixels [T, 3, h, w], or stored backbone outputs [d, T, 1+P, C].
        broken: rows that were to be here, and why they are not.
    """

    at: tuple[int, int]
    text: str | Tensor
    video: Tensor
    broken: dict[str, str]


class Pairs(NamedTuple):
    """A batch of B: `at` and `text` of each, video [B, ...], and all that is broken; text [B, E] if it is stored."""

    at: list[tuple[int, int]]
    text: list[str] | Tensor
    video: Tensor
    broken: dict[str, str]

    def __len__(self) -> int:
        return len(self.at)

    @property
    def frames(self) -> int:
        """T."""
        return self.video.shape[2 if isinstance(self.text, Tensor) else 1]


def collate(pairs: Sequence[Pair]) -> Pairs:
    at, text, video, broken = zip(*pairs)
    text = torch.stack(text) if isinstance(text[0], Tensor) else list(text)
    return Pairs(list(at), text, torch.stack(video), {name: why for part in broken for name, why in part.items()})


class PairVideos(Dataset):
    """Clips and captions of rows, indexed by (epoch, row). Instead of a row that cannot be read comes the next one that
    can, so every process has the same number, and what is read depends on neither them nor their number. That row may
    then be in a batch twice, as a negative of its own.

    Args:
        source: the rows.
        take: of the clips.
        seed: of the draws.
    """

    def __init__(self, source: Captioned, take: Take, seed: int):
        self.source, self.take, self.seed = source, take, seed

    def __len__(self) -> int:
        return len(self.source)

    def digest(self) -> str:
        """A hash of names and captions: whether two are the same."""
        return self.source.digest()

    def __getitem__(self, at: tuple[int, int]) -> Pair:
        """Raises RuntimeError where 100 rows on end, or all, cannot be read."""
        epoch, first = at
        broken = {}
        for further in range(min(TRIES, len(self))):
            row = (first + further) % len(self)
            name, text = self.source.names[row], self.source.texts[row]
            try:
                if not text:
                    raise ValueError("there is no caption")
                with self.source.file(row) as path:
                    video = self.take(path, generator(self.seed, epoch, row))
            except Exception as error:  # whatever a damaged file makes a decoder raise
                broken[name] = f"{type(error).__name__}: {error}"
                continue
            return Pair((epoch, row), text, video, broken)
        name, why = next(iter(broken.items()))
        raise RuntimeError(f"train: {len(broken)} rows from {name} on cannot be read: {why}")

    collate = staticmethod(collate)
