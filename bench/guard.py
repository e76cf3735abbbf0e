"""Whether an op has become slower: python -m bench.guard

Every op, forward and backward, at one small size, against its reference in plain torch. It fails where an op has lost
more than a quarter of its committed gain over the reference, on a processor and at an instruction set that a gain is
committed for: others say so and pass. --write commits those of this machine.

Both sides take turns, a millisecond each, and the least CPU time of each counts: what else runs on the machine makes
single turns longer and seldom all of them. What still seems slow is measured twice more, in new processes.
"""

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyvidx import _C, ops
from pyvidx.files import write_json
from pyvidx.ops._library import REFERENCES
from pyvidx.ops.memory_merge import new_state

COMMITTED = Path(__file__).parent / "results/guard.json"
KEPT = 0.75  # of the committed gain
TRIES, ROUNDS, TURN_NS = 3, 15, 1_000_000
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
B, T, P, C, H, M, N = 2, 8, 48, 256, 4, 10, 64


class Calls(TorchDispatchMode):
    """Which compiled ops run, and on what."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func._schema.name.split("::")
        if space == "pyvidx":
            count = sum(key.split(" ")[0] == name for key in self.found)
            self.found[name if not count else f"{name} {count + 1}"] = (func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def calls() -> dict[str, tuple]:
    """Name, op and arguments of each case."""

    def x(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).requires_grad_()

    keep, norm = torch.arange(0, P, 3).expand(B, P // 3).contiguous(), (x(C), x(C))
    K = keep.shape[1]
    with Calls() as mode:
        outputs = [
            ops.temporal_attention(x(B, T, P, 3, H, C // H)),
            ops.token_gather(x(B, T, P, C), keep, x(P, C), x(T, C)),
            ops.fusion_input(x(B, T, 1 + P, C), x(1 + P, C), x(T, C), x(C), keep=keep, norm=norm),
            ops.gated_fusion(x(B, T, 1 + P, C), x(B, T, K, C), x(B, C), x(C), keep=keep, norm=norm),
            ops.output_gate(x(B, T * P, C), x(B, C), x(C), norm=norm),
            ops.quick_gelu(x(B, T, P, C), x(C)),
            ops.residual_norm(x(B, T, P, C), x(B, T, P, C), norm, bias=x(C)),
            ops.st_pool(x(B, T, P, C)),
            ops.temporal_scale(x(B, T, P, C), x(C, 3), x(C)),
            ops.bank_attention(x(B, 1, 32, C), x(B, M + 1, N, 2 * C), None, H),
            ops.memory_merge(x(B, T, N, C), torch.ones(B, T, N)),
        ]
        leaves = [y for y in tree_leaves(outputs) if isinstance(y, torch.Tensor) and y.requires_grad]
        torch.autograd.backward(leaves, [torch.ones_like(y) for y in leaves])
        with torch.no_grad():
            frames = torch.randint(0, 256, (T, 90, 120, 3), dtype=torch.uint8)
            ops.resize_normalize(frames, (56, 74), crop=(0, 9, 56, 56))
            state = new_state(B, M, N, C, torch.float32, "cpu", [C])
            for _ in range(M + 1):
                mode.found.pop("memory_merge_", None)  # but on a full memory
                ops.memory_merge_(*state[:5], torch.randn(B, N, C), state.attached, [torch.randn(B, N, C)])
            plan = ops.memory_scan_(*state[:5], torch.randn(B, T, N, C))
            order = state.order.clone()  # the next scan changes it
            ops.memory_replay_(state.attached[0].clone(), torch.randn(B, T, N, C), plan, order)
    return mode.found


def gain(ours: Callable, theirs: Callable) -> float:
    """How many times the CPU time of ours is in that of theirs."""
    repeats, least = [], [float("inf")] * 2
    for function in (ours, theirs):
        function()
        repeats.append(max(1, round(TURN_NS / max(1, _time(function, 3)))))
    for _ in range(ROUNDS):
        for i, function in enumerate((ours, theirs)):
            least[i] = min(least[i], _time(function, repeats[i]))
    return least[1] / least[0]


def _time(function: Callable, repeats: int) -> float:
    begin = time.thread_time_ns()
    for _ in range(repeats):
        function()
    return (time.thread_time_ns() - begin) / repeats


def gains(names: Iterable[str] | None = None) -> dict[str, float]:
    """The gain of every case, or of these."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if sys.platform == "linux":  # glibc is to keep freed memory: a page fault costs as much as a small op
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20), libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
    found = calls()
    with torch.no_grad():
        return {
            name: gain(lambda: func(*args, **options), lambda: REFERENCES[name.split(" ")[0]](*args, **options))  # noqa: B023
            for name, (func, args, options) in found.items()
            if names is None or name in names
        }


def in_a_process(names: Iterable[str] | None = None) -> dict[str, float]:
    """The same in a new process: where its memory lies moves some ops by a fifth for as long as a process lives."""
    command = [sys.executable, "-m", "bench.guard", "--measure", *([] if names is None else names)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    return json.loads(subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def lost(committed: dict[str, float], measure: Callable[..., dict[str, float]] = in_a_process) -> dict[str, float]:
    """What keeps less than KEPT of its committed gain in every try, and the most that it kept.

    Raises:
        ValueError: the cases are not those that were committed.
    """
    best, names = {}, None
    for _ in range(TRIES):
        found = measure(names)
        if names is None and found.keys() != committed.keys():
            odd = sorted(found.keys() ^ committed.keys())
            raise ValueError(f"guard: cases must be those with a committed gain (--write), got {odd} in one of them")
        best |= {name: max(best.get(name, 0), value / committed[name]) for name, value in found.items()}
        names = [name for name, kept in best.items() if kept < KEPT]
        if not names:
            break
    return {name: best[name] for name in names}


def machine() -> str:
    """The processor and the instruction set that runs, e.g. "AuthenticAMD 25 17 v4bf16"."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = [re.search(rf"^{name}\s*: (.*)$", text, re.MULTILINE) for name in ("vendor_id", "cpu family", "model")]
    return " ".join([*(m[1] if m else "unknown" for m in found), _C.isa()])


def committed() -> dict[str, float] | None:
    """The gains that are committed for this processor and instruction set; None: none are."""
    return json.loads(COMMITTED.read_text())["gains"].get(machine())


def write() -> None:
    """Commit this machine's gains: of each the least of a few processes."""
    runs = [in_a_process() for _ in range(2 * TRIES)]
    data = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {"gains": {}}
    data["what"] = "CPU time of plain torch over pyvidx's, the least of 6 processes: python -m bench.guard --write"
    data["gains"][machine()] = {name: round(min(run[name] for run in runs), 2) for name in runs[0]}
    write_json(COMMITTED, data, indent=1)


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m bench.guard", description=__doc__.splitlines()[0])
    p.add_argument("--write", action="store_true", help=f"commit this machine's gains to {COMMITTED.name}")
    p.add_argument("--measure", nargs="*", metavar="CASE", help="print the gains of these cases, or of all, as JSON")
    options = p.parse_args()
    if options.measure is not None:
        print(json.dumps(gains(options.measure or None)))
        return
    if options.write:
        write()
    known = committed()
    if known is None:
        print(f"no gain is committed for {machine()}: python -m bench.guard --write")
        return
    slow = lost(known)
    for name, kept in slow.items():
        print(f"{name} keeps {kept:.2f} of its {known[name]}x over plain torch, wanted {KEPT}")
    print(f"{machine()}: {len(known)} cases, {len(slow)} slow")
    sys.exit(1 if slow else 0)


if __name__ == "__main__":
    main()
