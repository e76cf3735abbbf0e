"""8-bit frames resized as Pillow does it, cropped and normalized, in one pass."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pyvidx.ops._library import FLOATING, define, require, require_out, require_tensors

_MOST = 2**31 - 1  # pixels of an axis
_WEIGHT_BITS = 22


def resize_normalize(
    frames: Tensor,
    size: tuple[int, int],
    *,
    crop: tuple[int, int, int, int] | None = None,
    filter: Literal["bicubic", "bilinear"] = "bicubic",
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Resize frames with Pillow's antialiased filter, cut out a part, and normalize it: (level / 255 - mean) / std.

        across[t, Y, x, c] = level(sum_X columns[x, X] frames[t, Y, X, c])
        out[t, c, y, x] = (level(sum_Y rows[y, Y] across[t, Y, x, c]) / 255 - mean[c]) / std[c]
        level(s) = clamp((s + 2^21) >> 22, 0, 255)

    rows and columns are Pillow's integer weights, so that levels are equal to those of `Image.resize` bit for bit (of
    versions below 13 also for tall images; 13 resizes their rows first). Only what the crop keeps is computed.

    Args:
        frames: uint8 [T, H, W, 3], any strides; read in place.
        size: (h, w), of the whole resized frame.
        crop: (top, left, rows, columns), in pixels of the resized frame. Where it reaches beyond that, levels are 0, as
            where a processor pads before it normalizes. None: the whole frame.
        filter: Pillow's name of it.
        mean, std: per channel, of values in [0, 1].
        dtype: of the result, if out is not given: float32, float16, bfloat16 or float64.
        out: [T, 3, rows, columns] to write into, or None for a new tensor.

    Returns:
        [T, 3, rows, columns], contiguous if out is not given. Not differentiable.

    Raises:
        ValueError: frames are not uint8 [T, H, W, 3] with H, W > 0, a number is out of range, the filter or dtype is
            unknown, or out does not fit or shares memory with frames.
    """
    require_tensors("resize_normalize", frames=frames, out=out)
    known = filter in ("bicubic", "bilinear")
    require(known, f"resize_normalize: filter must be 'bicubic' or 'bilinear', got {filter!r}")
    crop = (0, 0, *size) if crop is None else tuple(crop)
    _check(frames, size, crop, mean, std)
    args = list(size), list(crop), filter == "bilinear", list(mean), list(std)
    if out is None:
        require(dtype in FLOATING, "resize_normalize: dtype must be float32, float16, bfloat16 or float64")
        return _op(frames, *args, dtype)
    require_out("resize_normalize", out, (frames.shape[0], 3, *crop[2:]), frames.new_empty(0, dtype=out.dtype))
    require(out.dtype in FLOATING, "resize_normalize: out must be float32, float16, bfloat16 or float64", out)
    _op_out(frames, *args, out)
    return out


def _check(frames, size, crop, mean, std):
    require(
        frames.dtype == torch.uint8 and frames.dim() == 4 and frames.shape[3] == 3,
        "resize_normalize: frames must be uint8 [T, H, W, 3]",
        frames,
    )
    require(
        1 <= frames.shape[1] <= _MOST and 1 <= frames.shape[2] <= _MOST,
        "resize_normalize: H and W of frames must be in [1, 2^31)",
        frames,
    )
    require(
        len(size) == 2 and all(1 <= n <= _MOST for n in size),
        "resize_normalize: size must be (h, w), each in [1, 2^31), got {size}",
        size=size,
    )
    require(
        len(crop) == 4 and all(-_MOST <= n <= _MOST for n in crop) and min(crop[2:]) >= 1,
        "resize_normalize: crop must be (top, left, rows, columns), rows and columns at least 1, all below 2^31 and "
        "above -2^31, got {crop}",
        crop=crop,
    )
    three = len(mean) == 3 and len(std) == 3
    require(three, "resize_normalize: mean and std must have 3 values, got {mean} and {std}", mean=mean, std=std)
    require(all(s != 0 for s in std), "resize_normalize: std must not be 0, got {std}", std=std)


def weights(length: int, resized: int, begin: int, count: int, bilinear: bool, device: torch.device) -> Tensor:
    """Pillow's weights of outputs begin, begin + 1, ..., float64 [count, length], in units of 2^-22.

    The filter is as wide as the reduction, cut at the border and normalized over what remains. Outside of [0, resized)
    all weights are 0.
    """
    f64 = dict(dtype=torch.float64, device=device)
    at = torch.arange(begin, begin + count, **f64)[:, None]
    inside = at.clamp(0, resized - 1)
    pixel = torch.arange(length, **f64)
    if length == resized:
        weight = (pixel == inside).double()
    else:
        scale = length / resized
        stretch = max(scale, 1.0)
        support = (1 if bilinear else 2) * stretch
        center = (inside + 0.5) * scale
        low, past = (center - support + 0.5).trunc().clamp(min=0), (center + support + 0.5).trunc().clamp(max=length)
        t = ((pixel - center + 0.5) * (1 / stretch)).abs()
        near = 1 - t if bilinear else (1.5 * t - 2.5) * t * t + 1
        far = 0.0 if bilinear else (((t - 5) * t + 8) * t - 4) * -0.5
        weight = torch.where(t < 1, near, torch.where(t < 2, far, 0.0))
        weight = torch.where((pixel >= low) & (pixel < past), weight, 0.0)
        weight = weight / weight.sum(1, keepdim=True)
    weight = torch.where(at == inside, weight * 2.0**_WEIGHT_BITS, 0.0)
    return (weight + torch.where(weight < 0, -0.5, 0.5)).trunc()


def reference(frames, size, crop, bilinear, mean, std, dtype):
    """Sums of integers below 2^53 in float64 have no rounding, in whatever order."""
    _check(frames, size, crop, mean, std)
    require(dtype in FLOATING, "resize_normalize: dtype must be float32, float16, bfloat16 or float64")
    T, H, W, _ = frames.shape
    (h, w), (top, left, count, columns) = size, crop
    down = weights(H, h, top, count, bilinear, frames.device)
    across = weights(W, w, left, columns, bilinear, frames.device).T
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = frames.new_empty(T, 3, count, columns, dtype=dtype)
    for t in range(T):  # one frame in float64 at a time
        levels = _level(down @ _level(frames[t].permute(2, 0, 1).double() @ across)).to(wide)
        for c in range(3):
            out[t, c] = levels[c] * (1 / (255 * std[c])) + -mean[c] / std[c]
    return out


def _level(sums):
    return ((sums + 2.0 ** (_WEIGHT_BITS - 1)) * 2.0**-_WEIGHT_BITS).floor().clamp(0, 255)


def _reference_out(frames, size, crop, bilinear, mean, std, out):
    out.copy_(reference(frames, size, crop, bilinear, mean, std, out.dtype))


def _fake(frames, size, crop, bilinear, mean, std, dtype):
    return frames.new_empty(frames.shape[0], 3, *crop[2:], dtype=dtype)


_ARGUMENTS = "Tensor frames, int[] size, int[] crop, bool bilinear, float[] mean, float[] std"
_op = define(f"resize_normalize({_ARGUMENTS}, ScalarType dtype) -> Tensor", reference=reference, fake=_fake)
_op_out = define(
    f"resize_normalize_out({_ARGUMENTS}, Tensor(a!) out) -> ()",
    reference=_reference_out,
    fake=lambda frames, size, crop, bilinear, mean, std, out: None,
)
