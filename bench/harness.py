"""Timing for the benches. A bench file yields Cases; `measure` (bench/conftest.py) does the rest.

All contenders of a case are timed in turn, round by round, so that a machine that drifts drifts for all of them. The
floor is a plain copy that moves as many bytes as the case must (half read, half written), timed in the same rounds.
"""

import itertools
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from pyvidx.graphs import record


@dataclass
class Case:
    """One op at one size.

    run, eager: the op, and the same mathematics in plain torch; both take no argument. eager is also what torch.compile
        is given, unless `compiled` is False (an op that plain torch cannot be compiled for says why in its bench).
    bytes: what must cross memory: each input read once, each output written once.
    flops: operations, where those may bind instead; 0 if they never do.
    graph: one run can be recorded as a CUDA graph: its shapes are fixed, and nothing it needs comes from the host.
    eager_calls: calls of eager that do the work of one run; its time is given times this.
    footprint: bytes that successive calls go through, where each call touches another part of a larger state. The copy
        then goes through as much: one that stays in the cache is no floor for what cannot.
    """

    op: str
    shape: dict[str, int | str]
    dtype: torch.dtype
    run: Callable[[], object]
    eager: Callable[[], object]
    bytes: int
    flops: int = 0
    footprint: int = 0
    compiled: bool = True
    graph: bool = True
    eager_calls: int = 1
    extra: dict = field(default_factory=dict)


def nbytes(*tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class Timer:
    """Seconds of one call. On a GPU the L2 cache is flushed first; that also hides the launches behind queued work."""

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            self.flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, function: Callable[[], object]) -> float:
        if self.device == "cuda":
            self.flush.zero_()
            self.events[0].record()
            function()
            self.events[1].record()
            torch.cuda.synchronize()
            return self.events[0].elapsed_time(self.events[1]) / 1e3
        start = time.perf_counter()
        function()
        return time.perf_counter() - start


def interleaved(contenders: dict[str, Callable[[], object]], device: str, seconds: float) -> dict[str, list[float]]:
    """Times of every contender, one call each per round, for `seconds` in all (at least 5 rounds)."""
    timer = Timer(device)
    for function in contenders.values():
        function()
        timer(function)
    times = {name: [] for name in contenders}
    stop = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < 5 or time.perf_counter() < stop:
        for name, function in contenders.items():
            times[name].append(timer(function))
    return times


def copy_of(bytes_moved: int, device: str, footprint: int = 0) -> Callable[[], object]:
    """A copy that moves bytes_moved bytes in total, of other buffers each time until footprint is through."""
    pairs = []
    for _ in range(max(1, -(-footprint // max(1, bytes_moved)))):
        source = torch.ones(max(1, bytes_moved // 2), dtype=torch.uint8, device=device)
        pairs.append((torch.ones_like(source), source))
    turns = itertools.cycle(pairs)

    def copy():
        target, source = next(turns)
        return target.copy_(source)

    return copy


def compare(case: Case, device: str, seconds: float, *, with_compile: bool = False) -> dict:
    """The extra_info of a case: medians, bandwidths and ratios, all from the same rounds.

    On a GPU also those of a CUDA graph of the call: what the op takes where nothing waits for its launches. Where the
    graph or torch.compile fails, as Triton may on old GPUs, the case has its error in graph_error or compile_error.
    """
    contenders = {"pyvidx": case.run, "copy": copy_of(case.bytes, device, case.footprint), "eager": case.eager}
    others, errors = {}, {}
    if device == "cuda" and case.graph:
        others["graph"] = lambda: record(case.run)[1]
    if with_compile and case.compiled:
        torch._dynamo.reset()
        others["compile"] = lambda: torch.compile(case.eager, dynamic=False)
    for name, make in others.items():
        try:
            contender = make()
            contender()
            contenders[name] = contender
        except Exception as error:  # of whatever compiler torch has
            errors[f"{name}_error"] = f"{type(error).__name__}: {error}"[:1000]
            warnings.warn(f"{case.op} {case.shape}: no {name} to compare with: {errors[f'{name}_error']}", stacklevel=2)
    times = interleaved(contenders, device, seconds)
    ms = {name: statistics.median(t) * 1e3 for name, t in times.items()}
    ms["eager"] *= case.eager_calls
    quartiles = statistics.quantiles(times["pyvidx"], n=4)
    info = {
        "op": case.op, "shape": case.shape, "dtype": str(case.dtype)[6:], "device": device_name(device),
        "threads": torch.get_num_threads(), "rounds": len(times["pyvidx"]), "bytes": case.bytes, "flops": case.flops,
        "ms": ms["pyvidx"], "spread": (quartiles[2] - quartiles[0]) * 1e3 / ms["pyvidx"], "copy_ms": ms["copy"],
        "eager_ms": ms["eager"], "gbps": case.bytes / ms["pyvidx"] / 1e6, "copy_gbps": case.bytes / ms["copy"] / 1e6,
        "floor_share": ms["copy"] / ms["pyvidx"], "vs_eager": ms["eager"] / ms["pyvidx"], "torch": torch.__version__,
    }  # fmt: skip
    if case.flops:
        info["gflops"] = case.flops / ms["pyvidx"] / 1e6
    info["compile_ms"] = ms.get("compile")
    info["vs_compile"] = ms["compile"] / ms["pyvidx"] if "compile" in ms else None
    if "graph" in ms:
        info["graph_ms"], info["graph_share"] = ms["graph"], ms["copy"] / ms["graph"]
    return info | errors | case.extra


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})"
