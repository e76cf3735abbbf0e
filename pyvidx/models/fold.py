"""Products of weights worked out once, for inference: the same function with fewer operations.

* temporal_fc after the time attention's output projection: W = Wfc Wo, b = Wfc bo + bfc (in training DropPath is
  between them).
* quick_gelu(h) = silu(1.702 h) / 1.702: one factor goes into fc1, the other into fc2.

The scale of the attention scores stays where it is: both attention kernels apply it in registers.

With precision="int8" the linear layers are then put into 8 bits, see pyvidx.layers.int8.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyvidx.backbones.vit import AttentionPool, ViT
from pyvidx.layers.int8 import quantize
from pyvidx.layers.plain import BIASES, unhooked
from pyvidx.temporal.bt_adapter import BTAdapterBranch, TemporalLayer

PRECISIONS = ("float", "int8")


class Foldable(nn.Module):
    """A model that inference copies can be made of.

    Attributes:
        folded: this is such a copy; it can not be trained, saved or loaded into.
    """

    folded = False

    def fold(self, dtype: torch.dtype | None = None, *, precision: str = "float") -> "Foldable":
        """An inference copy with products of weights worked out beforehand; see pyvidx.models.fold.

        precision: "int8" for linear layers in 8 bits, on a CPU and in float32.
        """
        return fold(self, dtype, precision)

    def train(self, mode: bool = True) -> "Foldable":
        if mode and self.folded:
            raise RuntimeError(f"{type(self).__name__}: a folded copy is for inference; train the model itself")
        return super().train(mode)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if self.folded:
            raise RuntimeError(
                f"{type(self).__name__}: a folded copy does not take weights; load the model and fold again"
            )
        return super().load_state_dict(*args, **kwargs)

    def check_whole(self) -> None:
        """Raise RuntimeError for a folded copy, where the model itself is to be saved."""
        if self.folded:
            raise RuntimeError(f"{type(self).__name__}: save the model itself, not its folded copy")


def fold(model: Foldable, dtype: torch.dtype | None = None, precision: str = "float") -> Foldable:
    """An inference copy of a model; the model itself is not changed.

    Products are taken in float64 and rounded once. Parameters that stay the same are shared with the model where the
    dtype allows, so later changes of the model leave the copy in an undefined state: fold again.

    Args:
        model: a VideoEncoder of any tower and temporal module, or a MALMM, that is not folded.
        dtype: of the copy; default the model's own.
        precision: "float", or "int8": linear layers with 8-bit weights and activations. CLIP-B/16 takes .37 of
            the time on a Zen 4, cosine .9999 (bench/results/int8-2026-11-28.json).

    Returns:
        a model of the same class in eval mode whose parameters ask for no gradient. It refuses to be trained, saved or
        loaded into.

    Raises:
        RuntimeError: the model is folded.
        ValueError: a layer is not as pyvidx made it: an adapter, a hook, a quantized weight. The dtype is not floating,
            the precision is unknown, or int8 of a model that is not float32 on a CPU.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"fold: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f'fold: dtype must be floating, got {dtype}; 8 bits are precision="int8"')
    if model.folded:
        raise RuntimeError(f"{type(model).__name__}: this is a folded copy already")
    for name, module in model.named_modules():
        _check_own(name, module)
    shared = {
        id(p): nn.Parameter(p.detach() if dtype is None else p.detach().to(dtype), requires_grad=False)
        for p in model.parameters()
    }
    folded = copy.deepcopy(model, shared)
    for module, source in list(zip(folded.modules(), model.modules())):
        if getattr(module, "hidden_act", None) == "quick_gelu":
            _set(module.fc1, source.fc1.weight.double() * 1.702, source.fc1.bias.double() * 1.702)
            _set(module.fc2, source.fc2.weight.double() / 1.702, source.fc2.bias)
            module.hidden_act = "silu"
        elif isinstance(module, TemporalLayer) and module.fc is not None:
            fc, out = source.fc.weight.double(), source.out
            _set(module.out, fc @ out.weight.double(), fc @ out.bias.double() + source.fc.bias.double())
            module.fc = None
    if precision == "int8":
        quantize(folded, keep=list(_read_past(folded)))
    folded.folded = True
    return folded.eval()


def _read_past(model: nn.Module) -> Iterator[nn.Module]:
    """Layers whose weights are used for more than the layer's product, which pyvidx.layers.attention.gather saves."""
    for module in model.modules():
        if isinstance(module, AttentionPool):
            yield module.qkv
        elif isinstance(module, BTAdapterBranch):
            yield module.spatial[-1].qkv
        elif isinstance(module, ViT) and module.layers:
            yield module.blocks[str(module.layers[-1])].qkv  # see class_row


def _check_own(name: str, module: nn.Module) -> None:
    """Raise for a module that folding would tear out of somebody's hands, or make wrong without a word."""
    kind = type(module)
    what = None
    if name and not kind.__module__.startswith(("pyvidx.", "torch.nn.modules.")):
        what = f"a {kind.__module__}.{kind.__qualname__}"
    elif not unhooked(module):
        what = "one with hooks or another forward"
    else:
        others = [type(p) for p in module._parameters.values() if type(p) not in BIASES]
        what = f"one with a {others[0].__qualname__}" if others else None
    if what is not None:
        raise ValueError(
            f"fold: every layer must be as pyvidx made it, got {what} at {name or 'the model itself'}; merge adapters, "
            "take hooks and parametrizations off, and quantize the folded copy"
        )


def _set(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    dtype = linear.weight.dtype
    linear.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
