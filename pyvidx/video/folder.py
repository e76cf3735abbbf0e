"""A folder of pictures as a video: the frames that others have extracted, in the order a person would count them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .clip import Damage
from .index import FrameIndex
from .pyav_reader import Item, room_for
from .source import MAX_PIXELS

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class FrameFolder:
    """Pictures of one size, shown `fps` to the second.

    Args:
        name: the folder.
        pictures: in order.
        fps: frames per second.
    """

    name: str
    pictures: tuple[Path, ...]
    fps: float

    @property
    def index(self) -> FrameIndex:
        pts = np.arange(len(self.pictures))
        return FrameIndex(pts, pts / self.fps, 0.0, self.fps, pts, "it is a folder of pictures")


def folder_of(op: str, folder: str, fps: float | None) -> FrameFolder:
    """The pictures of a folder, frame_2.jpg before frame_10.jpg.

    Raises:
        ValueError: it holds none, or fps is missing.
    """
    found = (p for p in Path(folder).iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith("."))
    pictures = tuple(sorted(found, key=lambda p: _counted(p.name)))
    if not pictures:
        raise ValueError(f"{op}: a folder must hold frames ({', '.join(PICTURES)}), there are none in {folder}")
    if fps is None:
        raise ValueError(f"{op}: a folder of frames needs fps, the frames per second they were taken at: {folder}")
    return FrameFolder(folder, pictures, fps)


def decode(source: FrameFolder, wanted: list[int], room: int) -> np.ndarray:
    """The `wanted` pictures as uint8 [K, H, W, 3]; see pyav_reader.decode."""
    out = None
    for k, number in enumerate(wanted):
        image = _picture(source, number)
        if out is None:
            out = np.empty((room_for(len(wanted), image.shape, room), *image.shape), dtype=np.uint8)
        if image.shape != out.shape[1:]:
            raise RuntimeError(
                f"video: {source.pictures[number]} is {image.shape[1]} x {image.shape[0]}, the first frame taken "
                f"{out.shape[2]} x {out.shape[1]}; frames must have one size"
            )
        out[k] = image
    return out


def iterate(source: FrameFolder, keep: Callable[[int, float], bool]) -> Iterator[tuple[Item | None, Damage]]:
    """As pyav_reader.iterate."""
    for number in range(len(source.pictures)):
        if keep(number, number / source.fps):
            yield (number, number / source.fps, source.fps, _picture(source, number)), Damage()
    yield None, Damage()


def _picture(source: FrameFolder, number: int) -> np.ndarray:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise RuntimeError("video: a folder of frames needs Pillow: pip install 'pyvidx[video]'") from error
    path = source.pictures[number]
    try:
        with Image.open(path, formats=("JPEG", "PNG", "BMP", "WEBP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise RuntimeError(f"it has {image.width} x {image.height} pixels; at most {MAX_PIXELS} are read")
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # Pillow's decoders raise whatever the damage makes them
        raise RuntimeError(f"video: frame {number} cannot be read from {path}: {error}") from error


def _counted(name: str) -> list[tuple[int, str]]:
    """Digits count as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
