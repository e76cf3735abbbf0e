"""Frames to normalized pixels, the way each public system does it.

CLIP's own processor resizes 8-bit images with Pillow: bicubic, antialiased, columns first, each pass rounded to 8 bits.
Results depend on that down to the level, so `ops.resize_normalize` does the same in the same integers: equal bit for
bit on every device. It touches only the rows and columns that survive the crop.

Pillow 13 resizes rows before columns if (H - h) > 2 max(W - w, 0), which is H > 2 W where the aspect is kept. Kept here
is the order of all earlier versions, with which the models were trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyvidx.ops import resize_normalize

# OpenAI CLIP's; EVA-CLIP, BLIP-2 and MA-LMM use the same.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
# BT-Adapter's mmaction2 configs state CLIP's numbers on a scale of 255, cut to three digits.
MMACTION_MEAN = (122.771 / 255, 116.746 / 255, 104.093 / 255)
MMACTION_STD = (68.500 / 255, 66.632 / 255, 70.323 / 255)

# Values held in floating point at once, per chunk of frames: bounds the working memory at about 128 MB.
_CHUNK_VALUES = 1 << 24

# Pixels of the largest picture that is made whole before its crop is cut out. A frame of 65535 x 1 would be resized to
# 14.7 million x 224; of larger ones only what survives the crop is worked out.
_MOST_PIXELS = 1 << 24

# Filters of resize_normalize.
_PILLOW = {"pillow": "bicubic", "pillow_bilinear": "bilinear"}


@dataclass(frozen=True)
class Preset:
    """How frames become pixels.

    Args:
        size: pixels, of the shorter side ("shortest", aspect kept) or of both ("squash").
        resize: "shortest" or "squash".
        crop: side of the square cut from the center, or None. With a filter of Pillow's it may be larger than the
            resized frame, which is then surrounded with black.
        filter: "bicubic" and "bilinear" sample without antialiasing, "nearest" takes the pixel at floor(x W / w);
            "pillow" is Pillow's antialiased bicubic, "pillow_bilinear" its bilinear.
        long_side: the longer side is rounded "down" (CLIP) or to the "nearest" pixel (mmaction2).
        to_uint8: after bicubic or bilinear, "round", "truncate" (both clamped to 0..255), or "wrap": truncated modulo
            256, as an unguarded cast does.
        mean, std: per channel, of values in [0, 1].

    Raises:
        ValueError: a value is none of these, or a filter that is not Pillow's has crop > size.
    """

    size: int = 224
    resize: Literal["shortest", "squash"] = "shortest"
    crop: int | None = 224
    filter: Literal["pillow", "pillow_bilinear", "bicubic", "bilinear", "nearest"] = "pillow"
    long_side: Literal["down", "nearest"] = "down"
    to_uint8: Literal["round", "truncate", "wrap"] = "round"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        for name, allowed in (
            ("resize", ("shortest", "squash")),
            ("filter", (*_PILLOW, "bicubic", "bilinear", "nearest")),
            ("long_side", ("down", "nearest")),
            ("to_uint8", ("round", "truncate", "wrap")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Preset: {name} must be one of {allowed}, got {getattr(self, name)!r}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(self.std):
            raise ValueError(f"Preset: mean and std must be 3 numbers, std not 0, got {self.mean} and {self.std}")
        if self.size < 1 or (self.crop is not None and self.crop < 1):
            raise ValueError(f"Preset: size and crop must be at least 1, got crop={self.crop}, size={self.size}")
        if self.crop is not None and self.crop > self.size and self.filter not in _PILLOW:
            raise ValueError(
                f"Preset: crop <= size must hold with filter={self.filter!r}, got crop={self.crop}, size={self.size}"
            )


_MMACTION = dict(filter="bilinear", mean=MMACTION_MEAN, std=MMACTION_STD)
_RETRIEVAL = dict(long_side="nearest", **_MMACTION)

PRESETS: dict[str, Preset] = {
    # CLIP and all that use its processor.
    "clip": Preset(),
    # SigLIP, and SigLIP 2 of a fixed resolution.
    "siglip": Preset(resize="squash", mean=SIGLIP_MEAN, std=SIGLIP_STD),
    "siglip2": Preset(resize="squash", filter="pillow_bilinear", mean=SIGLIP_MEAN, std=SIGLIP_STD),
    # BT-Adapter through mmaction2: MSR-VTT and classification; then DiDeMo, LSMDC, ActivityNet and stored features.
    "bt_adapter_retrieval": Preset(**_RETRIEVAL),
    "bt_adapter_retrieval_256": Preset(size=256, **_RETRIEVAL),
    # Its pretraining, on random boxes.
    "bt_adapter_train": Preset(resize="squash", **_MMACTION),
    # BT-Adapter chat and Video-ChatGPT: squashed by nearest, which leaves CLIP's processor nothing to resize.
    "bt_adapter_chat": Preset(resize="squash", filter="nearest"),
    # MA-LMM evaluation. Its cast lets overshoot wrap around, which turns 1.4 % of the pixels at hard edges black or
    # white; "official" keeps that.
    "ma_lmm": Preset(resize="squash", filter="bicubic", to_uint8="truncate"),
    "ma_lmm_official": Preset(resize="squash", filter="bicubic", to_uint8="wrap"),
}


def as_preset(preset: str | Preset) -> Preset:
    """A preset, or the one of PRESETS with this name.

    Raises:
        ValueError: there is none of this name.
    """
    if isinstance(preset, Preset):
        return preset
    if preset not in PRESETS:
        raise ValueError(f"preprocess: preset must be one of {list(PRESETS)} or a Preset, got {preset!r}")
    return PRESETS[preset]


# uint8 [..., H, W, 3], or a list of pictures of one size: PIL images, arrays or tensors [H, W, 3].
Frames = Tensor | np.ndarray | list[Any] | tuple[Any, ...] | Any


def clip_preprocess(
    frames: Frames,
    size: int = 224,
    *,
    resize: Literal["shortest", "squash"] = "shortest",
    crop: bool = True,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """CLIP's processor at any size: `preprocess` with the "clip" preset spelled out.

    crop=False with "shortest" keeps the whole frame, [..., 3, h, w] with min(h, w) = size.
    """
    return preprocess(frames, Preset(size, resize, size if crop else None, mean=mean, std=std), dtype=dtype)


def preprocess(frames: Frames, preset: str | Preset = "clip", *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Resize, crop and normalize frames: (x / 255 - mean) / std.

    Args:
        frames: [..., H, W, 3] uint8 RGB, a tensor of any strides on any device, for instance Clip.frames, or a NumPy
            array; or a list of T pictures of one size, each a PIL image, an array or a tensor [H, W, 3].
        preset: a key of PRESETS or a Preset.
        dtype: of the result; the arithmetic before is in integers, float32 or wider.

    Returns:
        [..., 3, h, w] contiguous, on the device of `frames`; h = w = preset.crop, if that is given.

    Raises:
        ValueError: frames are not uint8 [..., H, W, 3], or the preset is unknown, or it has no crop and the resized
            frames would have more than 16.7 million pixels.
    """
    frames = as_frames(frames)
    if frames.dtype != torch.uint8 or frames.dim() < 3 or frames.shape[-1] != 3 or 0 in frames.shape[-3:]:
        raise ValueError(f"preprocess: frames must be uint8 [..., H, W, 3], got {frames.dtype} {tuple(frames.shape)}")
    preset = as_preset(preset)
    H, W = frames.shape[-3:-1]
    h, w = _resized(H, W, preset)
    rows = _kept(h, preset.crop)
    columns = _kept(w, preset.crop)
    if len(rows) * len(columns) > max(_MOST_PIXELS, H * W):
        raise ValueError(
            f"preprocess: resized frames must have at most {_MOST_PIXELS} pixels, got {h} x {w} for frames of "
            f"{H} x {W}; use a preset that crops"
        )
    images = frames.reshape(-1, H, W, 3)
    if preset.filter in _PILLOW:
        out = resize_normalize(
            images,
            (h, w),
            crop=(rows.start, columns.start, len(rows), len(columns)),
            filter=_PILLOW[preset.filter],
            mean=preset.mean,
            std=preset.std,
            dtype=dtype,
        )
    else:
        out = _sampled_frames(images.permute(0, 3, 1, 2), h, w, rows, columns, preset, dtype)
    return out.view(*frames.shape[:-3], *out.shape[1:])


