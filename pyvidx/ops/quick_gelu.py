"""QuickGELU, the activation of OpenAI's CLIP (arXiv:2103.00020) and of the branch beside it, in one pass.

With the bias of the layer before it, that layer is a bare product, and neither x + bias nor, backward, a pass for the
bias's gradient is ever in memory.
"""

import torch
from torch import Tensor

from pyvidx.ops._library import define, require, require_floating, require_out

SLOPE = 1.702


def quick_gelu(x: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """v * sigmoid(1.702 v), v = x + bias.

    Args:
        x: of any shape, floating; with a bias [..., C]. Read in place where it is contiguous.
        bias: [C], dtype of x; None: 0. Under torch.autocast it is cast to the dtype of x, and x is taken as it is.
        out: contiguous, shape and dtype of x, to write into; may be x itself. Not differentiable.

    Returns:
        shape and dtype of x, contiguous. Differentiable in x and bias: the gradient keeps these two alone, and sums
        over rows deterministically.

    Raises:
        ValueError: a dtype, shape or device does not fit, or out shares memory with x or bias without being x.
    """
    require_floating("quick_gelu", x=x, bias=bias)
    if bias is not None:
        fits = x.dim() > 0 and bias.shape == x.shape[-1:]
        require(fits, "quick_gelu: bias must be [C], with C the last dimension of x", bias, x)
    if out is None:
        return _op(x, bias)
    require_out("quick_gelu", out, x.shape, x, x, bias)
    require(out.is_contiguous(), "quick_gelu: out must be contiguous, got strides {strides}", strides=out.stride())
    _op_out(x, bias, out)
    return out


def reference(x, bias=None):
    v = x if bias is None else x + bias
    return v * torch.sigmoid(SLOPE * v)


def reference_backward(grad_out, x, bias=None, need_x=True, need_bias=True):
    v = x if bias is None else x + bias
    s = torch.sigmoid(SLOPE * v)
    grad_x = (grad_out * s * (1 + SLOPE * v * (1 - s))).contiguous()
    sums = bias is not None and need_bias
    grad_bias = grad_x[None].flatten(0, -2).sum(0) if sums else x.new_empty(0)
    return grad_x if need_x else x.new_empty(0), grad_bias


def _reference_out(x, bias, out):
    out.copy_(reference(x, bias))


def _fake_backward(grad_out, x, bias=None, need_x=True, need_bias=True):
    sums = bias is not None and need_bias
    return x.new_empty(x.shape if need_x else 0), x.new_empty(bias.shape if sums else 0)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_out):
    x, bias = ctx.saved_tensors
    need_x, need_bias = ctx.needs_input_grad[0], bias is not None and ctx.needs_input_grad[1]
    grad_x, grad_bias = _op_backward(grad_out, x, bias, need_x, need_bias)
    return grad_x if need_x else None, grad_bias if need_bias else None


_op = define(
    "quick_gelu(Tensor x, Tensor? bias=None) -> Tensor",
    reference=lambda x, bias=None: reference(x, bias).contiguous(),
    fake=lambda x, bias=None: x.new_empty(x.shape),
    backward=_backward,
    setup_context=_setup_context,
    autocast="first",
)
_op_out = define(
    "quick_gelu_out(Tensor x, Tensor? bias, Tensor(a!) out) -> ()",
    reference=_reference_out,
    fake=lambda x, bias, out: None,
)
_op_backward = define(
    "quick_gelu_backward(Tensor grad_out, Tensor x, Tensor? bias=None, bool need_x=True, bool need_bias=True)"
    " -> (Tensor, Tensor)",
    reference=reference_backward,
    fake=_fake_backward,
)
