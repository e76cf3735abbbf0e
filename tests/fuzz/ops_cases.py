"""Right arguments for every op of torch.ops.pyvidx, drawn at random."""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from pyvidx.ops._library import REFERENCES
from pyvidx.ops.memory_merge import new_state
from pyvidx.ops.token_gather import source_table

FLOATS = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Draw:
    """Random tensors and choices of one call. The same seed gives the same ones, so a call can be made twice."""

    def __init__(self, seed: str):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(40))
        self.dtype = self.random.choice(FLOATS)
        self.C = self.random.choice([8, 17, 33])
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype or self.dtype)

    def ints(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(dtype)

    def maybe(self, make: Callable):
        return make() if self.random.random() < 0.5 else None

    def flag(self) -> bool:
        return self.random.random() < 0.5


RAW: dict[str, Callable[[Draw], dict]] = {}


def raw(make: Callable) -> Callable:
    RAW[make.__name__] = make
    return make


def _keep(d: Draw, B: int, T: int, P: int) -> Tensor:
    rows = d.random.choice([1, B])
    if d.flag():
        return torch.stack([torch.randperm(P, generator=d.generator)[:3] for _ in range(rows)])
    return torch.stack([torch.randperm(T * P, generator=d.generator)[:6].view(2, 3) for _ in range(rows)])


# --- token_gather, st_pool, temporal_attention, temporal_scale, quick_gelu


@raw
def token_gather(d):
    position, time = d.maybe(lambda: d.floats(5, d.C)), d.maybe(lambda: d.floats(6, d.C))
    return {"x": d.floats(2, 4, 5, d.C), "keep": _keep(d, 2, 4, 5), "position": position, "time": time}


@raw
def token_gather_out(d):
    args = token_gather(d)
    S, K = (4, 3) if args["keep"].dim() == 2 else (2, 3)
    return args | {"out": d.floats(2, S, K, d.C)}


@raw
def token_gather_backward(d):
    keep = _keep(d, 2, 4, 5)
    return {
        "grad_out": d.floats(2, 4 if keep.dim() == 2 else 2, 3, d.C),
        "source": source_table(keep, 2, 4, 5),
    }


@raw
def st_pool(d):
    return {"x": d.floats(2, 4, 5, d.C), "mask": d.maybe(lambda: d.ints(0, 2, 2, 4))}


@raw
def st_pool_out(d):
    return st_pool(d) | {"spatial": d.floats(2, 5, d.C), "temporal": d.floats(2, 4, d.C)}


@raw
def st_pool_backward(d):
    mask = d.maybe(lambda: d.ints(0, 2, 2, 4))
    return {"grad_spatial": d.floats(2, 5, d.C), "grad_temporal": d.floats(2, 4, d.C), "mask": mask}


@raw
def temporal_attention(d):
    return {"qkv": d.floats(2, d.random.choice([3, 8]), 3, 3, 2, d.C), "scale": 0.3}


@raw
def temporal_attention_out(d):
    args = temporal_attention(d)
    B, T, P, _, H, D = args["qkv"].shape
    return args | {"out": d.floats(B, T, P, H * D)}


@raw
def temporal_attention_backward(d):
    args = temporal_attention_out(d)
    return {"grad_out": args["out"], "qkv": args["qkv"], "scale": args["scale"]}


@raw
def temporal_scale(d):
    return {
        "x": d.floats(2, 4, 5, d.C),
        "weight": d.floats(d.C, d.random.choice([1, 3, 5])),
        "bias": d.maybe(lambda: d.floats(d.C)),
        "mask": d.maybe(lambda: d.ints(0, 2, 2, 4)),
        "residual": d.maybe(lambda: d.floats(2, 4, 5, d.C)),
    }


@raw
def temporal_scale_out(d):
    return temporal_scale(d) | {"out": d.floats(2, 4, 5, d.C)}


@raw
def temporal_scale_backward(d):
    args = temporal_scale(d)
    x = d.maybe(lambda: d.floats(2, 4, 5, d.C))
    return {"grad_out": args["x"], "x": x, "weight": args["weight"], "mask": args["mask"]}


@raw
def quick_gelu(d):
    return {"x": d.floats(3, 5, d.C)}


@raw
def quick_gelu_backward(d):
    return {"grad_out": d.floats(3, 5, d.C)} | quick_gelu(d)


# --- resize_normalize


@raw
def resize_normalize(d):
    return {
        "frames": d.ints(0, 256, 2, 9, 11, 3, dtype=torch.uint8),
        "size": [d.random.choice([5, 9, 20]), 7],
        "crop": [d.random.choice([-2, 0, 1]), 1, 4, 6],
        "bilinear": d.flag(),
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "dtype": str(d.dtype).removeprefix("torch."),  # exported programs take no torch.dtype
    }


@raw
def resize_normalize_out(d):
    args = resize_normalize(d)
    del args["dtype"]
    return args | {"out": d.floats(2, 3, 4, 6)}


# --- residual_norm, gated_fusion, gated_output


@raw
def residual_norm(d):
    low = d.dtype == torch.float32 and d.random.random() < 0.2
    form = d.random.choice(["plain", "cls", "share"])
    return {
        "x": d.floats(2, 3, 4, d.C),
        "y": d.floats(2, 3, 4, d.C, dtype=torch.bfloat16 if low else None),
        "cls": d.floats(2, d.C) if form == "cls" else None,
        "factor": d.maybe(lambda: d.floats(2, 3, dtype=d.wide)),
        "share": d.floats(2, 3, dtype=d.wide) if form == "share" else None,
        "weight": d.floats(d.C),
        "shift": d.floats(d.C),
        "eps": 1e-5,
    }


@raw
def residual_norm_out(d):
    args = residual_norm(d)
    N = 4 + (args["cls"] is not None)
    return args | {"out": d.floats(2, 3, N, d.C), "normed": d.floats(2, 3, N, d.C, dtype=args["y"].dtype)}


@raw
def residual_norm_backward(d):
    args = residual_norm(d)
    cls = args["cls"] is not None
    N = 4 + cls
    value = d.floats(2, 3, N, d.C)
    if cls or args["share"] is not None:  # a slot's class row is that of all slots
        value[:, :, 0] = value[:, :1, 0]
    wide = value.to(d.wide)
    stats = torch.stack([wide.mean(-1), wide.var(-1).rsqrt()], dim=-1)
    return {
        "grad_out": d.floats(2, 3, N, d.C),
        "grad_normed": d.floats(2, 3, N, d.C, dtype=args["y"].dtype),
        "value": value,
        "stats": stats,
        "factor": args["factor"],
        "share": args["share"],
        "weight": args["weight"],
        "cls": cls,
        "need_y": d.flag(),
    }


@raw
def gated_fusion(d):
    first, pair, packed = d.flag(), d.flag(), d.flag()
    frames = 2 if pair else 4
    keep = d.maybe(lambda: _keep(d, 2, frames, 5))
    S, K = (frames, 5) if keep is None else (frames if keep.dim() == 2 else 2, 3)
    norm = d.flag()
    mixed = {
        "z": d.floats(2, S, K + packed, d.C),
        "cls": None if packed else d.floats(2, d.C),
        "gate": d.maybe(lambda: d.floats(d.C) / 10),
        "position": None,
        "time": None,
    }
    start = {"z": None, "cls": d.floats(d.C), "gate": None, "position": d.floats(6, d.C), "time": d.floats(5, d.C)}
    return (
        {"x": d.floats(2, 4, 6, d.C)}
        | (start if first else mixed)
        | {
            "keep": keep,
            "weight": d.floats(d.C) if norm else None,
            "bias": d.floats(d.C) if norm else None,
            "scale": 2.0,
            "eps": 1e-5,
            "pair": pair,
        }
    )


def branch(args: dict) -> tuple[int, int]:
    keep, frames = args["keep"], 2 if args["pair"] else 4
    return (frames, 5) if keep is None else (frames if keep.dim() == 2 else 2, 3)


@raw
def gated_fusion_out(d):
    args = gated_fusion(d)
    rows = (2, *branch(args), d.C)
    normed = None if args["weight"] is None else d.floats(*rows)
    return args | {"out": d.floats(*rows), "out_cls": d.floats(2, d.C), "normed": normed}


@raw
def gated_fusion_backward(d):
    args = gated_fusion(d)
    S, K = branch(args)
    first, norm = args["z"] is None, args["weight"] is not None
    need_gate = args["gate"] is not None and d.flag()
    rows = d.floats(2, S, K, d.C)
    keep, frames = args["keep"], 2 if args["pair"] else 4
    need_x = d.flag()
    wide = rows.to(d.wide)
    return {
        "grad_out": None if norm and d.flag() else d.floats(2, S, K, d.C),
        "grad_out_cls": d.floats(2, d.C),
        "grad_normed": d.floats(2, S, K, d.C) if norm else None,
        "value": rows if norm and not need_gate else None,
        "x": args["x"] if need_gate else None,
        "z": args["z"] if need_gate else None,
        "cls": args["cls"] if need_gate else None,
        "gate": args["gate"],
        "keep": keep,
        "source": None if keep is None else source_table(keep, 2, frames, 5),
        "weight": args["weight"],
        "stats": torch.stack([wide.mean(-1), wide.var(-1).rsqrt()], dim=-1) if norm else None,
        "T": 4,
        "P": 5,
        "scale": 2.0,
        "pair": args["pair"],
        "first": first,
        "packed": not first and args["cls"] is None,
        "need_x": need_x,
        "need_z": d.flag(),
        "need_gate": need_gate,
    }


@raw
def gated_output(d):
    norm = d.flag()
    return {
        "x_cls": d.floats(2, 4, d.C),
        "cls": d.floats(2, d.C),
        "gate": d.maybe(lambda: d.floats(d.C) / 10),
        "weight": d.floats(d.C) if norm else None,
        "bias": d.floats(d.C) if norm else None,
        "scale": 2.0,
        "eps": 1e-5,
    }


@raw
def gated_output_out(d):
    return gated_output(d) | {"out": d.floats(2, 4, d.C)}


@raw
def gated_output_backward(d):
    args = gated_output(d)
    wide = d.floats(2, 4, d.C).to(d.wide)
    norm = args["weight"] is not None
    return {
        "grad": d.floats(2, 4, d.C),
        "x_cls": args["x_cls"],
        "cls": args["cls"],
        "gate": args["gate"],
        "weight": args["weight"],
        "stats": torch.stack([wide.mean(-1), wide.var(-1).rsqrt()], dim=-1)[:, None] if norm else None,
        "scale": 2.0,
        "need_gate": args["gate"] is not None and d.flag(),
    }


# --- bank_attention and memory banks


@raw
def bank_attention(d):
    table = d.maybe(lambda: d.ints(-1, 4, 2, 2, 5, 3))
    sizes = d.maybe(lambda: d.ints(1, 9, 2, 2, 5, 4 if table is None else 3))
    return {
        "q": d.floats(2, 2, 3, 32),
        "rows": d.floats(2, 4, 5, 64),
        "table": table,
        "sizes": sizes,
        "mask": d.maybe(lambda: d.ints(0, 2, 2, 5)),
        "heads": d.random.choice([2, 4]),
        "scale": 0.3,
    }


@raw
def bank_attention_out(d):
    return bank_attention(d) | {"out": d.floats(2, 2, 3, 32)}


@raw
def bank_attention_backward(d):
    args = bank_attention(d)
    out, lse = REFERENCES["bank_attention"](*args.values())
    names = ("q", "rows", "table", "sizes", "mask")
    return (
        {"grad_out": d.floats(2, 2, 3, 32)}
        | {name: args[name] for name in names}
        | {"out": out, "lse": lse, "heads": args["heads"], "scale": 0.3, "need_rows": d.flag()}
    )


def _state(d: Draw, attached: int = 0):
    """A bank of 3 entries that has seen 0 to 5 frames."""
    state = new_state(2, 3, 5, d.C, d.dtype, attached_widths=[8] * attached)
    for _ in range(d.random.randrange(6)):
        new = [d.floats(2, 5, 8) for _ in range(attached)]
        REFERENCES["memory_merge_"](*state[:5], d.floats(2, 5, d.C), state.attached, new, True, None)
    return dict(zip(("bank", "sizes", "order", "similarity", "length", "attached"), state))


@raw
def memory_merge_(d):
    attached = d.random.randrange(3)
    state = _state(d, attached)
    dtype = torch.bfloat16 if d.dtype == torch.float32 and d.flag() else None
    frame = d.maybe(lambda: d.floats(2, 5, d.C, dtype=dtype))
    state["attached"] = list(state["attached"])
    new = [] if frame is None else [d.floats(2, 5, 8) for _ in range(attached)]
    names = ("bank", "sizes", "order", "similarity", "length")
    return (
        {name: state[name] for name in names}
        | {"frame": frame, "attached": state["attached"], "attached_frame": new, "weighted": d.flag()}
        | {"active": d.maybe(lambda: d.ints(0, 2, 2))}
    )


@raw
def memory_scan_(d):
    state = _state(d)
    del state["attached"]
    return state | {"frames": d.floats(2, 3, 5, d.C), "weighted": d.flag(), "active": d.maybe(lambda: d.ints(0, 2, 2))}


@raw
def memory_replay_(d):
    args = memory_scan_(d)
    plan = REFERENCES["memory_scan_"](*args.values())
    return (
        {"rows": d.floats(2, 4, 5, 8), "frames": d.floats(2, 3, 5, 8)}
        | dict(zip(("table", "sources", "counts"), plan))
        | {"order": args["order"], "weighted": args["weighted"], "out": d.floats(2, 10, 5, 8)}
    )


@raw
def memory_merge(d):
    sizes = d.ints(1, 9, 2, 4, 5, dtype=d.random.choice([torch.int32, torch.float32]))
    return {"bank": d.floats(2, 4, 5, d.C), "sizes": sizes, "weighted": d.flag()}


@raw
def memory_merge_backward(d):
    args = memory_merge(d)
    index = d.ints(0, 3, 2, 5)
    return {"grad_out": d.floats(2, 3, 5, d.C), "sizes": args["sizes"], "index": index, "weighted": args["weighted"]}
