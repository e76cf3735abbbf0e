"""LayerNorms that an op may take in, and those that must be called."""

import torch
from torch import Tensor, nn

from pyvidx.layers.int8 import is_product
from pyvidx.layers.linear import wants_grad
from pyvidx.layers.plain import plain
from pyvidx.ops._library import LOW, has_kernel
from pyvidx.ops.residual_norm import add_norm as one_pass

KERNELS = frozenset(kind for kind in ("cpu", "cuda") if has_kernel("residual_norm", kind))  # where one pass is one


def foldable(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """(weight, bias, eps) for an op that normalizes rows of the dtype of x as it writes them; None: call the module."""
    if not plain(norm) or norm.bias is None or norm.weight.dtype != x.dtype:
        return None
    return norm.weight, norm.bias, norm.eps


def add_norm(x: Tensor, y: Tensor, norm: nn.Module, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """x + y and its LayerNorm, [..., C] each: one launch on a GPU.

    out: (y, another tensor of its shape), where both may be written over, see `writable`.
    """
    known = foldable(norm, x) if _pays(x, y) else None
    if known is None:
        rows = x + y
        return rows, norm(rows)
    return one_pass(x, y, known, out)


def _pays(x: Tensor, y: Tensor) -> bool:
    """On a GPU a launch counts. On a CPU torch's two passes over float32 are as fast, as they stay in the caches, and a
    tower in bfloat16 took 1.03 of its time with the op, which by itself takes 0.6."""
    fits = x.is_cuda and "cuda" in KERNELS and x.shape == y.shape
    return fits and (x.dtype == y.dtype or (x.dtype == torch.float32 and y.dtype in LOW))


def writable(x: Tensor, y: Tensor, normed: Tensor, layer: nn.Module, *norms: nn.Module) -> tuple[Tensor, Tensor] | None:
    """(y, normed) where x + y and its norm may be written over them, otherwise None.

    What is in them has been read, and no hook of the modules that made them, or will make their like, can have kept it.

    Args:
        layer: made y. norms: that of normed, and the one to come.
    """
    fresh = is_product(layer) and all(map(plain, norms)) and x.dtype == y.dtype == normed.dtype
    fresh = fresh and not torch.compiler.is_compiling()  # it plans its memory
    fresh = fresh and y.shape == normed.shape and y.is_contiguous() and normed.is_contiguous()
    return (y, normed) if fresh and not wants_grad(x, y, *norms[-1].parameters()) else None
