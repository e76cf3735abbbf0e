"""Products of weights worked out once, for inference: the same function with fewer operations.

* temporal_fc after the time attention's output projection: W = Wfc Wo, b = Wfc bo + bfc (in training DropPath is
  between them).
* quick_gelu(h) = silu(1.702 h) / 1.702: one factor goes into fc1, the other into fc2, and what is left runs in place.

The scale of the attention scores stays where it is: both attention kernels apply it in registers.
"""

import copy

import torch
from torch import nn

from pyvidx.layers.plain import BIASES, unhooked
from pyvidx.temporal.bt_adapter import TemporalLayer


def fold(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """An inference copy of an encoder; the model itself is not changed.

    Products are taken in float64 and rounded once. Parameters that stay the same are shared with the model where the
    dtype allows, so later changes of the model leave the copy in an undefined state: fold again.

    Args:
        model: a VideoEncoder that is not folded, of any tower and temporal module.
        dtype: of the copy; default the model's own.

    Returns:
        a model of the same class in eval mode whose parameters ask for no gradient. It refuses to be trained, saved or
        loaded into.

    Raises:
        RuntimeError: the model is folded.
        ValueError: a layer is not as pyvidx made it: an adapter, a hook, a quantized weight.
    """
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
    folded.folded = True
    return folded.eval()


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


def _set(linear: nn.Linear, weight, bias) -> None:
    dtype = linear.weight.dtype
    linear.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
