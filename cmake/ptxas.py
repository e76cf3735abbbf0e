"""Registers, spills and shared memory per kernel, from what `ptxas -v` prints."""

import re
import subprocess
from pathlib import Path

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
_SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse(log: str) -> dict[str, dict[str, dict[str, int]]]:
    """Mangled kernel name -> architecture -> {registers, spills, shared (static bytes)}."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    now: dict[str, int] = {}
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            now = found.setdefault(entry[1], {}).setdefault(entry[2], {"registers": 0, "spills": 0, "shared": 0})
        elif spill := _SPILL.search(line):
            now["spills"] = int(spill[1]) + int(spill[2])
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
    return [re.sub(r"^void ", "", line).split("(pyvidx::", 1)[0] for line in text.splitlines()]


def of_logs(logs: list[Path]) -> dict[str, dict[str, dict[str, int]]]:
    """The same for whole compilations, with readable names."""
    found = {}
    for log in logs:
        found.update(parse(log.read_text()))
    return dict(sorted(zip(demangle(list(found)), found.values())))
