"""No op has lost more than a quarter of its gain over plain torch; and the guard that says so would say it."""

import pytest

from bench import guard
from pyvidx.ops._library import REFERENCES


def test_no_op_has_become_slower():
    known = guard.committed()
    if known is None:
        pytest.skip(f"no gain is committed for {guard.machine()}: python -m bench.guard --write")
    assert not guard.lost(known), "what each op keeps of its gain, in the best of three processes"


def test_every_op_is_guarded():
    wanted = {name for name in REFERENCES if not name.endswith("_out")}  # the same kernel, another output
    assert {name.split(" ")[0] for name in guard.calls()} == wanted


def measured(*tries):
    """Stands for guard.gains: these gains, one try after another, of the names that it is asked for."""
    left = iter(tries)
    return lambda names: {n: gain for n, gain in next(left).items() if names is None or n in names}


def test_slow_once_is_not_slow():
    tries = measured({"a": 4.0, "b": 1.0}, {"a": 4.0, "b": 1.6})
    assert guard.lost({"a": 4.0, "b": 2.0}, tries) == {}


def test_slow_three_times_is_slow():
    tries = measured({"a": 4.0, "b": 1.0}, {"b": 1.4}, {"b": 1.2})
    assert guard.lost({"a": 4.0, "b": 2.0}, tries) == {"b": 0.7}


def test_a_new_op_needs_a_gain():
    with pytest.raises(ValueError, match=r"got \['b'\]"):
        guard.lost({"a": 4.0}, measured({"a": 4.0, "b": 1.0}))
