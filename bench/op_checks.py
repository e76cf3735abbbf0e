"""What checks cost the ops: python -m bench.op_checks BEFORE AFTER --out FILE.json

BEFORE and AFTER are checkouts with a finished build. A process of each holds the op benches' cases with B = 1 and
T = 8; they take turns, a few calls each, so that a machine that drifts drifts for both. The ratio of a case is that of
the least times, which other processes disturb least. Where a process' memory lies moves an attention by 5 % and more
for as long as the process lives: both are started anew a few times, and the least is over all.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SECONDS_PER_TURN = 0.02
OPS = (
    "token_gather", "temporal_scale", "st_pool", "quick_gelu", "gated_fusion", "residual_norm", "temporal_attention",
    "memory_merge", "memory_scan", "bank_attention", "resize_normalize",
)  # fmt: skip


# Not `-m bench.op_checks`: `bench` must be that of the checkout.
WORKER = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__worker__')"


class Capture:
    """A pytest plugin: keeps the cases of the smallest clips and times none."""

    def __init__(self):
        self.cases = []

    def pytest_collection_modifyitems(self, items):
        def small(item):
            params = item.callspec.params if hasattr(item, "callspec") else {}
            return params.get("B", 1) == 1 and params.get("T", 8) == 8 and "rows" not in params

        items[:] = [item for item in items if small(item)]

    def pytest_pyfunc_call(self, pyfuncitem):
        names = pyfuncitem._fixtureinfo.argnames
        pyfuncitem.obj(**{n: pyfuncitem.funcargs[n] for n in names} | {"measure": self.cases.append})
        return True


def worker() -> None:
    """Collect the cases of the checkout in the working directory; then time those that the parent asks for."""
    import pytest
    import torch

    capture = Capture()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    files = [f"bench/bench_{name}.py" for name in sys.argv[2:]]
    code = pytest.main(["-q", "-p", "no:cacheprovider", *files], plugins=[capture])
    if code != 0 or not capture.cases:
        sys.exit(f"op_checks: the benches did not run: {code}")
    names = [f"{c.op} {json.dumps(c.shape)} {str(c.dtype)[6:]}" for c in capture.cases]
    print("CASES " + json.dumps(names), flush=True)
    with torch.no_grad():
        for line in sys.stdin:
            run = capture.cases[int(line)].run
            run()
            times, stop = [], time.perf_counter() + SECONDS_PER_TURN
            while time.perf_counter() < stop or len(times) < 3:
                begin = time.perf_counter()
                run()
                times.append(time.perf_counter() - begin)
            print(f"TIME {min(times)} {statistics.median(times)}", flush=True)


class Worker:
    """A process that runs a file's `__worker__` among the benches of a checkout; it answers lines with lines."""

    def __init__(self, file: str, checkout: Path, arguments: Sequence[str], **environment: str):
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"} | environment
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, file, *arguments],
            cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it ended: answer says so
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def answer(self, word: str) -> str:
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise RuntimeError(f"{self.process.args} ended before it said {word}")

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


class Process(Worker):
    def __init__(self, checkout: Path, ops: Sequence[str]):
        super().__init__(__file__, checkout, ops)
        self.cases = json.loads(self.answer("CASES"))

    def time(self, name: str) -> tuple[float, float]:
        self.ask(str(self.cases.index(name)))
        return tuple(map(float, self.answer("TIME").split()))


def main() -> None:
    from pyvidx.files import write_json  # not above: a worker may be in a checkout that lacks it

    parser = argparse.ArgumentParser(prog="python -m bench.op_checks", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    times: dict[str, tuple[list, list]] = {}  # case -> (before, after), each of (least, median)
    for _ in range(options.starts):
        processes = [Process(checkout, options.ops) for checkout in (options.before, options.after)]
        both = [name for name in processes[0].cases if name in processes[1].cases]
        if not both:
            raise ValueError("op_checks: both checkouts must have some cases of the same names")
        for name in both:
            of_case = times.setdefault(name, ([], []))
            for turn in range(options.rounds):
                for i in (0, 1) if turn % 2 else (1, 0):
                    of_case[i].append(processes[i].time(name))
        for process in processes:
            process.end()
    rows = []
    for name, of_case in times.items():
        least = [min(least for least, _ in t) * 1e3 for t in of_case]
        median = [statistics.median(median for _, median in t) * 1e3 for t in of_case]
        row = {"case": name, "before_ms": least[0], "after_ms": least[1], "ratio": least[1] / least[0]}
        rows.append(row | {"ratio_of_medians": median[1] / median[0]})
        print(f"{row['ratio']:.3f} {rows[-1]['ratio_of_medians']:.3f} {least[0]:.4f} ms {name}", flush=True)
    write_json(options.out, {"rounds": options.rounds, "starts": options.starts, "threads": 1, "cases": rows}, indent=1)


if __name__ == "__main__":
    main()
elif __name__ == "__worker__":
    worker()
