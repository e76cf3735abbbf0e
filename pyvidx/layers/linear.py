"""The linear layers of a transformer block, with fewer passes over memory beside their products.

A product that takes a bias first copies it into all of its output, on a CPU; the gradient of three tensors made by one
product is first packed into one. What is written here does neither. It reads a layer's parameters, so it is for a
plain nn.Linear: one with hooks, or an adapter in its place, is called as the module it is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

WIDE = (torch.float32, torch.float64)


def wants_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def plain(layer: nn.Module) -> bool:
    """Whether its weight and bias are all that there is to it."""
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    return type(layer) is nn.Linear and not any(hooks)


def product(x: Tensor, layer: nn.Linear) -> Tensor:
    """layer(x) without its bias, which the caller's next pass adds."""
    return F.linear(x, layer.weight) if plain(layer) else layer(x) - layer.bias


def residual(x: Tensor, y: Tensor) -> Tensor:
    """x + y, written into y, the fresh output of a linear layer, where no gradient is wanted.

    Under autograd y is a view of what the product wrote: writing into it makes the backward pass copy the gradient.
    """
    return y.add_(x) if y.dtype == x.dtype and not wants_grad(x, y) else x + y


def add_linear(x: Tensor, h: Tensor, layer: nn.Linear) -> Tensor:
    """x + layer(h), the end of either half of a block. x [..., C], h [..., K]."""
    same = x.dtype == h.dtype == layer.weight.dtype  # not so under autocast
    if same and x.dtype in WIDE and _by_hand((x, h), layer):  # a 16-bit x + bias would be rounded once more
        return _AddLinear.apply(x, h, layer.weight, layer.bias)
    return residual(x, layer(h)) if plain(layer) else x + layer(h)  # a hook may have kept what the layer gave


def packed_qkv(x: Tensor, layer: nn.Linear, heads: int) -> Tensor:
    """[..., C] -> [..., 3, H, D], what temporal_attention reads."""
    qkv = _Projection.apply(x, layer.weight, layer.bias, None) if _by_hand((x,), layer) else layer(x)
    return qkv.view(*x.shape[:-1], 3, heads, -1)


def split_qkv(x: Tensor, layer: nn.Linear, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[rows, N, C] -> q, k and v, [rows, H, N, D] each: views of one tensor, for scaled_dot_product_attention."""
    return _Projection.apply(x, layer.weight, layer.bias, heads) if _by_hand((x,), layer) else _split(layer(x), heads)


def _by_hand(inputs, layer):
    return plain(layer) and wants_grad(*inputs, layer.weight, layer.bias) and not torch.compiler.is_compiling()


def _split(qkv, heads):
    rows, N, _ = qkv.shape
    return qkv.view(rows, N, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _sum(rows):
    """[N, C] -> [C]."""
    if rows.is_cpu and rows.dtype in WIDE:
        return torch.mv(rows.t(), rows.new_ones(len(rows)))  # reads at the rate of a copy; torch.sum at half of it
    return rows.sum(dim=0)


class _AddLinear(torch.autograd.Function):
    """The product is added to x + bias, where a sum after it would read and write its output once more."""

    @staticmethod
    def forward(ctx, x, h, weight, bias):
        ctx.save_for_backward(h, weight)
        out = torch.add(x, bias, out=x.new_empty(x.shape))
        rows = out.view(-1, out.shape[-1])
        torch.addmm(rows, h.flatten(0, -2), weight.t(), out=rows)  # addmm_ is a product that torch counts no FLOPs of
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        h, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        need = ctx.needs_input_grad
        return (
            grad,
            torch.mm(rows, weight).view_as(h) if need[1] else None,
            torch.mm(rows.t(), h.flatten(0, -2)) if need[2] else None,
            _sum(rows) if need[3] else None,
        )


class _Projection(torch.autograd.Function):
    """q, k and v for an attention over keys.

    A key's bias adds the same to all scores of a query: it changes no softmax and its gradient is zero, which leaves
    two biases to add and two gradients to sum. The gradients of q, k and v meet in x's as the products leave them.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, heads):
        if x.is_cpu:
            qkv = F.linear(x, weight)
            qkv.view(-1, 3, bias.numel() // 3)[:, ::2] += bias.view(3, -1)[::2]
        else:  # a product adds the bias on its way out
            qkv = F.linear(x, weight, bias)
        ctx.save_for_backward(x.to(qkv.dtype), weight)
        return qkv if heads is None else _split(qkv, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, weight = ctx.saved_tensors
        width = weight.shape[0] // 3
        if len(grads) == 3:
            grads = [g.transpose(1, 2).reshape(-1, width) for g in grads]
            query, value = grads[0], grads[2]
        else:
            grads = [grads[0].reshape(-1, 3 * width)]
            query, value = grads[0][:, :width], grads[0][:, 2 * width :]
        rows = x.reshape(-1, x.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            first, *others = zip(grads, weight.to(x.dtype).chunk(len(grads)))
            grad_x = torch.mm(*first)
            for part in others:
                torch.addmm(grad_x, *part, out=grad_x)
            grad_x = grad_x.view_as(x)
        if ctx.needs_input_grad[1]:
            grad_weight = x.new_empty(weight.shape)
            for grad, out in zip(grads, grad_weight.chunk(len(grads))):
                torch.mm(grad.t(), rows, out=out)
        if ctx.needs_input_grad[2]:
            grad_bias = torch.cat([_sum(query), query.new_zeros(width), _sum(value)])
        return grad_x, grad_weight, grad_bias, None
