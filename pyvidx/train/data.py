"""Rows of (video, prompt, answer) to batches; what a row gives depends on seed, epoch and row alone, so any process may
read it and a resumed run reads the same."""

import hashlib
import math
import reprlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from pyvidx.data import tables
from pyvidx.preprocess import Preset, as_preset, preprocess
from pyvidx.train.distributed import Ranks
from pyvidx.train.recipe import Recipe
from pyvidx.video.pool import shared

# Names for pyvidx.video.read.
READERS = ("auto", "decord", "pyav", "torchcodec")


@dataclass(frozen=True)
class Row:
    """A sample. start, end: seconds of the video to take frames of; None: all of it."""

    video: str
    prompt: str
    answer: str
    start: float | None = None
    end: float | None = None


class Batch(NamedTuple):
    """pixels [B, T, 3, h, w], and B prompts and answers; the videos that could not be read, with why, are not in it."""

    pixels: Tensor
    prompts: list[str]
    answers: list[str]
    broken: dict[str, str]

    def __len__(self) -> int:
        return len(self.prompts)


def rows(path: str | Path, *, outside: bool = False) -> list[Row]:
    """Rows of a .jsonl or .csv file with the fields of Row. Those that cannot be used are left out, with a warning.

    Args:
        outside: videos may be named by an absolute path or with "..".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another suffix, no row, or most of them cannot be used: without video, prompt or answer, not UTF-8,
            or with a video outside.
    """
    path, readers = Path(path), {".jsonl": tables.json_objects, ".csv": tables.csv_dicts}
    if path.suffix not in readers:
        raise ValueError(f"train: rows must be .jsonl or .csv, got {path}")
    found, left = [], tables.LeftOut(path)
    for number, (line, value) in enumerate(readers[path.suffix](path, left), 1):
        try:
            texts = [value.get(name) for name in ("video", "prompt", "answer")]
            if not all(isinstance(text, str) and text and not tables.flaw(text) for text in texts):
                raise ValueError(f"must have video, prompt and answer, got {reprlib.repr(value)}")
            times = {k: float(value[k]) for k in ("start", "end") if value.get(k) not in (None, "")}
            start, end = times.get("start", 0.0), times.get("end", math.inf)
            if not 0 <= start < end or math.inf in times.values() or any(isinstance(value[k], bool) for k in times):
                raise ValueError(f"must have start and end in seconds, 0 <= start < end, got {times}")
            found.append(Row(texts[0] if outside else tables.inside(texts[0]), *texts[1:], **times))
        except (TypeError, ValueError) as error:
            left.add(f"row {number} of {path} {error} (line {line})")
    if not found or left.count > len(found):
        raise ValueError(f"train: {path} holds {len(found)} rows that can be used, {left.count} that cannot: {left}")
    if left.count:
        warnings.warn(f"train: {left.count} rows are left out: {left}", stacklevel=2)
    return found


@dataclass(frozen=True)
class Take:
    """How a clip is taken of a video.

    Attributes:
        frames: T.
        sampler: a name of pyvidx.video.sampling.
        preset: how pixels are resized and normalized.
        shorter: pixels of the shorter side to resize to before anything else; None: no such step.
        area: least and largest share of a random box of the whole clip, see `random_box`; None: no box.
        flip: mirror every second clip.
        reader: as in pyvidx.video.read.
    """

    frames: int
    sampler: str
    preset: Preset
    shorter: int | None = None
    area: tuple[float, float] | None = None
    flip: bool = False
    reader: str = "auto"

    def __call__(
        self,
        path: Path,
        draws: torch.Generator | None = None,
        *,
        start: float | None = None,
        end: float | None = None,
    ) -> Tensor:
        """[T, 3, size, size]. draws: needed where anything is random; start, end, Raises: see pyvidx.video.read."""
        video = shared().read(path, self.frames, self.sampler, self.reader, start=start, end=end, generator=draws)
        clip = video.frames
        if self.shorter is not None:
            clip = shortened(clip, self.shorter)
        if self.area is not None:
            top, left, h, w = random_box(*clip.shape[1:3], draws, self.area)
            clip = clip[:, top : top + h, left : left + w]
        if self.flip and torch.rand((), generator=draws) < 0.5:
            clip = clip.flip(2)
        return preprocess(clip, self.preset)


