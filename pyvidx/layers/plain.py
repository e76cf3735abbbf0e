"""Whether a module is no more than its parameters: only then may they be read past it.

The fast paths read weights and biases and never call the layer that holds them. Other people's tools change what a call
does: they put an adapter in a layer's place, replace its `forward`, hang hooks on it or on all modules, quantize its
weight, or keep it on another device between calls. Such a module is called as it is.
"""

from torch import Tensor, nn
from torch.nn.modules import module as every

LAYERS = {nn.Linear, nn.LayerNorm, nn.Conv2d}
TENSORS = {Tensor, nn.Parameter}
BIASES = {*TENSORS, type(None)}


def unhooked(module: nn.Module) -> bool:
    """Whether the module has the forward of its class and no hooks of its own."""
    return not (
        "forward" in module.__dict__
        or module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


def untouched(module: nn.Module) -> bool:
    """Whether a call of the module runs the forward of its class and nothing beside it."""
    return unhooked(module) and not (
        module._compiled_call_impl is not None  # Module.compile
        or every._global_forward_pre_hooks
        or every._global_forward_hooks
        or every._global_backward_pre_hooks
        or every._global_backward_hooks
    )


def plain(layer: nn.Module) -> bool:
    """Whether a linear layer, a LayerNorm or a convolution is its weight and bias and nothing else."""
    if type(layer) not in LAYERS:
        return False
    parameters = layer._parameters
    own = type(parameters.get("weight")) in TENSORS and type(parameters.get("bias")) in BIASES
    return own and untouched(layer)


def held(module: nn.Module, name: str) -> Tensor | None:
    """A parameter of a module that is not being called.

    accelerate's offloading keeps it on the meta device until the module is called, and has it there again afterwards.
    """
    found = getattr(module, name)
    hook = getattr(module, "_hf_hook", None) if found is not None and found.is_meta else None
    if hook is None:
        return found
    hook.pre_forward(module)
    found = getattr(module, name)
    hook.post_forward(module, None)
    return found
