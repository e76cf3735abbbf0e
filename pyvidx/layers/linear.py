"""The linear layers of a transformer block, with fewer passes over memory beside their products.

A product that takes a bias first copies it into all of its output, with MKL; the gradient of three tensors made by one
product is first packed into one. What is written here does neither. It reads a layer's parameters, so it is for a
plain linear layer: any other, see pyvidx.layers.plain, is called as the module it is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyvidx.layers import products
from pyvidx.layers.plain import plain

WIDE = (torch.float32, torch.float64)
DEVICES = ("cpu", "cuda")  # those of autocast


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
    if not plain(layer):
        return layer(x)[..., rows]
    return linear(x, layer.weight[rows], None if layer.bias is None else layer.bias[rows])


def wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def product(x: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """layer(x) as a new tensor and a bias, which the caller's next pass adds.

    Without a bias the tensor is the whole of it, and may be kept by a hook: it must not be written into.
    """
    return (linear(x, layer.weight), layer.bias) if plain(layer) else (layer(x), None)


def residual(x: Tensor, y: Tensor) -> Tensor:
    """x + y, written into y, the fresh output of a linear layer, where no gradient is wanted.

    Under autograd y is a view of what the product wrote: writing into it makes the backward pass copy the gradient.
    """
    return y.add_(x) if y.dtype == x.dtype and not wants_grad(x, y) else x + y


def add_linear(x: Tensor, h: Tensor, layer: nn.Module) -> Tensor:
    """x + layer(h), the end of either half of a block. x [..., C], h [..., K]."""
    if not plain(layer):
        return x + layer(h)  # a hook may have kept what the layer gave
    parameters = (layer.weight, layer.bias)
    if x.dtype == h.dtype == layer.weight.dtype:  # not so under autocast
        if wants_grad(x, h, *parameters):
            # A 16-bit x + bias would be rounded once more.
            if x.dtype in WIDE and not torch.compiler.is_compiling():
                return _AddLinear.apply(x, h, *parameters)
        elif products.onednn(h, layer.weight):
            return products.forward(h, *parameters, add=x)
    return residual(x, linear(h, *parameters))


def value_bias(x: Tensor, qkv: nn.Module, out: nn.Module) -> Tensor | None:
    """v's bias [C] where attention over qkv(x) can do without it, else None.

    The weights of a softmax sum to 1: attention lacks that bias and nothing else, and `shifted_product` or
    `composed_product` makes up for it on few numbers. That saves passes over rows and costs some over weights, so it
    is for many rows, and for training: elsewhere a product has the bias for the asking.
    """
    waits = (
        _projected_by_hand(x, qkv)
        and plain(out)
        and out.bias is not None
        and x.shape[:-1].numel() >= x.shape[-1]
        and x.dtype == qkv.weight.dtype == out.weight.dtype
        and x.dtype in WIDE  # 16 bits would round the product of two weights
        and x.device.type in DEVICES
        and not torch.is_autocast_enabled(x.device.type)
    )
    return qkv.bias[-x.shape[-1] :] if waits else None


def shifted_product(x: Tensor, layer: nn.Module, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """layer(x + shift) as `product` gives it, [..., N] and [N]. shift [K], for a plain layer, or None."""
    if shift is None:
        return product(x, layer)
    return _ShiftedProduct.apply(x, layer.weight, layer.bias, shift)


def composed_product(x: Tensor, first: nn.Linear, last: nn.Linear, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The same of last(first(x + shift)) but for last's own bias: one product of x, with the product of the weights."""
    weight, bias = _Composition.apply(last.weight, first.weight, first.bias, shift)
    return linear(x, weight), bias