class Videos(Dataset):
    """Clips of T frames of the rows' videos, normalized. Indexed by (epoch, row).

    In training: T equal segments with one random frame each, a random box with half of the area or more, and a flip of
    every second clip; otherwise T frames by a rounded linspace, whole. Both are resized to a square.

    Args:
        rows: the samples.
        root: folder that their videos are relative to.
        frames: T.
        size: pixels of a side.
        preset: how pixels are resized and normalized; one that squashes.
        train: draw frames and boxes.
        seed: of the draws.
        reader: as in pyvidx.video.read.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        root: str | Path,
        *,
        frames: int,
        size: int = 224,
        preset: str | Preset = "ma_lmm",
        train: bool = True,
        seed: int = 42,
        reader: str = "auto",
    ):
        preset = sized(preset, size)
        if preset.resize != "squash":
            raise ValueError(f'Videos: the preset must resize by "squash", got {preset.resize!r}')
        self.rows, self.root, self.seed, self.train = list(rows), Path(root), seed, train
        drawn = {"area": (0.5, 1.0), "flip": True} if train else {}
        self.take = Take(frames, "random_interval" if train else "linspace_round", preset, reader=reader, **drawn)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: tuple[int, int]) -> tuple[Row, Tensor | str]:
        """The row with its pixels [T, 3, size, size], or with the reason why there are none."""
        row = self.rows[at[1]]
        draws = generator(self.seed, *at) if self.train else None
        try:
            return row, self.take(self.root / row.video, draws, start=row.start, end=row.end)
        except Exception as error:  # whatever a damaged file makes a decoder raise
            return row, f"{type(error).__name__}: {error}"

    def digest(self) -> str:
        """A hash of the rows: whether two are the same."""
        found = hashlib.sha256()
        for row in self.rows:
            found.update(repr(row).encode(errors="surrogatepass"))
        return found.hexdigest()

    @staticmethod
    def collate(samples: Sequence[tuple[Row, Tensor | str]]) -> Batch:
        good = [(row, pixels) for row, pixels in samples if isinstance(pixels, Tensor)]
        return Batch(
            torch.stack([pixels for _, pixels in good]) if good else torch.empty(0),
            [row.prompt for row, _ in good],
            [row.answer for row, _ in good],
            {row.video: why for row, why in samples if isinstance(why, str)},
        )


def sized(preset: str | Preset, size: int) -> Preset:
    """A preset for images of this size.

    Raises:
        ValueError: there is none of this name.
    """
    return replace(as_preset(preset), size=size, crop=size)


def shortened(frames: Tensor, size: int) -> Tensor:
    """uint8 [T, H, W, 3] with a shorter side of `size`, as mmaction2 resizes: bilinear, without antialiasing."""
    levels = Preset(size, crop=None, filter="bilinear", long_side="nearest", mean=(0, 0, 0), std=(1 / 255,) * 3)
    return preprocess(frames, levels).round().to(torch.uint8).movedim(1, 3)


def generator(*key: int | str) -> torch.Generator:
    """Of what is drawn for this key: seed, epoch, row, purpose. Hashed, for of a seed torch takes 32 bits alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def random_box(
    H: int, W: int, draws: torch.Generator, area: tuple[float, float] = (0.5, 1.0)
) -> tuple[int, int, int, int]:
    """top, left, h, w of a box with a share of the area and an aspect of 3/4 to 4/3, even in the logarithm.

    Of ten tries the first that fits; if none does, the largest box in the middle with an allowed aspect.
    """
    low, high = area
    for _ in range(10):
        share, aspect = torch.rand(2, generator=draws, dtype=torch.float64).tolist()
        pixels, ratio = H * W * (low + (high - low) * share), math.exp(math.log(3 / 4) + aspect * math.log(16 / 9))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= W and 0 < h <= H:
            top = int(torch.randint(H - h + 1, (), generator=draws))
            return top, int(torch.randint(W - w + 1, (), generator=draws)), h, w
    h, w = min(H, round(W * 4 / 3)), min(W, round(H * 4 / 3))
    return (H - h) // 2, (W - w) // 2, h, w


def plan(count: int, recipe: Recipe, ranks: Ranks, epoch: int) -> list[list[tuple[int, int]]]:
    """The (epoch, row) of this process' micro-batches in an epoch.

    The k-th micro-batches of all processes are together the k-th batch of one process with their size.

    Raises:
        ValueError: there are fewer rows than one batch has.
    """
    need = recipe.batch * ranks.world
    if count < need:
        raise ValueError(f"train: a batch of {recipe.batch} on {ranks.world} processes needs {need} rows, got {count}")
    sampler = DistributedSampler(range(count), ranks.world, ranks.rank, shuffle=True, seed=recipe.seed, drop_last=True)
    sampler.set_epoch(epoch)
    mine = [(epoch, row) for row in sampler]
    return [mine[i : i + recipe.batch] for i in range(0, len(mine) - recipe.batch + 1, recipe.batch)]
