"""Registers, local memory and shared memory per kernel, from what `ptxas -v` prints."""

import re
import subprocess
from pathlib import Path

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse(log: str) -> dict[str, dict[str, dict[str, int]]]:
    """Mangled kernel name -> architecture -> {registers, spills, local, shared}: bytes, but for the registers.

    local is the stack frame: spilled registers, and arrays that cannot be kept in registers. Functions that were not
    inlined count for the kernel before them.
    """
    found: dict[str, dict[str, dict[str, int]]] = {}
    now: dict[str, int] = {}
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            now = {"registers": 0, "spills": 0, "local": 0, "shared": 0}
            found.setdefault(entry[1], {})[entry[2]] = now
        elif stack := _STACK.search(line):
            now["local"] += int(stack[1])
            now["spills"] += int(stack[2]) + int(stack[3])
        elif used := _USED.search(line):
            now["registers"] = int(used[1])
            if shared := _SHARED.search(line):
                now["shared"] = int(shared[1])
    return found


def demangle(names: list[str]) -> list[str]:
    """Kernel names as C++ writes them, without their parameters."""
    if not names:
        return []
    text = subprocess.run(["c++filt"], input="\n".join(names), text=True, capture_output=True, check=True).stdout
    return [_without_parameters(line.removeprefix("void ")) for line in text.splitlines()]


def _without_parameters(name: str) -> str:
    """Up to the first parenthesis that is not inside template arguments, as in kernel<(Mode)1>(Args)."""
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name


def of_logs(logs: list[Path]) -> dict[str, dict[str, dict[str, int]]]:
    """The same for whole compilations, with readable names."""
    found = {}
    for log in logs:
        found.update(parse(log.read_text()))
    return dict(sorted(zip(demangle(list(found)), found.values())))
