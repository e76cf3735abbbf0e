"""Spatial and temporal pooling of a clip's patch tokens in one pass (Video-ChatGPT, section 3.1)."""

import torch
from torch import Tensor

from pyvidx.ops._library import define, require, require_floating, require_out
from pyvidx.ops.temporal_scale import check_frame_mask


def st_pool(
    x: Tensor, *, mask: Tensor | None = None, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Average a clip's patch tokens over the frames, and over the patches, reading them once.

        spatial[b, p] = mean_t x[b, t, p],   temporal[b, t] = mean_p x[b, t, p]

    The two halves of Video-ChatGPT's video tokens (arXiv:2306.05424, section 3.1).

    Args:
        x: [B, T, P, C] patch tokens, T and P at least 1, any strides (tokens[:, :, 1:] skips the class token without a
            copy); read in place where the last stride is 1.
        mask: bool [B, T], False at frames to leave out whatever they hold (padding of shorter clips), or None. The
            means over frames are over the others; temporal has rows of 0 there. A clip without any has 0 in both.
        out: (spatial, temporal) to write into, or None for new tensors. Not differentiable.

    Returns:
        spatial [B, P, C] and temporal [B, T, C], dtype of x; sums are kept in float32 (float64 for float64), in an
        order that depends on the sizes alone. Differentiable in x.

    Raises:
        ValueError: a shape, dtype or device does not fit, or out shares memory with an input.
    """
    require(x.dim() == 4 and x.shape[1] > 0 and x.shape[2] > 0, "st_pool: x must be [B, T, P, C] with T, P > 0", x)
    B, T, P, C = x.shape
    require_floating("st_pool", x=x)
    check_frame_mask("st_pool", mask, x)
    mask = None if mask is None else mask.to(torch.int32)
    if out is None:
        return _op(x, mask)
    spatial, temporal = out
    require_out("st_pool", spatial, (B, P, C), x, x)
    require_out("st_pool", temporal, (B, T, C), x, x)
    _op_out(x, mask, spatial, temporal)
    return out


def reference(x, mask):
    if mask is None:
        return x.mean(1), x.mean(2)
    real = (mask != 0)[:, :, None, None]
    x = torch.where(real, x, 0)
    return x.sum(1) / real.sum(1).clamp(min=1).to(x.dtype), x.mean(2)


def reference_backward(grad_spatial, grad_temporal, mask):
    T, P = grad_temporal.shape[1], grad_spatial.shape[1]
    if mask is None:
        return grad_spatial[:, None] / T + grad_temporal[:, :, None] / P
    real = (mask != 0)[:, :, None, None]
    count = real.sum(1, keepdim=True).clamp(min=1).to(grad_spatial.dtype)
    return torch.where(real, grad_spatial[:, None] / count + grad_temporal[:, :, None] / P, 0)


def _reference_out(x, mask, spatial, temporal):
    for out, value in zip((spatial, temporal), reference(x, mask)):
        out.copy_(value)


def _fake(x, mask):
    B, T, P, C = x.shape
    return x.new_empty(B, P, C), x.new_empty(B, T, C)


def _fake_backward(grad_spatial, grad_temporal, mask):
    B, P, C = grad_spatial.shape
    return grad_spatial.new_empty(B, grad_temporal.shape[1], P, C)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _backward(ctx, grad_spatial, grad_temporal):
    return _op_backward(grad_spatial, grad_temporal, *ctx.saved_tensors), None


_op = define(
    "st_pool(Tensor x, Tensor? mask) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    autocast="widest",
)
_op_out = define(
    "st_pool_out(Tensor x, Tensor? mask, Tensor(a!) spatial, Tensor(b!) temporal) -> ()",
    reference=_reference_out,
    fake=lambda x, mask, spatial, temporal: None,
)
_op_backward = define(
    "st_pool_backward(Tensor grad_spatial, Tensor grad_temporal, Tensor? mask) -> Tensor",
    reference=reference_backward,
    fake=_fake_backward,
)
