"""How an op comes to life: schema, reference, fake, autograd and autocast in one call; kernels attach themselves.

The reference is registered for every backend; a compiled CPU or CUDA kernel takes precedence where there is one. So an
op runs on any device of any machine, and `python -m pyvidx info` says whether a kernel or the reference will run.
"""

import ctypes
import functools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "pyvidx"  # of the ops in torch; cmake/hf_kernel.py writes another
_lib = torch.library.Library(NAMESPACE, "DEF")
REFERENCES: dict[str, Callable[..., Any]] = {}  # op name -> reference, in order of definition
FLOPS: dict[str, Callable[..., Any]] = {}  # op name -> its matrix products, for pyvidx.models.flops
# From 2.15 on, torch makes a RuntimeError of the library's std::invalid_argument, which was a ValueError until then.
TELLS_NO_TYPES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    autocast: str | None = None,
    flops: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register torch.ops.pyvidx.<name> and return it; where it writes into its arguments, a shorter way to it.

    Args:
        schema: as torch.library writes it, e.g. "name(Tensor x) -> Tensor".
        reference: the same function in plain torch; runs where there is no kernel.
        fake: shapes and dtypes of the outputs, for torch.compile and export.
        backward, setup_context: as in torch.library.register_autograd.
        autocast: under torch.autocast, "low" casts floating inputs to the autocast dtype (as for a matmul), "widest"
            to the widest dtype among them (as for a sum). None: inputs are taken as they are.
        flops: operations in matrix products, 2 per multiply-add, as a function of the arguments with shapes in place
            of tensors. None: it has none.
    """
    name = schema.split("(")[0]

    def run_reference(*args, **kwargs):
        if os.environ.get("PYVIDX_STRICT") == "1":
            raise RuntimeError(f"{NAMESPACE}::{name}: PYVIDX_STRICT=1 and {why_reference(_device(args))}")
        return reference(*args, **kwargs)

    _lib.define(schema)
    _lib.impl(name, run_reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", _on_one_device(name, fake), lib=_lib)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    call = op
    if op._schema.is_mutable:
        kernel, call = _counting_versions(op)
        _lib.impl(name, kernel, "ADInplaceOrView", with_keyset=True)
    if backward is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_lib)
    if autocast is not None:
        for device in ("cpu", "cuda"):
            _lib.impl(name, _autocast_rule(op, device, autocast), f"Autocast{device.upper()}")
    REFERENCES[name] = reference
    if flops is not None:
        FLOPS[name] = flops
    return _refusing(call) if TELLS_NO_TYPES else call


def _refusing(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, whose refusals ("op: what must hold, ...") are ValueErrors, as with older versions of torch."""

    def refusing(*args):
        if torch.compiler.is_compiling():
            return call(*args)
        try:
            return call(*args)
        except RuntimeError as error:
            # Other errors begin with "pyvidx" or the name of a kernel.
            if type(error) is RuntimeError and str(error).split(":")[0] in (*REFERENCES, "memory bank"):
                raise ValueError(str(error)) from None
            raise

    return refusing


def _autocast_rule(op, device: str, rule: str) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )

    def call(*args):
        floating = [a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        low = rule == "low"
        dtype = torch.get_autocast_dtype(device) if low else functools.reduce(torch.promote_types, floating)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))

    return call


def _counting_versions(op) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Counts up the versions of what the op writes, as torch's own in-place ops do: so autograd notices where a tensor
    it has saved is no longer what it was.

    Returns:
        The kernel of ADInplaceOrView for op, and a function that does the same as op but goes past that kernel, whose
        way through Python takes 3 microseconds.
    """
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    below, count_up = torch._C._after_ADInplaceOrView_keyset, torch._C._increment_version
    guard, redispatch = torch._C._AutoDispatchBelowADInplaceOrView, op.redispatch

    def count(args):
        for i in written:
            if isinstance(args[i], Tensor):
                count_up((args[i],))
            elif args[i]:
                count_up(args[i])

    def kernel(keyset, *args):
        count(args)
        with guard():
            return redispatch(keyset & below, *args)

    def call(*args):
        if torch.compiler.is_compiling():
            return op(*args)
        count(args)
        with guard():
            return op(*args)

    call.op = op
    return kernel, call


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """A fake runs where any argument is on the meta device, but knows only where some of them are."""

    def call(*args):
        devices = {t.device for t in _tensors(args)}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"{name}: all tensors must be on one device, got {found}")
        return fake(*args)

    return call


def _tensors(args: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments and in lists of them."""
    found = []
    for a in args:
        if isinstance(a, Tensor):
            found.append(a)
        elif isinstance(a, (list, tuple)):
            found += _tensors(a)
    return found


def _device(args: Sequence[Any]) -> str:
    return next((t.device.type for t in _tensors(args)), "cpu")


