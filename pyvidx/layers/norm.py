"""LayerNorms that an op may take in, and those that must be called."""

from torch import Tensor, nn

from pyvidx.layers.plain import plain


def foldable(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """(weight, bias, eps) for an op that normalizes rows of the dtype of x as it writes them; None: call the module."""
    if not plain(norm) or norm.bias is None or norm.weight.dtype != x.dtype:
        return None
    return norm.weight, norm.bias, norm.eps
