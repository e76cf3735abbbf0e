"""Masked token gathering: the kept patch tokens of a clip, plus position and time rows (BT-Adapter, section 3.2)."""

import torch
from torch import Tensor

from pyvidx.ops._library import define, require, require_floating, require_index, require_out


def token_gather(
    x: Tensor, keep: Tensor, position: Tensor | None = None, time: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Gather the kept patch tokens of a masked clip and add their position and time embeddings, in one pass.

        out[b, s, k] = x[b, t, p] + position[p] + time[t],  (t, p) the source of (s, k)

    BT-Adapter (arXiv:2309.15785) drops 70 % of the branch's tokens in training. A tube mask keeps the same patches in
    every frame; any other choice, order or regrouping of tokens is a table of flat source indices.

    Args:
        x: [B, T, P, C] patch tokens, any strides (tokens[:, :, 1:] skips the class token without a copy); read in place
            where the last stride is 1.
        keep: int64. [B, K] or [1, K]: a tube, patch indices p in [0, P), and S = T. [B, S, K] or [1, S, K]: flat source
            indices t * P + p in [0, T * P). Unique per video (only the gradient needs that). On the CPU an index out of
            range raises; on CUDA it stops the kernel, as index_select does.
        position: [P, C], added by patch, or None.
        time: [T or more, C], added by frame, or None.
        out: [B, S, K, C] to write into, or None for a new tensor. Not differentiable.

    Returns:
        [B, S, K, C], dtype of x. Differentiable in x, position and time.

    Raises:
        ValueError: a shape, dtype or device does not fit, or out shares memory with an input.
        IndexError: an index of keep is out of range (CPU).
    """
    _check(x, keep, position, time)
    if out is None:
        return _op(x, keep, position, time)
    require_out("token_gather", out, (x.shape[0], *_kept(x, keep), x.shape[3]), x, x, position, time)
    _op_out(x, keep, position, time, out)
    return out


def _kept(x, keep):
    """S, K"""
    return (x.shape[1] if keep.dim() == 2 else keep.shape[1]), keep.shape[-1]


def _check(x, keep, position, time):
    require(x.dim() == 4, "token_gather: x must be [B, T, P, C]", x)
    B, T, P, C = x.shape
    require_floating("token_gather", x=x, position=position, time=time)
    check_keep("token_gather", keep, x)
    require(
        position is None or tuple(position.shape) == (P, C), "token_gather: position must be [P, C] of x", position, x
    )
    require(
        time is None or (time.dim() == 2 and time.shape[0] >= T and time.shape[1] == C),
        "token_gather: time must be [T or more, C] of x",
        time,
        x,
    )


def check_keep(op: str, keep: Tensor, x: Tensor) -> None:
    """Raise unless keep is a table of tokens of the videos of x [B, ...], as token_gather takes it. The indices in it
    are looked at where they are used."""
    require(keep.dtype == torch.int64 and keep.device == x.device, f"{op}: keep must be int64 on x's device", keep, x)
    known = keep.dim() in (2, 3) and (keep.shape[0] == 1 or keep.shape[0] == x.shape[0])
    require(known, f"{op}: keep must be [B or 1, K] (a tube) or [B or 1, S, K]", keep, x)


def flat_index(keep: Tensor, B: int, T: int, P: int) -> Tensor:
    """keep as flat source indices t * P + p, [B, S, K]."""
    if keep.dim() == 2:
        keep = torch.arange(T, device=keep.device)[None, :, None] * P + keep[:, None]
    return keep.expand(B, -1, -1)


def reference(x, keep, position, time):
    B, T, P, C = x.shape
    require_index("token_gather: keep must be", keep, P if keep.dim() == 2 else T * P)
    index = flat_index(keep, B, T, P)  # [B, S, K]
    rows = x.reshape(B, T * P, C).gather(1, index.flatten(1)[..., None].expand(-1, -1, C)).reshape(*index.shape, C)
    if position is not None:
        rows = rows + position[index % P]
    if time is not None:
        rows = rows + time[index // P]
    return rows


def reference_backward(grad_out, source):
    B, T, P = source.shape
    C = grad_out.shape[3]
    require_index("token_gather_backward: source must be", source, grad_out.shape[1] * grad_out.shape[2], absent=True)
    rows = grad_out.flatten(1, 2)  # [B, S * K, C]
    rows = torch.cat([rows, rows.new_zeros(B, 1, C)], dim=1)
    index = torch.where(source < 0, rows.shape[1] - 1, source).flatten(1)[..., None]
    return rows.gather(1, index.expand(-1, -1, C)).reshape(B, T, P, C)


def source_table(keep: Tensor, B: int, T: int, P: int) -> Tensor:
    """The inverse of keep: for each (t, p) the flat index s * K + k that kept it, or -1. int64 [B, T, P]."""
    index = flat_index(keep, B, T, P).flatten(1)
    table = index.new_full((B, T * P), -1)
    return table.scatter_(1, index, torch.arange(index.shape[1], device=index.device).expand(B, -1)).reshape(B, T, P)


def _reference_out(x, keep, position, time, out):
    out.copy_(reference(x, keep, position, time))


def _fake(x, keep, position, time):
    return x.new_empty(x.shape[0], *_kept(x, keep), x.shape[3])


def _setup_context(ctx, inputs, output):
    x, keep, position, time = inputs
    ctx.save_for_backward(keep)
    ctx.shape = x.shape
    ctx.time_rows = None if time is None else time.shape[0]


def _backward(ctx, grad_out):
    (keep,) = ctx.saved_tensors
    B, T, P, C = ctx.shape
    grad_x = _op_backward(grad_out, source_table(keep, B, T, P))
    grad_position = grad_x.sum((0, 1)) if ctx.needs_input_grad[2] else None
    grad_time = None
    if ctx.needs_input_grad[3]:
        grad_time = grad_x.new_zeros(ctx.time_rows, C)
        grad_time[:T] = grad_x.sum((0, 2))
    return (grad_x if ctx.needs_input_grad[0] else None), None, grad_position, grad_time


_op = define(
    "token_gather(Tensor x, Tensor keep, Tensor? position, Tensor? time) -> Tensor",
    reference=reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    autocast="widest",
)
_op_out = define(
    "token_gather_out(Tensor x, Tensor keep, Tensor? position, Tensor? time, Tensor(a!) out) -> ()",
    reference=_reference_out,
    fake=lambda x, keep, position, time, out: None,
)
_op_backward = define(
    "token_gather_backward(Tensor grad_out, Tensor source) -> Tensor",
    reference=reference_backward,
    fake=lambda grad_out, source: grad_out.new_empty(*source.shape, grad_out.shape[3]),
)