def as_frames(frames: Frames) -> Tensor:
    """uint8 [..., H, W, 3] of what users hold: a tensor, an array, a PIL image, or a list of them.

    Raises:
        ValueError: it is none of these, or the pictures of a list differ in size.
    """
    if isinstance(frames, Tensor):
        return frames
    if hasattr(frames, "convert") and hasattr(frames, "getbands"):  # a PIL image, without importing PIL
        frames = np.asarray(frames.convert("RGB"))
    if isinstance(frames, np.ndarray):
        if frames.dtype != np.uint8:
            raise ValueError(f"preprocess: frames must be uint8 [..., H, W, 3], got {frames.dtype} {frames.shape}")
        # A copy where torch could not use the memory as it is: read-only, or with negative strides.
        usable = frames.flags.writeable and all(stride >= 0 for stride in frames.strides)
        return torch.from_numpy(frames if usable else frames.copy())
    if isinstance(frames, (list, tuple)) and frames:
        pictures = [as_frames(frame) for frame in frames]
        if len({picture.shape for picture in pictures}) > 1:
            sizes = sorted({tuple(picture.shape) for picture in pictures})
            raise ValueError(f"preprocess: the pictures of a list must have one size, got {sizes}")
        return torch.stack(pictures)
    what = f"an empty {type(frames).__name__}" if isinstance(frames, (list, tuple)) else type(frames).__name__
    raise ValueError(f"preprocess: frames must be a tensor, an array, or a list of pictures, got {what}")


