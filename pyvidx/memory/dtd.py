"""Differential token dropping (DTD, TimeChat-Online, arXiv:2504.17343): drop what the last frame showed already."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyvidx.memory.bank import Bank
from pyvidx.memory.clips import ranks
from pyvidx.memory.policies import Concat
from pyvidx.memory.registry import register
from pyvidx.memory.slots import rows_at, slot_of, wide
from pyvidx.ops._library import FLOATING, require, require_tensors
from pyvidx.ops.memory_merge import cosine


@register("dtd")
@dataclass(frozen=True)
class Dtd(Concat):
    """Keep the tokens of a frame that are unlike the token at their place in the frame before, ragged.

        c[p] = cos(x[t-1, p], x[t, p]),  x[t-1] as it came, with what was dropped of it

    The first frame is whole. A token that stays keeps its place; a frame may keep none.

    Args:
        threshold: drop a token where c > threshold. None: by ratio.
        ratio: drop the int(N * ratio) tokens of a frame with the largest c, the first of equals.

    Of the authors' program this leaves out: of a batch it takes the grid of the first video and the mask of the last;
    steps that share a time id are one frame to it (here every push is a frame); it scans the sequence for every frame
    and waits for the device for every token.
    """

    name = "dtd"
    layout = "ragged"
    whole_frame = False
    threshold: float | None = 0.5
    ratio: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rule("dtd", self.threshold, self.ratio)

    def _advance_(
        self,
        bank: Bank,
        frame: Tensor,
        attached: Sequence[Tensor],
        when: Tensor | None,
        active: Tensor | None,
        size: Tensor | int,
    ) -> Bank:
        before = rows_at(bank.rows, _newest(bank))
        first = bank.length == 0
        if bank.head is not None:
            before = torch.where(first[:, None, None], rows_at(bank.head.rows, _newest(bank.head)), before)
            first &= bank.head.length == 0
        kept = keep(-cosine(wide(before), wide(frame)), None if self.threshold is None else -self.threshold, self.ratio)
        return super()._advance_(bank, frame, attached, when, active, (kept | first[:, None]).int())


def dtd_pixels(
    pixels: Tensor,
    grid: Sequence[int],
    threshold: float | None = 0.1,
    ratio: float | None = None,
    *,
    mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
    std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
    temporal: int = 2,
    merge: int = 2,
) -> Tensor:
    """The same by pixels, as the processors of Qwen2-VL to Qwen3-VL lay them out, before anything is encoded.

    A step of the grid holds `temporal` pictures; the difference is the mean of |earliest picture of step t-1 - latest
    picture of step t| over the pixels of a token, in [0, 1]. The authors' program knows steps of two pictures, patches
    of 14 pixels and merges of 2 x 2 only; its parallel form, which raises, is not here.

    Args:
        pixels: [T * h * w * merge^2, 3 * temporal * patch^2] floating, of one video, or [B, ..., ...] of a batch.
        grid: T, h, w in tokens, after the spatial merge.
        threshold: drop a token where the difference is below. None: by ratio.
        ratio: drop the int(h * w * ratio) tokens of a step with the smallest difference.
        mean, std: what the processor took off and divided by, per color; these are CLIP's.
        temporal, merge: pictures of a step, and patches along a side of a token.

    Returns:
        bool [T, h * w], or [B, T, h * w], True where a token is kept. The first step is whole.

    Raises:
        ValueError: the shapes do not agree, a number is out of range, or not exactly one of threshold and ratio is
            given.
    """
    require_tensors("dtd_pixels", pixels=pixels)
    _check_rule("dtd_pixels", threshold, ratio)
    finite = threshold is None or math.isfinite(threshold)
    require(finite, f"dtd_pixels: threshold must be finite, got {threshold}")
    fits = len(grid) == 3 and min(*grid, temporal, merge) >= 1
    require(fits, f"dtd_pixels: grid must be T, h, w, and all sizes at least 1, got {grid}, {temporal} and {merge}")
    require(len(mean) == len(std) == 3, f"dtd_pixels: mean and std must have 3 values, got {mean} and {std}")
    T, h, w = (int(n) for n in grid)
    fits = pixels.dim() in (2, 3) and pixels.dtype in FLOATING
    area = pixels.shape[-1] // (3 * temporal) if fits else 0  # pixels of a patch
    fits = fits and area == math.isqrt(area) ** 2 >= 1
    fits = fits and pixels.shape[-1] == 3 * temporal * area and pixels.shape[-2] == T * h * w * merge**2
    require(fits, "dtd_pixels: pixels must be [T * h * w * merge^2, 3 * temporal * patch^2] of the grid", pixels)
    x = wide(pixels).unflatten(-1, (3, temporal, area)).unflatten(-4, (T, h * w, merge**2))
    x = torch.stack(
        [x[..., c, :, :] * std[c] + mean[c] for c in range(3)], -3
    )  # [..., T, h*w, merge^2, 3, temporal, _]
    distance = (x[..., :-1, :, :, :, 0, :] - x[..., 1:, :, :, :, -1, :]).abs().mean((-3, -2, -1))  # [..., T-1, h*w]
    kept = keep(distance, threshold, ratio)
    return torch.cat([kept.new_ones(*kept.shape[:-2], 1, h * w), kept], -2)


def keep(distance: Tensor, threshold: float | None, ratio: float | None) -> Tensor:
    """Where a token's distance to the one before, [..., N], is not below the threshold, or not among the int(N * ratio)
    smallest. What is NaN stays, by either rule."""
    if ratio is None:
        return ~(distance < threshold)
    return ranks(distance) >= int(distance.shape[-1] * ratio)


def _newest(bank: Bank) -> Tensor:
    return slot_of(bank, (bank.length[:, None].long() - 1).expand(-1, bank.order.shape[1]))


def _check_rule(name: str, threshold: float | None, ratio: float | None) -> None:
    one = (threshold is None) != (ratio is None)
    require(one, f"{name}: give a threshold or a ratio, the other is None; got {threshold} and {ratio}")
    require(ratio is None or 0 <= ratio <= 1, f"{name}: ratio must be in [0, 1], got {ratio}")
