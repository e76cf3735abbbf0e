"""Every vector file under PYVIDX_GOLDEN (default: data/ beside this file) against what we compute."""

import pytest

# They register themselves.
from tests.golden import (  # noqa: F401
    runners_bt_adapter,
    runners_eval,
    runners_ma_lmm,
    runners_malmm,
    runners_memory,
    runners_policies,
    runners_temporal,
)
from tests.golden.vectors import FOLDER, Check, files, matches, runner_of

FILES = files()


def cases():
    for file in FILES:
        runner = runner_of(file)
        if runner is None:
            yield pytest.param(file, None, None, id=file.name)
            continue
        for run in runner.runs(file):
            for variant in runner.variants:
                yield pytest.param(file, run, variant, id=":".join(part for part in (file.name, run, variant) if part))


@pytest.mark.parametrize("file, run, variant", list(cases()))
def test_vectors(file, run, variant):
    runner = runner_of(file)
    if runner is None:
        pytest.skip(f"{file.name}: no runner")
    check = Check({k: t for k, t in file.tensors.items() if runner.outputs(k, run)})
    runner.run(file, run, variant, check)
    lacking = [n for n in check.wanted if n not in check.seen and not matches(n, runner.may_lack)]
    assert not lacking, f"{file.name}: the runner computed nothing for {lacking}"


@pytest.mark.parametrize("file", [pytest.param(f, id=f.name) for f in FILES if (r := runner_of(f)) and r.may_lack])
def test_left_out(file):
    """Reports what of a file is not compared by anything yet."""
    runner = runner_of(file)
    covered = runner.runs(file)
    left = [
        name
        for name in file.tensors
        if name.startswith(("out.", "grad"))
        and (matches(name, runner.may_lack) or not any(runner.outputs(name, run) for run in covered))
    ]
    if left:
        pytest.skip(f"{file.name}: {len(left)} of its outputs are not compared, e.g. {left[0]}")


def test_there_are_vectors():
    assert any(runner_of(file) for file in FILES), f"no known vector file under {FOLDER}"