def _resized(H: int, W: int, preset: Preset) -> tuple[int, int]:
    if preset.resize == "squash":
        return preset.size, preset.size
    short, long = min(H, W), max(H, W)
    # The order of operations is mmcv's and transformers' own: it decides where a product falls on a half.
    long = int(long * (preset.size / short) + 0.5) if preset.long_side == "nearest" else preset.size * long // short
    return (preset.size, long) if H <= W else (long, preset.size)


def _kept(length: int, crop: int | None) -> range:
    if crop is None:
        return range(length)
    first = (length - crop) // 2
    return range(first, first + crop)


def _sampled_frames(
    images: Tensor, h: int, w: int, rows: range, columns: range, preset: Preset, dtype: torch.dtype
) -> Tensor:
    """uint8 [N, 3, H, W] resized to [h, w] without antialiasing, cut to the given rows and columns, and normalized."""
    H, W = images.shape[2:]
    out = torch.empty(len(images), 3, len(rows), len(columns), dtype=dtype, device=images.device)
    scale = 1.0 / (255.0 * torch.tensor(preset.std, dtype=torch.float64))
    shift = -torch.tensor(preset.mean, dtype=torch.float64) / torch.tensor(preset.std, dtype=torch.float64)
    scale, shift = (v.to(images.device, torch.float32).view(3, 1, 1) for v in (scale, shift))
    most = max(H * W, len(rows) * len(columns) if h * w > _MOST_PIXELS else h * w)
    step = max(1, _CHUNK_VALUES // (3 * most))
    for i in range(0, len(images), step):
        resized = _resize(images[i : i + step], h, w, rows, columns, preset)
        out[i : i + step] = torch.addcmul(shift, resized.float(), scale)
    return out


def _resize(x: Tensor, h: int, w: int, rows: range, columns: range, preset: Preset) -> Tensor:
    """uint8 [N, 3, H, W] resized to [h, w] and cut to the given rows and columns; values 0..255, any dtype."""
    H, W = x.shape[-2:]
    cut = (..., slice(rows.start, rows.stop), slice(columns.start, columns.stop))
    if (H, W) == (h, w):
        return x[cut]
    if h * w > _MOST_PIXELS:
        y = _sampled(_sampled(x, w, columns, preset.filter).transpose(2, 3), h, rows, preset.filter).transpose(2, 3)
        return _as_levels(y, preset)
    if preset.filter == "nearest":
        return F.interpolate(x, size=(h, w), mode="nearest")[cut]
    return _as_levels(F.interpolate(x.float(), size=(h, w), mode=preset.filter, align_corners=False)[cut], preset)


def _as_levels(y: Tensor, preset: Preset) -> Tensor:
    if preset.to_uint8 == "wrap":
        return y.to(torch.int32) & 255  # a cast of negative floats to uint8 is undefined in C++
    return (y.round() if preset.to_uint8 == "round" else y.trunc()).clamp_(0, 255)


def _sampled(x: Tensor, resized: int, kept: range, mode: str) -> Tensor:
    """The kept positions of the last dimension resized as F.interpolate does it, the others never made."""
    length = x.shape[-1]
    to = torch.arange(kept.start, kept.stop, dtype=torch.float64, device=x.device)
    if mode == "nearest":
        return x[..., (to * length / resized).long().clamp(max=length - 1)]
    at = (to + 0.5) * (length / resized) - 0.5
    at = at.clamp(min=0) if mode == "bilinear" else at
    t = at - at.floor()
    if mode == "bilinear":
        taps = {0: 1 - t, 1: t}
    else:  # bicubic, a = -3/4

        def near(d: Tensor) -> Tensor:
            return (1.25 * d - 2.25) * d * d + 1

        def far(d: Tensor) -> Tensor:
            return ((-0.75 * d + 3.75) * d - 6) * d + 3

        taps = {-1: far(t + 1), 0: near(t), 1: near(1 - t), 2: far(2 - t)}
    source = [(at.floor().long() + k).clamp(0, length - 1) for k in taps]
    return sum(x[..., i] * weight.float() for i, weight in zip(source, taps.values()))
