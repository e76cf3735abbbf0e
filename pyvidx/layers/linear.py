"""Linear layers, by the library that pyvidx.layers.products names.

That reads a layer's parameters, so it is for a plain linear layer: any other, see pyvidx.layers.plain, is called as the
module it is. Biases and residuals once had products and gradients of their own here, to save passes over memory; all of
them together saved 1 to 4 % of a training step or an encoder (bench/results/linear-2026-11-28.json).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyvidx.layers import products
from pyvidx.layers.int8 import Int8Linear
from pyvidx.layers.plain import plain


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear by the library that pyvidx.layers.products names. x [..., K], weight [N, K], bias [N] -> [..., N]."""
    if products.onednn(x, weight) and wants_grad(x, weight, bias):
        return _Linear.apply(x, weight, bias)
    return products.forward(x, weight, bias)


def dense(x: Tensor, layer: nn.Module) -> Tensor:
    """layer(x) by the same."""
    return linear(x, layer.weight, layer.bias) if plain(layer) else layer(x)


def dense_rows(x: Tensor, layer: nn.Module, rows: slice) -> Tensor:
    """layer(x)[..., rows] without the work for the others."""
    if type(layer) is Int8Linear:
        return layer(x, rows)
    if not plain(layer):
        return layer(x)[..., rows]
    return linear(x, layer.weight[rows], None if layer.bias is None else layer.bias[rows])


def wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Linear(torch.autograd.Function):
    """oneDNN's op knows no gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return products.forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), need = ctx.saved_tensors, ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            products.input_gradient(rows, weight).view_as(x) if need[0] else None,
            products.weight_gradient(rows, x.reshape(-1, x.shape[-1])) if need[1] else None,
            # A product with ones reads at the rate of a copy; torch.sum at half of it.
            torch.mv(rows.t(), rows.new_ones(len(rows))) if need[2] else None,
        )
