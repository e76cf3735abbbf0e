"""Attention over the frames of a clip, at every patch position by itself (BT-Adapter, section 3.1)."""

import torch
from torch import Tensor

from pyvidx.ops._library import define, require, require_floating, require_out

MAX_FRAMES = 128  # csrc/include/pyvidx/temporal_attention.h


def temporal_attention(qkv: Tensor, *, scale: float | None = None, out: Tensor | None = None) -> Tensor:
    """Let every patch position attend over the frames of its clip, straight from the projection's output.

        out[b, t, p, h] = sum_s softmax_s(scale <q[b, t, p, h], k[b, s, p, h]>) v[b, s, p, h],  s over the T frames

    The temporal half of divided space-time attention, as in BT-Adapter (arXiv:2309.15785). Neither the [B * P, T, C]
    copies nor the scores reach memory: q, k and v are read once, out is written once.

    Args:
        qkv: [B, T, P, 3, H, D]: q, k and v of H heads of width D, as one projection leaves them; a view of
            [B, T, P, 3 * H * D]. T at most 128. Any strides (a slice over P skips the class token without a copy);
            read in place where the last stride is 1.
        scale: of the scores; D ** -0.5 by default, 1.0 where it is folded into the projection's weights.
        out: [B, T, P, H * D] to write into, or None for a new tensor. Not differentiable.

    Returns:
        [B, T, P, H * D], dtype of qkv; sums are kept in float32 (float64 for float64). Differentiable in qkv: the
        gradient keeps qkv alone and computes the softmax again. Under torch.autocast it runs in the autocast dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit, T is above 128, or out shares memory with an input.
    """
    require(qkv.dim() == 6 and qkv.shape[3] == 3, "temporal_attention: qkv must be [B, T, P, 3, H, D]", qkv)
    B, T, P, _, H, D = qkv.shape
    require(T <= MAX_FRAMES, f"temporal_attention: qkv must have at most {MAX_FRAMES} frames", qkv)
    require_floating("temporal_attention", qkv=qkv)
    scale = max(D, 1) ** -0.5 if scale is None else float(scale)
    if out is None:
        return _op(qkv, scale)
    require_out("temporal_attention", out, (B, T, P, H * D), qkv, qkv)
    _op_out(qkv, scale, out)
    return out


def reference(qkv, scale):
    B, T, P, _, H, D = qkv.shape
    q, k, v = qkv.permute(3, 0, 2, 4, 1, 5)  # [B, P, H, T, D] each
    weights = torch.softmax((q * scale) @ k.transpose(-1, -2), dim=-1)
    return (weights @ v).permute(0, 3, 1, 2, 4).reshape(B, T, P, H * D)


def reference_backward(grad_out, qkv, scale):
    B, T, P, _, H, D = qkv.shape
    q, k, v = qkv.permute(3, 0, 2, 4, 1, 5)  # [B, P, H, T, D] each
    grad = grad_out.reshape(B, T, P, H, D).permute(0, 2, 3, 1, 4)
    weights = torch.softmax((q * scale) @ k.transpose(-1, -2), dim=-1)
    grad_weights = grad @ v.transpose(-1, -2)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    grads = (scale * (grad_scores @ k), scale * (grad_scores.transpose(-1, -2) @ q), weights.transpose(-1, -2) @ grad)
    return torch.stack(grads, dim=3).permute(0, 4, 1, 3, 2, 5).contiguous()


def _reference_out(qkv, scale, out):
    out.copy_(reference(qkv, scale))


def _fake(qkv, scale):
    B, T, P, _, H, D = qkv.shape
    return qkv.new_empty(B, T, P, H * D)


def _flops(qkv, scale, *out):
    B, T, P, _, H, D = qkv
    return 4 * B * P * H * T * T * D  # scores, and their product with the values


def _setup_context(ctx, inputs, output):
    qkv, ctx.scale = inputs
    ctx.save_for_backward(qkv)


def _backward(ctx, grad_out):
    (qkv,) = ctx.saved_tensors
    return _op_backward(grad_out, qkv, ctx.scale), None


_op = define(
    "temporal_attention(Tensor qkv, float scale) -> Tensor",
    reference=reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    autocast="low",
    flops=_flops,
)
_op_out = define(
    "temporal_attention_out(Tensor qkv, float scale, Tensor(a!) out) -> ()",
    reference=_reference_out,
    fake=lambda qkv, scale, out: None,
    flops=_flops,
)
_op_backward = define(
    "temporal_attention_backward(Tensor grad_out, Tensor qkv, float scale) -> Tensor",
    reference=reference_backward,
    fake=lambda grad_out, qkv, scale: qkv.new_empty(qkv.shape),
    flops=lambda grad_out, qkv, scale: 5 * _flops(qkv, scale) // 2,  # five products where forward has two
)
