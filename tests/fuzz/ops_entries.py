"""Every op and every public function of pyvidx.ops, with arguments for it and what must come out."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from unittest import mock

import torch

import pyvidx.ops as ops
from pyvidx.ops import memory_scan as scan_module
from pyvidx.ops._library import REFERENCES
from tests.fuzz.ops_cases import (
    RAW,
    Draw,
    bank_attention,
    branch,
    gated_fusion,
    gated_output,
    memory_merge,
    memory_merge_,
    memory_replay_,
    memory_scan_,
    quick_gelu,
    residual_norm,
    resize_normalize,
    st_pool,
    temporal_attention,
    temporal_scale,
    token_gather,
)  # fmt: skip


@dataclass
class Entry:
    """make: the arguments by name, from a Draw. call: the function under test on them. reference: what must come out,
    on arguments of its own. writes: the arguments that it may change."""

    make: Callable[[Draw], dict]
    call: Callable[[dict], object]
    reference: Callable[[dict], object]
    writes: frozenset[str] = frozenset()


PUBLIC: dict[str, Callable[[Draw], dict]] = {}


def public(make: Callable) -> Callable:
    PUBLIC[make.__name__.removesuffix("_")] = make
    return make


# --- the public functions: what differs from the ops they call


def _norm(args: dict) -> dict:
    weight, bias, eps = (args.pop(name, None) for name in ("weight", "bias", "eps"))
    return args | {"norm": None if weight is None else (weight, bias, eps)}


def _mask(args: dict) -> dict:
    name = "active" if "active" in args else "mask"
    return args | {name: None if args[name] is None else args[name] != 0}


def _sometimes_out(d: Draw, args: dict, *shapes: tuple[int, ...]) -> dict:
    if d.flag():
        return args
    outs = tuple(d.floats(*shape) for shape in shapes)
    return args | {"out": outs if len(outs) > 1 else outs[0]}


@public
def public_token_gather(d):
    args = token_gather(d)
    S = 4 if args["keep"].dim() == 2 else 2
    return _sometimes_out(d, args, (2, S, 3, d.C))


@public
def public_st_pool(d):
    return _sometimes_out(d, _mask(st_pool(d)), (2, 5, d.C), (2, 4, d.C))


@public
def public_temporal_attention(d):
    return _sometimes_out(d, args := temporal_attention(d), (2, args["qkv"].shape[1], 3, 2 * d.C))


@public
def public_temporal_scale(d):
    return _sometimes_out(d, _mask(temporal_scale(d)), (2, 4, 5, d.C))


@public
def public_quick_gelu(d):
    return quick_gelu(d)


@public
def public_residual_norm(d):
    args = residual_norm(d)
    norm = args.pop("weight"), args.pop("shift"), args.pop("eps")
    return args | {"norm": norm}


@public
def public_resize_normalize(d):
    args = resize_normalize(d)
    args["filter"] = "bilinear" if args.pop("bilinear") else "bicubic"
    return _sometimes_out(d, args, (2, 3, 4, 6))


@public
def public_fusion_input(d):
    while (args := gated_fusion(d))["z"] is not None:
        pass
    for name in ("z", "gate", "scale"):
        del args[name]
    args = _norm(args | {"seed": args.pop("cls")})
    rows = (2, *branch(args), d.C)
    return _sometimes_out(d, args, rows, (2, d.C), *([rows] if args["norm"] else []))


@public
def public_gated_fusion(d):
    while (args := gated_fusion(d))["z"] is None:
        pass
    for name in ("position", "time"):
        del args[name]
    args = _norm(args)
    rows = (2, *branch(args), d.C)
    return _sometimes_out(d, args, rows, (2, d.C), *([rows] if args["norm"] else []))


@public
def public_output_gate(d):
    return _sometimes_out(d, _norm(gated_output(d)), (2, 4, d.C))


@public
def public_bank_attention(d):
    return _sometimes_out(d, _mask(bank_attention(d)), (2, 2, 3, 32))


@public
def public_memory_merge(d):
    return memory_merge(d)


@public
def public_memory_merge__(d):
    return _mask(memory_merge_(d))


@public
def public_memory_scan__(d):
    return _mask(memory_scan_(d))


@public
def public_memory_replay__(d):
    args = memory_replay_(d)
    plan = scan_module.MergePlan(*(args.pop(name) for name in ("table", "sources", "counts")))
    return args | {"plan": plan} | ({} if d.flag() else {"out": args["out"]})


def _with_references(function: Callable, args: dict):
    """A public function with the reference in place of every op."""
    module = import_module(function.__module__)
    # Those that write into their arguments are reached by a function (ops/_library.py); an OpOverload has an `op`, too.
    known = torch._ops.OpOverload
    ops_of = {name: x if isinstance(x, known) else getattr(x, "op", None) for name, x in vars(module).items()}
    found = {
        name: REFERENCES[op._schema.name.removeprefix("pyvidx::")]
        for name, op in ops_of.items()
        if isinstance(op, known)
    }
    with mock.patch.multiple(module, **found):
        return function(**args)


def _typed(args: dict) -> dict:
    return args | ({"dtype": getattr(torch, args["dtype"])} if "dtype" in args else {})


def entries() -> dict[str, Entry]:
    """Every op as "pyvidx::name", every public function by its name."""
    all_of_them = {}
    for name, make in RAW.items():
        op = getattr(torch.ops.pyvidx, name).default
        writes = {a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        all_of_them[f"pyvidx::{name}"] = Entry(
            make,
            lambda args, op=op: op(*_typed(args).values()),
            lambda args, name=name: REFERENCES[name](*_typed(args).values()),
            frozenset(writes),
        )
    for name, make in PUBLIC.items():
        name = name.removeprefix("public_")
        function = getattr(ops, name)
        writes = {"out", "rows"} if name == "memory_replay_" else {"out"}
        if name in ("memory_merge_", "memory_scan_"):
            writes = {"bank", "sizes", "order", "similarity", "length", "attached"}
        all_of_them[name] = Entry(
            make,
            lambda args, f=function: f(**_typed(args)),
            lambda args, f=function: _with_references(f, _typed(args)),
            frozenset(writes),
        )
    return all_of_them
