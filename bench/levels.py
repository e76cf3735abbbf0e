"""Every op at every instruction set that this CPU has, side by side: python -m bench.levels --out FILE.json

A process per level (PYVIDX_ISA) walks through the same cases of the op benches, CLIP-L/14 at T = 8 and 64 and banks of
20, float32 and bfloat16, on one thread. They take turns, case by case, and each measures its op against a copy of the
same bytes and plain torch in the same rounds. A process may be slow for as long as it lives, or while another user of
the machine is busy: `--starts 3` takes the medians over three starts of all. `--before CHECKOUT v3` adds what that
level was in another checkout with a finished build; `--keep FILE` takes what is not measured, rows of other ops and
what a level was before, from an earlier result. docs/cases/levels.md is the table of the newest file
(python -m bench.pages).
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
LEVELS = ("v2", "v3", "v4", "v4bf16")
KEPT = ("ms", "copy_ms", "floor_share", "vs_eager")
# One value of each parameter of a bench, but for T and what makes another op of it.
WANTED = {"model": ("l14",), "B": (1,), "T": (8, 64), "M": (20,), "masked": (False,), "name": ("360p",), "n": (32,),
          "rows": (8,), "with_bias": (False,), "dtype": (torch.float32, torch.bfloat16)}  # fmt: skip
# Freed memory is kept, of any size: an output of new pages, one fault per 4 KiB, takes three times as long as its op.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}


class Walk:
    """A pytest plugin: measures a case each time that a line comes in, the seconds for it, and answers the result."""

    def pytest_collection_modifyitems(self, items):
        def wanted(item):
            params = item.callspec.params if hasattr(item, "callspec") else {}
            return all(params[name] in values for name, values in WANTED.items() if name in params)

        items[:] = [item for item in items if wanted(item)]

    def pytest_pyfunc_call(self, pyfuncitem):
        from bench.harness import compare

        seconds = sys.stdin.readline()
        if not seconds:
            return True  # no more is wanted; pytest takes sys.exit for a test that failed, and goes on

        def measure(case):
            with torch.no_grad():
                print("\nCASE " + json.dumps(compare(case, "cpu", float(seconds))), flush=True)

        names = pyfuncitem._fixtureinfo.argnames
        pyfuncitem.obj(**{n: pyfuncitem.funcargs[n] for n in names} | {"measure": measure})
        return True

    def pytest_sessionfinish(self):
        sys.stdin.readline()  # not before the others have measured the last case: ending takes time on their core


def worker() -> None:
    import pytest

    torch.set_num_threads(1)
    torch.manual_seed(0)
    files = [f"bench/bench_{name}.py" for name in sys.argv[2:]]
    code = pytest.main(["-q", "-s", "-p", "no:cacheprovider", "-p", "no:randomly", *files], plugins=[Walk()])
    if code != 0:
        sys.exit(f"levels: the benches did not run: {code}")
    print("\nCASE null", flush=True)


def here() -> list[str]:
    """The levels that this CPU has."""
    from pyvidx.ops import _library

    best = _library.isa()
    if best not in LEVELS:
        raise RuntimeError(f"levels: the compiled ops must run at one of {LEVELS}, got {best}")
    return list(LEVELS[: LEVELS.index(best) + 1])


def measured(columns: dict[str, tuple[Path, str]], ops: Sequence[str], seconds: float) -> Iterator[dict]:
    """A row per case: op, shape, dtype, and under "at" what each column, (checkout, level), measured.

    Raises:
        RuntimeError: a process ended early, or not all have the same cases.
    """
    from bench.op_checks import Worker

    workers = {
        name: Worker(__file__, where, ops, PYVIDX_ISA=level, **MALLOC) for name, (where, level) in columns.items()
    }
    try:
        while True:
            found = {}
            for name, worker in workers.items():
                worker.ask(str(seconds))
                found[name] = json.loads(worker.answer("CASE "))
            if not any(found.values()):
                return
            cases = [{key: info and info[key] for key in ("op", "shape", "dtype")} for info in found.values()]
            if any(case != cases[0] for case in cases):
                raise RuntimeError(f"levels: all processes must have the same cases, got {cases}")
            yield cases[0] | {"at": {name: {key: info[key] for key in KEPT} for name, info in found.items()}}
    finally:
        for worker in workers.values():
            worker.end()


def key(row: dict) -> str:
    """What a row is of."""
    return json.dumps([row["op"], row["shape"], row["dtype"]])


def median(rows: Sequence[dict]) -> dict:
    """Rows of one case, from several starts, as one."""

    def middle(column: str) -> dict[str, float]:
        return {name: statistics.median(row["at"][column][name] for row in rows) for name in KEPT}

    return rows[0] | {"at": {column: middle(column) for column in rows[0]["at"]}}


def kept(rows: Sequence[dict], earlier: Sequence[dict]) -> list[dict]:
    """The earlier rows in their order, with what `rows` have newly; then the other ones of these."""
    new = {key(row): row for row in rows}
    merged = []
    for row in earlier:
        merged.append(row | {"at": row["at"] | new.pop(key(row), row)["at"]})
    return merged + list(new.values())


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    from bench.op_checks import OPS
    from pyvidx.files import write_json

    p = argparse.ArgumentParser(prog="python -m bench.levels", description=__doc__.splitlines()[0])
    p.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP")
    p.add_argument("--seconds", type=float, default=0.5, help="time per case and level (default 0.5)")
    p.add_argument("--before", nargs=2, metavar=("CHECKOUT", "LEVEL"), help="also this level of another checkout")
    p.add_argument("--starts", type=int, default=1, help="the medians over so many starts of all processes (default 1)")
    p.add_argument("--keep", type=Path, metavar="FILE", help="an earlier result, for what is not measured now")
    p.add_argument("--cpu", default=cpu(), help="what the CPU is called in the file (default: /proc/cpuinfo's name)")
    p.add_argument("--note", default="", help="how quiet the machine was, and what before is")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="the result, JSON")
    options = p.parse_args()
    columns = {level: (ROOT, level) for level in here()}
    if options.before:
        columns["before"] = (Path(options.before[0]).resolve(), options.before[1])
    command = f"python -m bench.levels --starts {options.starts} --out FILE.json"
    about = {"cpu": options.cpu, "threads": 1, "torch": torch.__version__, "command": command}
    about |= {"note": options.note, "seconds": options.seconds, "before_level": options.before and options.before[1]}
    earlier = json.loads(options.keep.read_text()) if options.keep else {"columns": [], "rows": []}
    about["before_level"] = about["before_level"] or earlier.get("before_level")
    about["columns"] = list(columns) + [name for name in earlier["columns"] if name not in columns]
    starts: dict[str, list[dict]] = {}  # of each case
    for start in range(options.starts):
        turn = start % len(columns)  # the first process gets the best memory, up to 40 % faster: each is it in turn
        order = dict([*columns.items()][turn:] + [*columns.items()][:turn])
        for row in measured(order, options.ops, options.seconds):
            starts.setdefault(key(row), []).append(row)
            shares = [f"{name} {at['floor_share']:.2f} {at['vs_eager']:.1f}x" for name, at in row["at"].items()]
            print(row["op"], row["shape"], row["dtype"], *shares, flush=True)
        rows = kept([median(of_case) for of_case in starts.values()], earlier["rows"])
        write_json(options.out, about | {"rows": rows}, indent=1)


if __name__ == "__main__":
    main()
elif __name__ == "__worker__":
    worker()
