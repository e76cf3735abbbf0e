"""Ragged clips: which frames of a padded batch are real. bool [B, T], True = a real frame; None = all of them.

Every mean and every softmax over time leaves the others out, so a padded clip gives the numbers of the clip alone. A
frame's place in time is its index t, wherever the padding stands.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvidx.ops import temporal_attention
from pyvidx.ops._library import require, require_tensors

_UNREAD = ContextVar("masks_unread", default=False)


@contextmanager
def masks_unread() -> Iterator[None]:
    """Inside, nobody looks into a mask: shapes depend on shapes alone, as in compiled code, and nothing waits for a
    GPU. That every clip has a frame is then the caller's word."""
    token = _UNREAD.set(True)
    try:
        yield
    finally:
        _UNREAD.reset(token)


def _unread() -> bool:
    return torch.compiler.is_compiling() or _UNREAD.get()


def check_frame_mask(op: str, frame_mask: Tensor | None, B: int, T: int, device: torch.device) -> Tensor | None:
    """The mask on this device, or None where every frame is real: then the faster path without a mask is exact.

    Raises:
        ValueError: it is not bool [B, T], or a clip has no frame (where masks are unread, that is not seen).
    """
    if frame_mask is None:
        return None
    require_tensors(op, frame_mask=frame_mask)
    fits = frame_mask.dtype == torch.bool and tuple(frame_mask.shape) == (B, T)
    text = "{op}: frame_mask must be bool [B, T] = [{B}, {T}], True = a real frame"
    require(fits, text, frame_mask, op=op, B=B, T=T)
    if _unread():
        return frame_mask.to(device)
    require(bool(frame_mask.any(dim=1).all()), f"{op}: frame_mask must leave every clip a frame", frame_mask)
    return None if bool(frame_mask.all()) else frame_mask.to(device)


def real_only(x: Tensor, frame_mask: Tensor | None) -> Tensor:
    """x [B, T, ...] with zeros in place of the padding, whatever stood there."""
    if frame_mask is None:
        return x
    return x.masked_fill(~frame_mask.view(*frame_mask.shape, *(1,) * (x.dim() - 2)), 0)


def on_real_frames(
    encode: Callable[[Tensor], tuple[Tensor, ...]], frames: Tensor, frame_mask: Tensor | None
) -> tuple[Tensor, ...]:
    """encode, which takes frames by themselves, without work for the padding.

    frames [B, T, ...]; encode: [..., frame] -> one [..., N, C] per layer -> one [B, T, N, C] per layer, zeros where a
    frame is not real.
    """
    if frame_mask is None:
        return encode(frames)
    if _unread():  # the number of real frames would be the size of a tensor
        return tuple(real_only(x, frame_mask) for x in encode(real_only(frames, frame_mask)))
    xs = encode(frames[frame_mask])
    return tuple(x.new_zeros(*frame_mask.shape, *x.shape[1:]).index_put((frame_mask,), x) for x in xs)


def frame_mean(x: Tensor, frame_mask: Tensor | None = None) -> Tensor:
    """Mean over the real frames. [B, T, ...] -> [B, ...]."""
    if frame_mask is None:
        return x.mean(dim=1)
    count = frame_mask.sum(dim=1).view(-1, *(1,) * (x.dim() - 2))
    wide = torch.promote_types(x.dtype, torch.float32)  # a sum of frames may leave float16's range
    return (real_only(x, frame_mask).sum(dim=1, dtype=wide) / count).to(x.dtype)


def token_mask(frame_mask: Tensor | None, before: int, patches: int) -> Tensor | None:
    """bool [B, T] -> [B, 1, 1, L] of a sequence: `before` tokens of the clip, then `patches` tokens of every frame."""
    if frame_mask is None:
        return None
    return F.pad(frame_mask.repeat_interleave(patches, dim=1), (before, 0), value=True)[:, None, None]


def attend_over_frames(qkv: Tensor, frame_mask: Tensor | None = None) -> Tensor:
    """Attention of every position over the real frames of its clip. qkv [B, T, N, 3, H, D] -> [B, T, N, H * D]."""
    if frame_mask is None:
        return temporal_attention(qkv)
    B, T, N, _, H, D = qkv.shape
    q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).flatten(2, 3)  # [B, N * H, T, D] each
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=frame_mask[:, None, None])
    return y.unflatten(1, (N, H)).permute(0, 3, 1, 2, 4).reshape(B, T, N, H * D)
