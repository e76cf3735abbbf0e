"""Ways to spoil an argument: each takes a Draw and the arguments, and changes one of them in the dict.

Values that only say something else (another index in range, a NaN) leave a right call; the reference then knows what
must come out.
"""

import torch
from torch import Tensor

from tests.fuzz.ops_cases import Draw

INDICES = (-1, -2, 1, 3, 4, 5, 6, 20, 5000, 500_000_000, 2**31 - 1, -(2**31))
WIDE_INDICES = (2**31, 2**40, 2**63 - 1, -(2**63))
INTEGERS = (0, 1, -1, 2, 3, 7, 16, 1000, 2**31, -(2**31), 2**40, 2**62, -(2**63))
NUMBERS = (0.0, -1.0, float("nan"), float("inf"), 1e38, -1e38, 1e308)
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool, torch.uint8,
    torch.complex64,
)  # fmt: skip
OVERFLOWS = {"huge", "number"}  # numbers cannot be compared after these
TIES = {"expand", "zeros", "nan", "same memory", "overlapping"}  # nor the choice of the most similar pair after these


def _dim(d: Draw, x: Tensor) -> int:
    return d.random.randrange(x.dim())


def shorter(d, x):
    dim = _dim(d, x)
    return x.narrow(dim, 0, max(0, x.shape[dim] - 1))


def longer(d, x):
    dim = _dim(d, x)
    return torch.cat([x, x.narrow(dim, 0, min(1, x.shape[dim]))], dim)


def empty(d, x):
    return x.narrow(_dim(d, x), 0, 0)


def fewer_dims(d, x):
    dim = _dim(d, x)
    return x.select(dim, 0) if x.shape[dim] else x.flatten()


def more_dims(d, x):
    return x.unsqueeze(d.random.randrange(x.dim() + 1))


def swapped(d, x):
    return x.transpose(_dim(d, x), _dim(d, x))


def other_dtype(d, x):
    return x.to(d.random.choice(DTYPES))


def meta(d, x):
    return x.to("meta")


def none(d, x):
    return None


def not_a_tensor(d, x):
    return d.random.choice([1.5, "x", [x], (x, x), x.numpy() if x.dtype != torch.bfloat16 else 3])


def strided(d, x):
    """The same values with other strides."""
    dim = _dim(d, x)
    spread = torch.stack([x, x], dim=dim + 1).flatten(dim, dim + 1)
    return spread[(slice(None),) * dim + (slice(None, None, 2),)]


def last_first(d, x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def shifted(d, x):
    """The same values, one element on in memory."""
    room = x.new_empty(x.numel() + 1)
    return room[1:].view(x.shape).copy_(x)


def expand(d, x):
    dim = _dim(d, x)
    return x.narrow(dim, 0, 1).expand(x.shape) if x.shape[dim] else x


def absurd(d, x):
    """Sizes that no memory holds, on one element."""
    dim = _dim(d, x)
    sizes = list(x.shape)
    sizes[dim] = d.random.choice([2**33, 2**44])
    return x.narrow(dim, 0, 1).expand(sizes) if x.shape[dim] else x


def overlapping(d, x):
    """Rows that begin one element after each other."""
    room = x.contiguous().flatten()
    size, stride = list(x.shape), [1] * x.dim()
    need = sum(n - 1 for n in size) + 1
    return room.as_strided(size, stride) if 0 < need <= room.numel() else x


def with_value(d, x, value):
    x = x.clone(memory_format=torch.contiguous_format)
    if x.numel():
        x.view(-1)[d.random.randrange(x.numel())] = value
    return x


def nan(d, x):
    return with_value(d, x, float("nan")) if x.is_floating_point() else x


def huge(d, x):
    return x * 1e30 if x.is_floating_point() else x


def zeros(d, x):
    return torch.zeros_like(x)


def index(d, x):
    if x.dtype == torch.int64:
        return with_value(d, x, d.random.choice(INDICES + WIDE_INDICES))
    return with_value(d, x, d.random.choice(INDICES)) if x.dtype == torch.int32 else nan(d, x)


def every_index(d, x):
    if x.dtype not in (torch.int32, torch.int64):
        return nan(d, x)
    return torch.full_like(x, d.random.choice(INDICES + (WIDE_INDICES if x.dtype == torch.int64 else ())))


SHAPES = (shorter, longer, empty, fewer_dims, more_dims, swapped, other_dtype, meta, none, not_a_tensor, absurd)
LAYOUTS = (strided, last_first, shifted, expand, overlapping)
VALUES = (nan, huge, zeros, index, index, index, every_index)
# Loops over keys and frames as long as such tables say, on one element each, would be right and never end.
ENDLESS = {"bank_attention", "pyvidx::bank_attention", "pyvidx::bank_attention_out", "pyvidx::bank_attention_backward"}


def spoil(d: Draw, entry: str, args: dict, values_only: bool = False) -> str:
    """Spoil one argument of args; its name and how."""
    names = [n for n, value in args.items() if not values_only or isinstance(value, Tensor)]
    name = d.random.choice(names)
    old = args[name]
    if isinstance(old, (list, tuple)):
        return f"{name}: {_spoil_list(d, args, name, values_only)}"
    if isinstance(old, Tensor) and old.dim() > 0:
        ways = VALUES + LAYOUTS if values_only else SHAPES + LAYOUTS + VALUES
        way = d.random.choice(ways)
        if way is absurd and entry in ENDLESS:
            way = shorter
        others = [n for n, t in args.items() if n != name and isinstance(t, Tensor)]
        if not values_only and others and d.random.random() < 0.12:
            return f"{name}: {_same_memory(d, args, name, d.random.choice(others))}"
        try:
            args[name] = way(d, old)
        except (RuntimeError, TypeError):  # torch makes no such tensor
            return f"{name}: as it is"
        return f"{name}: {way.__name__.replace('_', ' ')}"
    if isinstance(old, bool):
        args[name] = not old if d.random.random() < 0.8 else None
        return f"{name}: flag"
    if isinstance(old, int):
        args[name] = old + d.random.choice([-1, 1]) if values_only else d.random.choice(INTEGERS)
        return f"{name}: integer value"
    if isinstance(old, float):
        args[name] = d.random.choice(NUMBERS)
        return f"{name}: number"
    if old is None and not values_only:
        args[name] = d.floats(2, 4, d.C) if d.flag() else d.ints(0, 3, 2, 4, dtype=torch.int64)
        return f"{name}: given"
    return f"{name}: as it is"


def _same_memory(d: Draw, args: dict, name: str, other: str) -> str:
    """One argument becomes another, or a window of its memory with the sizes of the old one."""
    old, new = args[name], args[other]
    if d.flag() and new.numel() >= old.numel() > 0 and new.is_contiguous():
        start = d.random.randrange(new.numel() - old.numel() + 1)
        new = new.flatten()[start : start + old.numel()].view(old.shape)
    args[name] = new
    return f"same memory as {other}"


def _spoil_list(d: Draw, args: dict, name: str, values_only: bool) -> str:
    items = list(args[name])
    how = d.random.choice(["one", "one", "shorter", "longer"]) if items and not values_only else "one"
    if not items:
        return "as it is"
    if how == "shorter":
        items.pop()
    elif how == "longer":
        items.append(items[0])
    else:
        inner = {str(i): item for i, item in enumerate(items)}
        how = spoil(d, name, inner, values_only)
        items = list(inner.values())
    kind = type(args[name])
    try:
        args[name] = kind(*items) if hasattr(kind, "_fields") else kind(items)
    except TypeError:  # a MergePlan has three
        args[name] = tuple(items)
    return how
