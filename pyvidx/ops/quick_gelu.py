"""QuickGELU, the activation of OpenAI's CLIP (arXiv:2103.00020) and of the branch beside it, in one pass."""

import torch
from torch import Tensor

from pyvidx.ops._library import define, require, require_floating, require_out

SLOPE = 1.702


def quick_gelu(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x * sigmoid(1.702 x).

    Args:
        x: of any shape, floating; read in place where it is contiguous.
        out: contiguous, shape and dtype of x, to write into; may be x itself. Not differentiable.

    Returns:
        shape and dtype of x, contiguous. Differentiable in x: the gradient keeps x alone.

    Raises:
        ValueError: a dtype, shape or device does not fit.
    """
    require_floating("quick_gelu", x=x)
    if out is None:
        return _op(x)
    require_out("quick_gelu", out, x.shape, x, x)
    require(out.is_contiguous(), f"quick_gelu: out must be contiguous, got strides {out.stride()}")
    _op_out(x, out)
    return out


def reference(x):
    return x * torch.sigmoid(SLOPE * x)


def reference_backward(grad_out, x):
    s = torch.sigmoid(SLOPE * x)
    return (grad_out * s * (1 + SLOPE * x * (1 - s))).contiguous()


def _reference_out(x, out):
    out.copy_(reference(x))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_out):
    return _op_backward(grad_out, *ctx.saved_tensors)


_op = define(
    "quick_gelu(Tensor x) -> Tensor",
    reference=lambda x: reference(x).contiguous(),
    fake=lambda x: x.new_empty(x.shape),
    backward=_backward,
    setup_context=_setup_context,
)
_op_out = define(
    "quick_gelu_out(Tensor x, Tensor(a!) out) -> ()",
    reference=_reference_out,
    fake=lambda x, out: None,
)
_op_backward = define(
    "quick_gelu_backward(Tensor grad_out, Tensor x) -> Tensor",
    reference=reference_backward,
    fake=lambda grad_out, x: x.new_empty(x.shape),
)