def require(ok: bool, message: str, *came, **values) -> None:
    """Raise ValueError("op: what must hold, got ...") unless ok.

    came: a tensor is told by its shape, dtype and device, another value by its type.
    values: for {names} in the message. Sizes go there: a compiler that traces symbolic ones cannot write them out.
    """
    if not ok:
        message = message.format(**values) if values else message
        got = ", ".join(
            f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
            if isinstance(x, Tensor)
            else "None" if x is None else type(x).__name__
            for x in came
        )  # fmt: skip
        raise ValueError(f"{message}, got {got}" if came else message)


def require_tensors(op: str, **values) -> None:
    """Raise ValueError unless every value is a tensor or None."""
    for name, value in values.items():
        if not isinstance(value, Tensor | None):
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise ValueError(f"{op}: {name} must be a tensor, got {kind}; torch.as_tensor makes one of an array")


FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LOW = (torch.float16, torch.bfloat16)


def require_floating(op: str, *, autocast: bool = True, **tensors: Tensor | None) -> None:
    """All given tensors have one floating dtype and one device (the first one's).

    autocast: the op has a rule for torch.autocast, which will cast them: under it their dtypes may differ.
    """
    first = x = None
    for name, t in tensors.items():
        if t is None:
            continue
        if x is None:
            first, x = name, t
            require(t.dtype in FLOATING, f"{op}: {name} must be float32, float16, bfloat16 or float64", t)
        elif t.device != x.device or not (t.dtype == x.dtype or (autocast and _casts(x))):
            require(False, f"{op}: {name} must have the dtype and device of {first}", t, x)


def _casts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def require_index(what: str, index: Tensor, limit: int, *, absent: bool = False) -> None:
    """References ask this of their indices, as the kernels do of theirs: in [0, limit), or also negative with `absent`.
    `what`: "op: index must be", or the like.

    Only on the CPU: elsewhere the answer would have to be waited for.
    """
    if index.device.type != "cpu" or index.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in torch.aminmax(index))
    if absent and high >= limit:
        raise IndexError(f"{what} below {limit}, got {high}")
    if not absent and (low < 0 or high >= limit):
        raise IndexError(f"{what} in [0, {limit}), got {low} to {high}")


def require_out(op: str, out: Tensor, shape: Sequence[int], like: Tensor, *inputs: Tensor | None) -> None:
    """`out=` takes a tensor of the right shape that no gradient is asked through."""
    dtype, wants_grad = out.dtype, out.requires_grad
    if out.shape != tuple(shape) or dtype != like.dtype or out.device != like.device:
        text = "{op}: out must be {shape} with the dtype and device of the input"
        require(False, text, out, like, op=op, shape=tuple(shape))
    if out.stride(-1) != 1 and out.shape[-1] > 1:
        require(False, f"{op}: the last stride of out must be 1", out)
    for t in inputs:
        if t is None:
            continue
        wants_grad |= t.requires_grad
        if t.dtype != dtype:  # autocast does not reach an op that is given its output
            require(False, f"{op}: with out= all tensors must have one dtype", t, out)
    if wants_grad and torch.is_grad_enabled():
        require(False, f"{op}: out= has no gradient; call it under torch.no_grad() or without out=")


def has_kernel(name: str, device_type: str) -> bool:
    """Is there a compiled kernel, or would the reference run?"""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", device_type.upper())


def why_reference(device_type: str) -> str:
    """Why references run on a device where there is no kernel."""
    if LOAD_ERROR is not None:
        return f"the compiled library did not load ({LOAD_ERROR}), so the reference runs"
    return f"no {device_type} kernel in this build, so the reference runs"


def _path() -> Path:
    """The compiled library. PYVIDX_OPS_LIBRARY names another build of pyvidx's own namespace (tests)."""
    other = os.environ.get("PYVIDX_OPS_LIBRARY") if NAMESPACE == "pyvidx" else None
    return Path(other or Path(__file__).parents[1] / "_ops.abi3.so")


def _load() -> str | None:
    """Load the kernels; None, or why they could not be loaded."""
    path = _path()
    if not path.exists():
        return (
            f"{path} does not exist: a wheel for this platform has it, `pip install --no-build-isolation .` builds it"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return str(error)
    return None


def _said(function: str) -> str | None:
    """What the loaded library says of itself; None without one, and of the tests' emulator, which says nothing."""
    if LOAD_ERROR is not None:
        return None
    library = ctypes.CDLL(str(_path()))  # loaded already: the same one
    if not hasattr(library, function):
        return None
    call = getattr(library, function)
    call.restype = ctypes.c_char_p
    return call().decode()


def build() -> dict[str, Any] | None:
    """compiler, torch and cuda_archs ("80", ...) of the loaded library; None without one that says."""
    said = _said("pyvidx_build")
    return None if said is None else json.loads(said)


def isa() -> str | None:
    """The instruction-set level the CPU kernels run at, or why they cannot run; None without a library that says."""
    return _said("pyvidx_isa")


LOAD_ERROR = _load()
if LOAD_ERROR is not None:
    warnings.warn(
        f"pyvidx has no compiled kernels here: every op runs its PyTorch reference, which is slower. {LOAD_ERROR}. "
        "`pyvidx info` says more; PYVIDX_STRICT=1 makes this an error.",
        RuntimeWarning,
        stacklevel=2,
    )
