"""Options and the `measure` fixture of the benches: python -m pytest bench --benchmark-json=out.json"""

import json
from pathlib import Path

import pytest
import torch

from bench.harness import Case, Timer, compare


def pytest_addoption(parser):
    group = parser.getgroup("pyvidx benches")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    group.addoption(
        "--threads",
        type=int,
        default=1,
        help="CPU threads (default 1: a contended second core makes each parallel region cost milliseconds)",
    )
    group.addoption("--seconds", type=float, default=1.0, help="time per case, all contenders together")
    group.addoption(
        "--smallest", action="store_true", help="only the first case of every bench, once: does it still run?"
    )
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out")
    group.addoption("--lines", type=Path, metavar="FILE", help="append each case to this JSON-lines file once measured")


def pytest_collection_modifyitems(config, items):
    """--smallest keeps the first case of every bench function."""
    if not config.getoption("--smallest"):
        return
    first = {(item.path, item.originalname): item for item in reversed(items)}
    items[:] = [item for item in items if item in first.values()]


@pytest.fixture
def device(request):
    return request.config.getoption("--device")


@pytest.fixture
def measure(request, benchmark, device):
    """measure(case): compare the contenders, then let pytest-benchmark time ours on its own."""

    def run(case: Case):
        option = request.config.getoption
        smallest = option("--smallest")
        torch.set_num_threads(option("--threads"))
        with torch.no_grad():
            info = compare(
                case,
                device,
                0.0 if smallest else option("--seconds"),
                with_compile=not (smallest or option("--no-compile")),
            )
            if option("--lines") is not None:
                with option("--lines").open("a") as file:
                    file.write(json.dumps({"case": request.node.nodeid, **info}) + "\n")
            timer = Timer(device)
            benchmark.pedantic(timer, args=(case.run,), rounds=1 if smallest else 10, warmup_rounds=1)
        benchmark.group = case.op
        benchmark.extra_info.update(info)

    return run
