"""Linear layers in 8 bits, for inference on a CPU, by torch's own quantized products.

    y = s (q - z) Q^T S + b        x = s (q - z),  W^T = Q^T S

Q, from -127 to 127, has one scale per row of W. s and z are of all of x at once, from its smallest and largest number:
what comes in together is rounded together, so that a clip's result depends, by rounding, on the clips it is encoded
with. Attention, norms, activations and sums stay in float32.
"""

import math
import re
from collections.abc import Collection

import torch
from torch import Tensor, nn

from pyvidx.layers import products
from pyvidx.layers.plain import plain, untouched

# With VNNI oneDNN runs 340 to 420 GOP/s a thread (Zen 4) and fbgemm, torch's choice, 220 to 310; float32 80 to 100.
# Without it pairs of products are added in 16 bits, which only 7-bit activations cannot overflow.
VNNI = re.search(r"\bavx(512)?_vnni\b", products.cpuinfo()) is not None
LEAST = 1 << 14  # weights; of fewer (64 x 64) float32 takes less time than the call


class Int8Linear(nn.Module):
    """A linear layer's weight in 8 bits and its bias in float32. Made by `quantize`.

    Args:
        layer: float32, on a CPU.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach()
        self.packed = _packed(weight, weight.abs().amax(dim=1) / 127, layer.bias)
        self.parts: dict[tuple[int, int], object] = {}
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return self._product(x, self.packed, self.out_features)

    def rows(self, x: Tensor, rows: slice) -> Tensor:
        """forward(x)[..., rows] without the work for the others: these rows are packed once more at the first call."""
        start, stop, _ = rows.indices(self.out_features)
        if (start, stop) not in self.parts:
            weight, bias = torch.ops.quantized.linear_unpack(self.packed)
            scale = weight.q_per_channel_scales()[start:stop]
            part = weight.int_repr()[start:stop].double() * scale[:, None]
            self.parts[start, stop] = _packed(part, scale, None if bias is None else bias[start:stop])
        return self._product(x, self.parts[start, stop], stop - start)

    def _product(self, x, packed, width):
        if not x.is_cpu or x.dtype != torch.float32:
            raise ValueError(f"int8: layers in 8 bits take float32 on a CPU, got {x.dtype} on {x.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("int8: layers in 8 bits have no gradients; train the model that the copy was made from")
        rows = x.reshape(-1, self.in_features)
        try:
            y = torch.ops.quantized.linear_dynamic(rows, packed, not VNNI)
        except RuntimeError:
            if not rows.isnan().any():
                raise
            y = rows.new_full((len(rows), width), math.nan)  # as in float32, but for all of what came together
        return y.view(*x.shape[:-1], width)

    def _save_to_state_dict(self, *args):
        raise RuntimeError("int8: layers in 8 bits are not saved; save the model that the copy was made from")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _packed(weight: Tensor, scale: Tensor, bias: Tensor | None):
    """What quantized.linear_dynamic takes. weight [N, K], scale [N], bias [N]."""
    scale = torch.where(scale > 0, scale, 1).double()
    zeros = torch.zeros(len(scale), dtype=torch.long)
    quantized = torch.quantize_per_channel(weight.float(), scale, zeros, 0, torch.qint8)
    kept = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn" if VNNI and products.OP is not None else kept
    try:
        return torch.ops.quantized.linear_prepack(quantized, None if bias is None else bias.detach())
    finally:
        torch.backends.quantized.engine = kept


def is_product(layer: nn.Module) -> bool:
    """Whether a call of a layer is W x + b and nothing beside it, in float or in 8 bits."""
    return plain(layer) or (type(layer) is Int8Linear and untouched(layer))


def quantize(model: nn.Module, keep: Collection[nn.Module] = ()) -> None:
    """Put an Int8Linear in the place of every linear layer of a model, but for small ones and those to keep.

    Raises:
        ValueError: the model is not float32 on a CPU.
    """
    others = {(p.dtype, p.device.type) for p in model.parameters()} - {(torch.float32, "cpu")}
    if others:
        raise ValueError(f"int8: the model must be float32 on a CPU, got {sorted(map(str, others))}")
    kept, made = set(map(id, keep)), {}
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and id(layer) not in kept and layer.weight.numel() >= LEAST:
                if layer not in made:
                    made[layer] = Int8Linear(layer)
                setattr(parent, name, made[layer])
