"""Linear layers in 8 bits, for inference on a CPU, by oneDNN's products as torch has them.

    y = s (q - z) Q^T S + b        x = s (q - z),  W^T = Q^T S

Q, from -127 to 127, has one scale per row of W. s and z are of all of x at once, from its smallest and largest number:
what comes in together is rounded together, so that a clip's result depends, by rounding, on the clips it is encoded
with. Attention, norms, activations and sums stay in float32.
"""

import math
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from pyvidx.layers import products
from pyvidx.layers.plain import plain, untouched

OP = getattr(torch.ops.onednn, "qlinear_pointwise", None)  # torch has oneDNN on some platforms only
VNNI = re.search(r"\bavx(512)?_vnni\b", products.cpuinfo()) is not None
# q is unsigned: oneDNN has no fast product of two signed matrices. Without VNNI it adds pairs of products in 16 bits,
# which only 7 bits of q cannot overflow. One step less than there is room for: rounding z may take up to one.
STEPS = 254 if VNNI else 126
PART = 1 << 17  # numbers that are rounded together


class Int8Linear(nn.Module):
    """A linear layer's weight in 8 bits and its bias in float32. Made by `quantize`.

    Args:
        layer: float32, on a CPU.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach()
        scale = weight.abs().amax(dim=1) / 127
        scale = torch.where(scale > 0, scale, 1)
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self._packed: dict[tuple[int, int], Tensor] = {}  # weights as oneDNN wants them, made when they are needed

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """x [..., K] -> [..., N]; rows: those of the weight alone, y[..., rows]."""
        if not x.is_cpu or x.dtype != torch.float32:
            raise ValueError(f"int8: layers in 8 bits take float32 on a CPU, got {x.dtype} on {x.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("int8: layers in 8 bits have no gradients; train the model that the copy was made from")
        start, stop, _ = rows.indices(self.out_features)
        shape = *x.shape[:-1], stop - start
        if not x.numel():
            return x.new_empty(shape)
        low, high = (t.item() for t in torch.aminmax(x))
        low, high = min(low, 0.0), max(high, 0.0)
        if not math.isfinite(high - low):
            return x.new_full(shape, math.nan)  # as in float32, but for all of what came together
        step = max((high - low) / STEPS, torch.finfo(torch.float32).tiny)  # whose reciprocal is finite
        zero = round(-low / step)
        q = _rounded(x.reshape(-1, self.in_features), step, zero)
        scale, bias = self.scale[start:stop], None if self.bias is None else self.bias[start:stop]
        zeros = torch.zeros(stop - start, dtype=torch.int32)
        y = OP(q, step, zero, self._pack(start, stop), scale, zeros, bias, 1.0, 0, torch.float32, "none", [], "")
        return y.view(shape)

    def _pack(self, start: int, stop: int) -> Tensor:
        if (start, stop) not in self._packed:
            self._packed[start, stop] = torch.ops.onednn.qlinear_prepack(self.weight[start:stop], None)
        return self._packed[start, stop]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": {}}  # which cannot be copied

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _rounded(x: Tensor, step: float, zero: int) -> Tensor:
    """q of rows x [n, K], some at a time: what stands between float32 and 8 bits stays in a cache. New memory for all
    of it costs a page fault per 4 KB, one after another whatever the number of threads."""
    q, rows = torch.empty(x.shape, dtype=torch.uint8), max(1, PART // x.shape[1])
    shift, between = x.new_tensor(zero + 0.5), x.new_empty(min(rows, len(x)), x.shape[1])
    for start in range(0, len(x), rows):
        some = x[start : start + rows]
        q[start : start + rows] = torch.add(shift, some, alpha=1 / step, out=between[: len(some)])
    return q


def is_product(layer: nn.Module) -> bool:
    """Whether a call of a layer is W x + b and nothing beside it, in float or in 8 bits."""
    return plain(layer) or (type(layer) is Int8Linear and untouched(layer))


def quantize(model: nn.Module, keep: Collection[nn.Module] = ()) -> None:
    """Put an Int8Linear in the place of every linear layer of a model, but for those to keep.

    A layer of 64 x 64 takes more time than in float32, whose call is shorter; those of published models a fourth.

    Raises:
        ValueError: the model is not float32 on a CPU, or a weight is not finite.
        RuntimeError: this torch has no oneDNN.
    """
    if OP is None:
        raise RuntimeError(f"int8: products in 8 bits are oneDNN's, which torch {torch.__version__} lacks here")
    others = {f"{p.dtype} on {p.device}" for p in model.parameters()} - {"torch.float32 on cpu"}
    if others:
        raise ValueError(f"int8: the model must be float32 on a CPU, got {', '.join(sorted(others))}")
    kept, made = set(keep), {}
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and layer not in kept:
                if not bool(layer.weight.isfinite().all()):  # 8 bits would make numbers of them
                    raise ValueError(f"int8: weights must be finite, got NaN or infinity in a {layer} called {name}")
                if layer not in made:
                    made[layer] = Int8Linear(layer)
                setattr(parent, name, made[layer])
