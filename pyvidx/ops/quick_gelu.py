"""QuickGELU, the activation of OpenAI's CLIP (arXiv:2103.00020) and of the branch beside it, in one pass."""

import torch
from torch import Tensor

from pyvidx.ops._library import define, require_floating

SLOPE = 1.702


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x).

    Args:
        x: of any shape, floating. Read in place where it is contiguous.

    Returns:
        shape and dtype of x, contiguous. Differentiable: the gradient keeps x alone.

    Raises:
        ValueError: x has another dtype.
    """
    require_floating("quick_gelu", x=x)
    return _op(x)


def reference(x):
    return (x * torch.sigmoid(SLOPE * x)).contiguous()


def reference_backward(grad_out, x):
    s = torch.sigmoid(SLOPE * x)
    return (grad_out * s * (1 + SLOPE * x * (1 - s))).contiguous()


def _fake(x):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_out):
    return _op_backward(grad_out, *ctx.saved_tensors)


_op = define(
    "quick_gelu(Tensor x) -> Tensor",
    reference=reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
_op_backward = define(
    "quick_gelu_backward(Tensor grad_out, Tensor x) -> Tensor",
    reference=reference_backward,
    fake=lambda grad_out, x: _fake(x),
)
