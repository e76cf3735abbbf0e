"""How an op comes to life: schema, reference, fake, autograd and autocast in one call; kernels attach themselves.

The reference is registered for every backend; a compiled CPU or CUDA kernel takes precedence where there is one. So an
op runs on any device of any machine, and `python -m pyvidx.info` says whether a kernel or the reference will run.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

_lib = torch.library.Library("pyvidx", "DEF")
REFERENCES: dict[str, Callable] = {}  # op name -> reference, in order of definition
FLOPS: dict[str, Callable] = {}  # op name -> its matrix products, for pyvidx.flops


def define(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    autocast: str | None = None,
    flops: Callable | None = None,
) -> torch._ops.OpOverload:
    """Register torch.ops.pyvidx.<name> and return it.

    Args:
        schema: as torch.library writes it, e.g. "name(Tensor x) -> Tensor".
        reference: the same function in plain torch; runs where there is no kernel.
        fake: shapes and dtypes of the outputs, for torch.compile and export.
        backward, setup_context: as in torch.library.register_autograd.
        autocast: under torch.autocast, "low" casts floating inputs to the autocast dtype (as for a matmul), "widest"
            to the widest dtype among them (as for a sum), "first" to that of the first one (parameters to that of the
            activations). None: inputs are taken as they are.
        flops: operations in matrix products, 2 per multiply-add, as a function of the arguments with shapes in place
            of tensors. None: it has none.
    """
    name = schema.split("(")[0]

    def run_reference(*args, **kwargs):
        if os.environ.get("PYVIDX_STRICT") == "1":
            raise RuntimeError(f"pyvidx::{name}: PYVIDX_STRICT=1 and {why_reference(_device(args))}")
        return reference(*args, **kwargs)

    _lib.define(schema)
    _lib.impl(name, run_reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyvidx::{name}", fake, lib=_lib)
    op = getattr(torch.ops.pyvidx, name).default
    if backward is not None:
        torch.library.register_autograd(f"pyvidx::{name}", backward, setup_context=setup_context, lib=_lib)
    if autocast is not None:
        for device in ("cpu", "cuda"):
            _lib.impl(name, _autocast_rule(op, device, autocast), f"Autocast{device.upper()}")
    REFERENCES[name] = reference
    if flops is not None:
        FLOPS[name] = flops
    return op


def _autocast_rule(op, device: str, rule: str) -> Callable:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )

    def call(*args):
        floating = [a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        dtype = torch.get_autocast_dtype(device) if rule == "low" else floating[0]
        if rule == "widest":
            for other in floating[1:]:
                dtype = torch.promote_types(dtype, other)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))

    return call


def _device(args: Sequence) -> str:
    for a in args:
        if isinstance(a, Tensor):
            return a.device.type
        if isinstance(a, (list, tuple)) and a:
            return _device(a)
    return "cpu"


def require(ok: bool, message: str, *tensors: Tensor | None, **values) -> None:
    """Raise ValueError("op: what must hold, got ...") unless ok.

    values: for {names} in the message. Sizes go there: a compiler that traces symbolic ones cannot write them out.
    """
    if not ok:
        message = message.format(**values) if values else message
        got = ", ".join(
            "None" if t is None else f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"
            for t in tensors
        )
        raise ValueError(f"{message}, got {got}" if tensors else message)


def require_tensors(op: str, **values) -> None:
    """Raise ValueError unless every value is a tensor or None."""
    for name, value in values.items():
        if not isinstance(value, Tensor | None):
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise ValueError(f"{op}: {name} must be a tensor, got {kind}; torch.as_tensor makes one of an array")


FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def require_floating(op: str, **tensors: Tensor | None) -> None:
    """All given tensors have one floating dtype and one device (the first one's)."""
    present = {name: t for name, t in tensors.items() if t is not None}
    (first, x), *others = present.items()
    require(x.dtype in FLOATING, f"{op}: {first} must be float32, float16, bfloat16 or float64", x)
    for name, t in others:
        same = t.device == x.device and (t.dtype == x.dtype or torch.is_autocast_enabled(x.device.type))
        require(same, f"{op}: {name} must have the dtype and device of {first}", t, x)


def require_out(op: str, out: Tensor, shape: Sequence[int], like: Tensor, *inputs: Tensor | None) -> None:
    """`out=` takes a tensor of the right shape that no gradient is asked through."""
    fits = tuple(out.shape) == tuple(shape) and out.dtype == like.dtype and out.device == like.device
    text = "{op}: out must be {shape} with the dtype and device of the input"
    require(fits, text, out, like, op=op, shape=tuple(shape))
    require(out.stride(-1) == 1 or out.shape[-1] <= 1, f"{op}: the last stride of out must be 1", out)
    for t in inputs:  # autocast does not reach an op that is given its output
        require(t is None or t.dtype == out.dtype, f"{op}: with out= all tensors must have one dtype", t, out)
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (out, *inputs))
    require(not wants_grad, f"{op}: out= has no gradient; call it under torch.no_grad() or without out=")


def has_kernel(name: str, device_type: str) -> bool:
    """Is there a compiled kernel, or would the reference run?"""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"pyvidx::{name}", device_type.upper())


def why_reference(device_type: str) -> str:
    """Why references run on a device where there is no kernel."""
    if LOAD_ERROR is not None:
        return f"the compiled library did not load ({LOAD_ERROR}), so the reference runs"
    return f"no {device_type} kernel in this build, so the reference runs"


def _load() -> str | None:
    """Load the kernels; None, or why they could not be loaded. PYVIDX_OPS_LIBRARY names another build (tests)."""
    default = Path(__file__).parents[1] / "_ops.abi3.so"
    path = os.environ.get("PYVIDX_OPS_LIBRARY") or default
    if not Path(path).exists():
        return f"{path} does not exist: build it with `pip install --no-build-isolation -e .`"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return str(error)
    return None


LOAD_ERROR = _load()