def project_qkv(
    x: Tensor, layer: nn.Module, parts: Sequence[int] = (3,), *, biased_values: bool = True
) -> tuple[Tensor, ...]:
    """q, k and v of x [..., C] for an attention over keys, [..., n * C] for each n of parts: views of one tensor.

    (3,): all in one; (1, 2): q; k and v; (1, 1, 1): each by itself. biased_values: see value_bias.
    """
    if _projected_by_hand(x, layer):
        widths = [n * len(layer.bias) // 3 for n in parts]
        return _Projection.apply(x, layer.weight, layer.bias, widths, biased_values)
    qkv = dense(x, layer)
    return qkv.split([n * qkv.shape[-1] // 3 for n in parts], dim=-1)


def _projected_by_hand(x, layer):
    by_hand = plain(layer) and layer.bias is not None and wants_grad(x, layer.weight, layer.bias)
    return by_hand and not torch.compiler.is_compiling()


def _sum(rows):
    """[N, C] -> [C]."""
    if rows.is_cpu and rows.dtype in WIDE:
        return torch.mv(rows.t(), rows.new_ones(len(rows)))  # reads at the rate of a copy; torch.sum at half of it
    return rows.sum(dim=0)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return products.forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _gradients(grad, *ctx.saved_tensors, ctx.needs_input_grad)


class _AddLinear(torch.autograd.Function):
    """The product is added to x + bias, where a sum after it would read and write its output once more."""

    @staticmethod
    def forward(ctx, x, h, weight, bias):
        ctx.save_for_backward(h, weight)
        return products.forward(h, weight, bias, add=x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, *_gradients(grad, *ctx.saved_tensors, ctx.needs_input_grad[1:])


class _ShiftedProduct(torch.autograd.Function):
    """x W^T and W shift + bias. What the latter gives to W's gradient is where the product starts."""

    @staticmethod
    def forward(ctx, x, weight, bias, shift):
        ctx.save_for_backward(x, weight, shift)
        return products.forward(x, weight), torch.addmv(bias, weight, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_bias):
        x, weight, shift = ctx.saved_tensors
        rows, need = grad.reshape(-1, grad.shape[-1]), ctx.needs_input_grad
        grad_x = products.input_gradient(rows, weight).view_as(x) if need[0] else None
        grad_weight = None
        if need[1]:
            onto = torch.outer(grad_bias, shift)
            grad_weight = products.weight_gradient(rows, x.reshape(-1, x.shape[-1]), onto=onto)
        return grad_x, grad_weight, grad_bias, torch.mv(weight.t(), grad_bias) if need[3] else None


class _Composition(torch.autograd.Function):
    """last first and last (first shift + bias), of weights last [N, M] and first [M, K]."""

    @staticmethod
    def forward(ctx, last, first, bias, shift):
        between = torch.addmv(bias, first, shift)
        ctx.save_for_backward(last, first, between, shift)
        return products.input_gradient(last, first), torch.mv(last, between)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_bias):
        last, first, between, shift = ctx.saved_tensors
        need, to_between = ctx.needs_input_grad, torch.mv(last.t(), grad_bias)
        return (
            products.input_gradient(grad, first.t(), onto=torch.outer(grad_bias, between)) if need[0] else None,
            products.weight_gradient(last, grad, onto=torch.outer(to_between, shift)) if need[1] else None,
            to_between,
            torch.mv(first.t(), to_between) if need[3] else None,
        )


def _gradients(grad, x, weight, need):
    """Of x, weight and bias, those that are needed."""
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        products.input_gradient(rows, weight).view_as(x) if need[0] else None,
        products.weight_gradient(rows, x.reshape(-1, x.shape[-1])) if need[1] else None,
        _sum(rows) if need[2] else None,
    )


class _Projection(torch.autograd.Function):
    """q, k and v for an attention over keys.

    A key's bias adds the same to all scores of a query: it changes no softmax and its gradient is zero, which leaves
    two biases to add and two gradients to sum. The parts' gradients meet in x's as the products leave them.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, widths, biased_values):
        if x.device.type in DEVICES and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x, weight = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, weight))  # once for both passes
        width = bias.numel() // 3
        if products.mkl(x, weight):
            qkv, step = products.forward(x, weight), 2 if biased_values else 3  # q and v, or q
            qkv.view(-1, 3, width)[:, ::step] += bias.view(3, -1)[::step]
        else:  # a product adds the bias on its way out
            bias = bias if biased_values else torch.cat([bias[:-width], bias.new_zeros(width)])
            qkv = products.forward(x, weight, bias)
        ctx.save_for_backward(x, weight)
        ctx.widths, ctx.biased_values = widths, biased_values
        return qkv.split(widths, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, weight = ctx.saved_tensors
        rows, grads = x.reshape(-1, x.shape[-1]), [g.reshape(-1, g.shape[-1]) for g in grads]
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            for grad, part in zip(grads, weight.split(ctx.widths)):
                grad_x = products.input_gradient(grad, part, onto=grad_x)
            grad_x = grad_x.view_as(x)
        if ctx.needs_input_grad[1]:
            if len(grads) == 1:
                grad_weight = products.weight_gradient(grads[0], rows)
            else:
                grad_weight = x.new_empty(weight.shape)
                for grad, out in zip(grads, grad_weight.split(ctx.widths)):
                    products.weight_gradient(grad, rows, out=out)
        if ctx.needs_input_grad[2]:
            width = weight.shape[0] // 3
            query, value = grads[0][:, :width], grads[-1][:, -width:]
            zeros = query.new_zeros(width)
            grad_bias = torch.cat([_sum(query), zeros, _sum(value) if ctx.biased_values else zeros])
        return grad_x, grad_weight, grad_bias, None, None
