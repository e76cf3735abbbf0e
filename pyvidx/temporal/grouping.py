"""Which source token stands where in the branch of BT-Adapter: [frame slot, group] for every frame count and mask.

Temporal attention runs over the slots s of one group k, spatial attention over the groups k of one slot s. As published
a slot is a frame and a group a patch. The official code differs in two places, kept under compat="official":

* the llava tower uses groups of T // 2 tokens for every T, also where it did not average frames in pairs;
* the training mask is drawn frame-major and applied to patch-major tokens, so slots and groups are mixtures.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyvidx.ops._library import require_tensors
from pyvidx.temporal.frames import frame_mean

COMPATS = ("paper", "official")
MASK_ORDERS = ("tube", "official")
VARIANTS = ("mma", "llava")


@dataclass(frozen=True)
class Grouping:
    """Where the branch tokens [B, S, K, C] come from.

    Attributes:
        frames: T of the clip.
        patches: P.
        pair: frames (2u, 2u + 1) are averaged first; frame indices below count pairs.
        keep: None (S = frames, K = patches), int64 [B or 1, K] (the same patches of every frame), or int64
            [B or 1, S, K] of flat source indices t * P + p: the forms that pyvidx.ops takes.
        masked: some tokens are left out.
        frame_mask: None, or bool [B, T], the real frames of padded clips (pyvidx.temporal.frames). A slot is a frame.
    """

    frames: int
    patches: int
    pair: bool = False
    keep: Tensor | None = None
    masked: bool = False
    frame_mask: Tensor | None = None

    def patch_mean(self, z: Tensor) -> Tensor:
        """Mean over the frames of every patch. [B, S, K, F] -> [B, P, F]."""
        if self.masked:
            raise ValueError("BT-Adapter: tokens need all patches; a masked clip has only a pooled embedding")
        if self.keep is None:
            return frame_mean(z, self.frame_mask)
        B, S, K, F = z.shape
        where = self.keep[0].flatten().argsort()  # unmasked tables are permutations, the same for every video
        return z.reshape(B, S * K, F)[:, where].view(B, -1, self.patches, F).mean(dim=1)


def grouping(
    T: int,
    P: int,
    *,
    compat: str = "paper",
    variant: str = "mma",
    time_length: int = 64,
    mask: Tensor | None = None,
    mask_order: str | None = None,
    frame_mask: Tensor | None = None,
    kept: int | None = None,
    device: torch.device | None = None,
) -> Grouping:
    """The grouping of a clip.

    Args:
        T, P: frames and patches per frame.
        compat: "paper" (a group is a patch, a slot is a frame) or "official" (bit-faithful to `variant`).
        variant: "mma" or "llava"; only matters for compat="official".
        time_length: rows of the time table. Longer clips are averaged in pairs, except by the official mma tower.
        mask: bool, True = removed. A tube [P] or [B, P], or (both orders) [B, T*P], frame-major as it is drawn.
        mask_order: "tube": a mask removes the tokens it names, so a tube's slots are frames and its groups patches.
            "official": the row [B, T*P] is laid on the patch-major tokens as it is. Default: that of `compat`.
        frame_mask: bool [B, T], True = a real frame, checked by check_frame_mask. Only where slots are frames: not for
            clips averaged in pairs, nor for the official groups and masks that mix frames.
        kept: how many False each row of the mask is known to have; then nothing waits for the mask's device.
        device: of the index table.

    Raises:
        ValueError: the frame count or a mask does not fit.
    """
    modes = {"compat": compat, "variant": variant, "time_length": time_length}
    group = _grouping(T, P, mask=mask, mask_order=mask_order, kept=kept, device=device, **modes)
    if frame_mask is None:
        return group
    if group.pair or (group.keep is not None and group.keep.dim() == 3):
        raise ValueError(
            "BT-Adapter: frame_mask needs slots that are frames: at most time_length frames, no official llava tower, "
            f"no mask that mixes frames; got T = {T}, time_length {time_length}, {compat} {variant}"
        )
    return replace(group, frame_mask=frame_mask)


def _grouping(
    T: int,
    P: int,
    *,
    compat: str,
    variant: str,
    time_length: int,
    mask: Tensor | None,
    mask_order: str,
    kept: int | None,
    device: torch.device | str | None,
) -> Grouping:
    if compat not in COMPATS or variant not in VARIANTS:
        raise ValueError(
            f"BT-Adapter: compat must be one of {COMPATS} and variant of {VARIANTS}, got {compat!r}, {variant!r}"
        )
    mask_order = mask_order or ("official" if compat == "official" else "tube")
    if mask_order not in MASK_ORDERS:
        raise ValueError(f"BT-Adapter: mask_order must be one of {MASK_ORDERS}, got {mask_order!r}")
    require_tensors("BT-Adapter", mask=mask)
    if mask is not None and mask.dtype != torch.bool:  # of indices most would count as True
        raise ValueError(f"BT-Adapter: mask must be bool, True = removed, got {tuple(mask.shape)} {mask.dtype}")
    if compat == "official" and variant == "mma":
        if not 1 <= T <= time_length:
            raise ValueError(f"BT-Adapter (official mma tower): T must be in [1, {time_length}], got {T}")
        return Grouping(T, P, keep=_kept_table(mask, T, P, mask_order, kept, device), masked=mask is not None)
    least = 2 if compat == "official" else 1
    pair = T > time_length
    if T < least or (pair and (T % 2 or T > 2 * time_length)):
        raise ValueError(
            f"BT-Adapter ({compat}): T must be in [{least}, {time_length}], or even and at most "
            f"{2 * time_length} (frames are averaged in pairs), got {T}"
        )
    if compat == "paper":
        slots = T // 2 if pair else T
        return Grouping(T, P, pair, _kept_table(mask, slots, P, mask_order, kept, device), masked=mask is not None)
    if mask is not None:
        raise ValueError("BT-Adapter (official llava tower): there is no mask")
    return Grouping(T, P, pair, None if pair else _halved(T, P, device))


def _kept_table(
    mask: Tensor | None, T: int, P: int, order: str, kept: int | None, device: torch.device | str | None
) -> Tensor | None:
    """A tube [P] or [B, P] -> [1 or B, K]; [B, T*P] -> [B, S = T, K]."""
    if mask is None:
        return None
    if order == "tube" and mask.shape[-1] == P and mask.dim() in (1, 2):
        return _kept_indices(mask[None] if mask.dim() == 1 else mask, kept).to(device)
    if mask.dim() != 2 or mask.shape[1] != T * P:
        tubes = f"[P] or [B, P] with P = {P} or " if order == "tube" else ""
        raise ValueError(
            f"BT-Adapter: mask (order {order}) must be {tubes}[B, T*P] with T*P = {T * P}, got {tuple(mask.shape)}"
        )
    if order == "tube":
        mask = mask.view(-1, T, P).transpose(1, 2).flatten(1)  # to the order of the tokens
    index = _kept_indices(mask, kept).to(device)
    if index.shape[1] % T:
        raise ValueError(f"BT-Adapter: the number of kept tokens must be a multiple of T = {T}, got {index.shape[1]}")
    return _source(index.view(mask.shape[0], -1, T).transpose(1, 2), T, P)


def _halved(T: int, P: int, device: torch.device | str | None) -> Tensor:  # -> [1, S = T // 2, K = P * T / S]
    S = T // 2
    if P * T % S:
        raise ValueError(f"BT-Adapter (official llava tower): T // 2 must divide T times the {P} patches, got T = {T}")
    return _source(torch.arange(P * T, device=device).view(1, -1, S).transpose(1, 2), T, P)


def _source(n: Tensor, T: int, P: int) -> Tensor:
    """Patch-major flat index p * T + t -> the flat source index t * P + p of the ops."""
    return (n % T * P + n // T).contiguous()


def _kept_indices(mask: Tensor, kept: int | None) -> Tensor:
    """bool [B, n], True = removed -> the indices of the others, ascending, int64 [B, kept]."""
    if kept is not None:
        return mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :kept]
    counts = (~mask).sum(dim=1)
    if not bool((counts == counts[0]).all()) or int(counts[0]) == 0:
        raise ValueError(
            f"BT-Adapter: a mask must keep the same number of tokens, at least 1, in every video, got {counts.tolist()}"
        )
    return (~mask).nonzero()[:, 1].view(mask.shape[0], -1)
