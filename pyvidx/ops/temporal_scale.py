"""A depthwise convolution over the frames of a clip: ST-Adapter's, and any other of one weight per channel and tap."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyvidx.ops._library import define, require, require_floating, require_out

MAX_TAPS = 15  # csrc/include/pyvidx/temporal_scale.h


def temporal_scale(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Convolve every channel of every token position over the frames, in the layout the tokens are in.

        out[b, t, n, c] = bias[c] + sum_k weight[c, k] x[b, t + k - K // 2, n, c] + residual[b, t, n, c]

    The convolution of ST-Adapter (arXiv:2206.13559, section 3.3) with the kernel of its published configurations,
    3 x 1 x 1: K shifted scales, so [B, T, N, C] need not become [B, C, T, H, W] and back. x is read once, out is
    written once.

    Args:
        x: [B, T, N, C] tokens, any strides (tokens[:, :, 1:] skips the class token without a copy); read in place where
            the last stride is 1. Frames before the first and after the last read as 0.
        weight: [C, K], K odd, 1 to 15; a view of a depthwise convolution's [C, 1, K, 1, 1].
        bias: [C] or None.
        mask: bool [B, T], False at frames that read as 0 whatever they hold (padding of shorter clips), or None. out
            has values there all the same.
        residual: [B, T, N, C] to add, or None.
        out: [B, T, N, C] to write into, or None for a new tensor; not x, whose frames are read more than once. Not
            differentiable.

    Returns:
        [B, T, N, C], dtype of x; sums are kept in float32 (float64 for float64). Differentiable in x, weight, bias and
        residual, deterministically. Under torch.autocast it runs in the autocast dtype, as a convolution does.

    Raises:
        ValueError: a shape, dtype or device does not fit, or out shares memory with an input.
    """
    _check(x, weight, bias, mask, residual)
    mask = None if mask is None else mask.to(torch.int32)
    if out is None:
        return _op(x, weight, bias, mask, residual)
    require_out("temporal_scale", out, x.shape, x, x, weight, bias, residual)
    _op_out(x, weight, bias, mask, residual, out)
    return out


def _check(x, weight, bias, mask, residual):
    require(x.dim() == 4, "temporal_scale: x must be [B, T, N, C]", x)
    B, T, _, C = x.shape
    require_floating("temporal_scale", x=x, weight=weight, bias=bias, residual=residual)
    fits = weight.dim() == 2 and weight.shape[0] == C and weight.shape[1] % 2 == 1 and weight.shape[1] <= MAX_TAPS
    require(fits, f"temporal_scale: weight must be [C, K] of x, K odd and at most {MAX_TAPS}", weight, x)
    require(bias is None or tuple(bias.shape) == (C,), "temporal_scale: bias must be [C] of x", bias, x)
    check_frame_mask("temporal_scale", mask, x)
    require(residual is None or residual.shape == x.shape, "temporal_scale: residual must be like x", residual, x)


def check_frame_mask(op: str, mask: Tensor | None, x: Tensor) -> None:
    """Raise unless mask is bool [B, T] of x [B, T, ...] on its device, or None."""
    fits = mask is None or (mask.dtype == torch.bool and mask.shape == x.shape[:2] and mask.device == x.device)
    require(fits, f"{op}: mask must be bool [B, T] on x's device", mask, x)


def reference(x, weight, bias, mask, residual):
    T, K = x.shape[1], weight.shape[1]
    padded = pad(_real(x, mask), (0, 0, 0, 0, K // 2, K // 2))
    out = sum(padded[:, k : k + T] * weight[:, k] for k in range(K))
    if bias is not None:
        out = out + bias
    return out if residual is None else out + residual


def _real(x, mask):
    return x if mask is None else torch.where(mask[:, :, None, None] != 0, x, 0)


def reference_backward(grad_out, x, weight, mask):
    T, K = grad_out.shape[1], weight.shape[1]
    padded = pad(grad_out, (0, 0, 0, 0, K // 2, K // 2))
    grad_x = _real(sum(padded[:, K - 1 - k : K - 1 - k + T] * weight[:, k] for k in range(K)), mask)
    if x is None:
        return grad_x, weight.new_empty(0, K), weight.new_empty(0)
    x = _real(x, mask)
    grad_weight = torch.stack([(padded[:, K - 1 - k : K - 1 - k + T] * x).sum((0, 1, 2)) for k in range(K)], dim=1)
    return grad_x, grad_weight, grad_out.sum((0, 1, 2))


def _reference_out(x, weight, bias, mask, residual, out):
    out.copy_(reference(x, weight, bias, mask, residual))


def _setup_context(ctx, inputs, output):
    x, weight, _, mask, _ = inputs
    sums = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(x if sums else None, weight, mask)


def _backward(ctx, grad_out):
    x, weight, mask = ctx.saved_tensors
    need = ctx.needs_input_grad
    grads = (None, None, None)
    if any(need[:3]):
        grads = [grad if n else None for grad, n in zip(_op_backward(grad_out, x, weight, mask), need)]
    return *grads, None, grad_out if need[4] else None


def _fake_backward(grad_out, x, weight, mask):
    C = 0 if x is None else weight.shape[0]
    return grad_out.new_empty(grad_out.shape), grad_out.new_empty(C, weight.shape[1]), grad_out.new_empty(C)


_op = define(
    "temporal_scale(Tensor x, Tensor weight, Tensor? bias, Tensor? mask, Tensor? residual) -> Tensor",
    reference=reference,
    fake=lambda x, weight, bias, mask, residual: x.new_empty(x.shape),
    backward=_backward,
    setup_context=_setup_context,
    autocast="low",
)
_op_out = define(
    "temporal_scale_out(Tensor x, Tensor weight, Tensor? bias, Tensor? mask, Tensor? residual, Tensor(a!) out) -> ()",
    reference=_reference_out,
    fake=lambda x, weight, bias, mask, residual, out: None,
)
_op_backward = define(
    "temporal_scale_backward(Tensor grad_out, Tensor? x, Tensor weight, Tensor? mask) -> (Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=_fake_backward,
)
