"""python -m tests.fuzz.ops --calls 5000 --seed 0 --out FILE.json: every op and public function with spoiled arguments.

Each call is made in a child process under an allocator that puts every tensor between pages nobody may touch
(guard.c). It must come out as the reference does on the same arguments, or be refused. What ends a child, takes a
minute, raises something else or differs from the reference is a finding.
"""

import argparse
import collections
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from pyvidx.files import write_json

ROOT = Path(__file__).parents[2]
GUARD = Path(__file__).with_name("guard.c")
MODES = ("eager",) * 18 + ("compiled", "exported")
PER_CHILD = 2500  # a child compiles each call once


def build_guard(folder: Path) -> Path:
    """Compile the allocator that children are run under."""
    library = folder / "guard.so"
    subprocess.check_call(["gcc", "-O2", "-shared", "-fPIC", str(GUARD), "-o", str(library), "-ldl"])
    return library


def environment(guard: Path | None) -> dict[str, str]:
    extra = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | ({"LD_PRELOAD": str(guard)} if guard else {})
    return os.environ | extra


def run_child(guard: Path, seed: str, start: int, stop: int, modes: str) -> tuple[list[dict], int | str]:
    """Calls [start, stop) until the child ends: what it wrote, and the signal that ended it (0: none) or its error."""
    command = [sys.executable, "-m", "tests.fuzz.ops_child", seed, str(start), str(stop), modes]
    child = subprocess.run(command, env=environment(guard), cwd=ROOT, capture_output=True, text=True)
    lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    if child.returncode > 0:
        return lines, child.stderr.strip().splitlines()[-1][:500]
    return lines, -child.returncode


def calls_of(lines: list[dict]) -> dict[int, dict]:
    """The lines before and after a call, as one."""
    calls = collections.defaultdict(dict)
    for line in lines:
        calls[line["call"]] |= line
    return calls


def fuzz(calls: int, seed: str, modes: tuple[str, ...] = MODES) -> dict:
    """Make so many calls and count what came of them."""
    done = {}
    with tempfile.TemporaryDirectory() as folder:
        guard = build_guard(Path(folder))
        start = 0
        while start < calls:
            lines, ended = run_child(guard, seed, start, min(calls, start + PER_CHILD), ",".join(modes))
            found = calls_of(lines)
            if not found:
                raise RuntimeError(f"fuzz: a child made no call: {ended}")
            last = max(found)
            if "outcome" not in found[last]:
                kind = f"signal {signal.Signals(ended).name}" if isinstance(ended, int) and ended else str(ended)
                found[last] |= {"outcome": "ended the process", "error": kind}
            elif ended:
                raise RuntimeError(f"fuzz: a child ended after call {last}: {ended}")
            done |= found
            start = last + 1
    return summary(list(done.values()), seed)


def summary(calls: list[dict], seed: str) -> dict:
    """Counts by mode, by outcome and by entry; every finding in full."""
    good = {"right", "refused", "not compared"}
    count = lambda of: dict(sorted(collections.Counter(of).items()))  # noqa: E731
    modes = sorted({c["mode"] for c in calls})
    return {
        "seed": seed,
        "calls": len(calls),
        "torch": torch.__version__,
        "entries": len({c["entry"] for c in calls}),
        "outcomes": {m: count(c["outcome"] for c in calls if c["mode"] == m) for m in modes},
        "refusals": count(c["error"] for c in calls if c["outcome"] == "refused"),
        "calls_of": count(c["entry"] for c in calls),
        "findings": [c for c in calls if c["outcome"] not in good],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.ops", description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--out", type=Path, help="where the counts go, as JSON")
    options = parser.parse_args()
    result = fuzz(options.calls, options.seed)
    if options.out:
        write_json(options.out, result, indent=1)
    print(json.dumps({k: v for k, v in result.items() if k != "calls_of"}, indent=1))
    sys.exit(bool(result["findings"]))


if __name__ == "__main__":
    main()
