"""One process of tests/fuzz/ops.py: makes calls [start, stop) and writes what came of each, a line before and after."""

import json
import signal
import sys
import time
import warnings

import torch
from torch import Tensor

from tests.fuzz.ops_cases import Draw
from tests.fuzz.ops_entries import Entry, entries
from tests.fuzz.ops_spoil import OVERFLOWS, TIES, spoil

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}
# What the public functions and torch raise for arguments. AttributeError: no tensor where there must be one.
# AssertionError: a guard of an exported program.
REFUSALS = (ValueError, IndexError, RuntimeError, TypeError, NotImplementedError, AttributeError, AssertionError)
SECONDS = 60


class Program(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, args):
        return self.call(args)


def tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


def coarsest(args: dict) -> float:
    """What may differ: sums of 16-bit inputs are kept in float by the kernels, but not by the references."""
    dtypes = {t.dtype for value in args.values() for t in tensors(value)}
    return max((TOLERANCE[dtype] for dtype in dtypes & set(TOLERANCE)), default=0.0)


def difference(got: Tensor, want: Tensor, tolerance: float) -> str | None:
    if got.shape != want.shape or got.dtype != want.dtype or got.device != want.device:
        return f"{tuple(got.shape)} {got.dtype} {got.device}, expected {tuple(want.shape)} {want.dtype} {want.device}"
    if got.device.type == "meta" or got.numel() == 0:
        return None
    if not got.is_floating_point():
        return None if torch.equal(got, want) else f"differ by up to {(got.long() - want.long()).abs().max()}"
    known = want.isfinite()
    scale = max(1.0, want[known].abs().max().item()) if known.any() else 1.0
    error = (got.double() - want.double())[known].abs().nan_to_num(float("inf"))
    if error.numel() and error.max().item() > tolerance * scale:
        return f"error {error.max().item():.3g} where values are up to {scale:.3g}"
    return None


def same_bits(x: Tensor, y: Tensor) -> bool:
    return x.device.type == "meta" or torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))


def make(entry: Entry, name: str, key: str, mode: str) -> tuple[dict, list[str]]:
    """The arguments of a call, spoiled, and how. Twice the same for the same key."""
    if mode == "eager":
        d = Draw(key)
        args = entry.make(d)
        return args, [spoil(d, name, args) for _ in range(d.random.choice([0, 1, 1, 1, 1, 2, 2, 2]))]
    variant, index = key.rsplit("/", 1)  # compiled once for all calls of a variant, whose values are spoiled
    d = Draw(variant)
    args = entry.make(d)
    d = Draw(key)
    return args, [spoil(d, name, args, values_only=index[-1] != "0") for _ in range(d.random.choice([1, 1, 2]))]


def prepare(entry: Entry, mode: str, variant: str):
    """The function to call with the arguments: eager, compiled, or an exported program."""
    if mode == "eager":
        return entry.call
    if mode == "compiled":
        return torch.compile(entry.call, backend="aot_eager", dynamic=False)
    args = entry.make(Draw(variant))
    return torch.export.export(Program(entry.call), (args,), strict=False).module()


def outcome(name: str, entry: Entry, run, args: dict, again: dict, how: list[str]) -> dict:
    """Call it; compare with the reference on arguments of its own."""
    try:
        got = run(args)
    except REFUSALS as error:
        return {"outcome": "refused", "error": type(error).__name__, "text": str(error).splitlines()[0][:200]}
    if any("absurd" in h for h in how):  # references would need the memory
        return {"outcome": "not compared"}
    try:
        want = entry.reference(again)
    except REFUSALS as error:
        return {"outcome": "accepted what the reference refuses", "error": f"{type(error).__name__}: {error}"[:300]}
    if name.endswith("residual_norm_backward") and any(h.startswith(("value", "stats")) for h in how):
        return {"outcome": "not compared"}  # the forward op gives all class rows of a video the same
    if any(way in h for h in how for way in (OVERFLOWS | TIES if "memory_" in name else OVERFLOWS)):
        return {"outcome": "not compared"}
    tolerance = coarsest(args)
    pairs = [("result", x, y) for x, y in zip(tensors(got), tensors(want), strict=True)]
    memory = {t.untyped_storage().data_ptr() for what in entry.writes for t in tensors(args.get(what, ()))}
    for what, value in args.items():
        for x, y in zip(tensors(value), tensors(again[what])):
            if x.device.type == "cpu" and x.untyped_storage().data_ptr() in memory:
                pairs.append((what, x, y))
            elif not same_bits(x, y):
                return {"outcome": "wrong", "error": f"{what} was changed"}
    for what, x, y in pairs:
        if (problem := difference(x, y, max(tolerance, TOLERANCE.get(y.dtype, 0.0)))) is not None:
            return {"outcome": "wrong", "error": f"{what}: {problem}"}
    return {"outcome": "right"}


def main(seed: str, start: int, stop: int, modes: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    table, prepared, write = entries(), {}, lambda x: print(json.dumps(x), flush=True)
    names = list(table)
    for i in range(start, stop):
        mode = modes.split(",")[i % len(modes.split(","))]
        d = Draw(f"{seed}/{i}")
        name = names[d.random.randrange(len(names))]
        variant = f"{seed}/{name}/{d.random.randrange(2)}"
        key = f"{seed}/{i}" if mode == "eager" else f"{variant}/{i}"
        args, how = make(table[name], name, key, mode)
        again, _ = make(table[name], name, key, mode)
        write({"call": i, "mode": mode, "entry": name, "key": key, "how": how})
        signal.alarm(SECONDS)
        with torch.no_grad():
            if (mode, variant) not in prepared or mode == "eager":
                run = prepared[mode, variant] = prepare(table[name], mode, variant)
            run = prepared[mode, variant]
            begun = time.perf_counter()
            result = outcome(name, table[name], run, args, again, how)
        write({"call": i, "seconds": round(time.perf_counter() - begun, 3)} | result)
    signal.alarm(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
