"""Frames to 224 x 224 pixels as CLIP has them, against torch's own antialiased resize.

bench/preprocess.py compares with the processors of transformers.
"""

import pytest
import torch
import torch.nn.functional as F

from bench.harness import Case, nbytes
from pyvidx.ops.resize_normalize import resize_normalize
from pyvidx.preprocess import CLIP_MEAN, CLIP_STD

SIZES = {"360p": (360, 640), "480p": (480, 854), "720p": (720, 1280), "1080p": (1080, 1920)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(name, T, dtype, device):
    (H, W), side = SIZES[name], 224
    w = side * W // H
    left = (w - side) // 2
    frames = torch.randint(0, 256, (T, H, W, 3), dtype=torch.uint8, device=device)
    out = torch.empty(T, 3, side, side, device=device, dtype=dtype)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) * 255 for v in (CLIP_MEAN, CLIP_STD))

    def eager():
        x = frames.permute(0, 3, 1, 2)
        x = x if device == "cpu" else x.float()  # torch has its 8-bit kernel on the CPU alone
        x = F.interpolate(x, size=(side, w), mode="bicubic", antialias=True)[..., left : left + side]
        return ((x.float().round().clamp(0, 255) - mean) / std).to(dtype)

    crop, read = (0, left, side, side), W * side // w  # columns of the source
    across, down = 4 * W // w + 1, 4 * H // side + 1  # pixels that one output reads
    return Case(
        "resize_normalize",
        {"T": T, "H": H, "W": W},
        dtype,
        lambda: resize_normalize(frames, (side, w), crop=crop, mean=CLIP_MEAN, std=CLIP_STD, out=out),
        eager,
        bytes=T * H * read * 3 + nbytes(out),
        flops=2 * 3 * T * side * (H * across + side * down),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("T", [1, 8])
@pytest.mark.parametrize("name", SIZES)
def test_resize_normalize(name, T, dtype, device, measure):
    measure(case(name, T, dtype, device))
