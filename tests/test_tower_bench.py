"""The benches of whole towers at the smallest size, with what is installed."""

import pytest
import torch

from bench import towers
from bench.towers import Contender

SLOW = ("transformers, torch.compile", "official, torch.compile", "openvino, int8")  # a minute each


@pytest.mark.parametrize("kind, public", [("frames", "transformers"), ("bt_adapter", "official")])
def test_towers(kind, public):
    pytest.importorskip("transformers")
    case = towers.measure(kind, "tiny", 2, 1, 2, SLOW, report=lambda text: None)
    rows = {row["name"]: row for row in case["contenders"]}
    assert rows["pyvidx"]["ratio"] == 1 and rows["pyvidx"]["difference"] == 0
    assert 0 < rows[public]["difference"] < 1e-5
    assert all(row["least_ms"] <= row["ms"] and row["cosine"] > 0.99 for row in rows.values())
    # Each has run, or it is said why not.
    assert {"openvino", "onnxruntime", "onnxruntime, int8"} <= rows.keys() | case["absent"].keys()


def test_a_contender_must_give_what_pyvidx_gives():
    right, wrong = torch.ones(1, 4), torch.ones(1, 4) * 1.1

    def absent():
        raise ImportError("No module named 'other'")

    made = [Contender("other", absent, None), Contender("public", lambda: lambda: right, lambda: right)]
    runs, differences, left_out = towers.prepare(made, lambda text: None)
    assert list(runs) == ["public"] and differences["public"]["difference"] == 0
    assert left_out == {"other": "No module named 'other'"}
    coarse = Contender("library, int8", lambda: lambda: wrong, lambda: right)
    assert towers.prepare([coarse], lambda text: None)[1]["library, int8"]["difference"] == pytest.approx(0.1)
    with pytest.raises(RuntimeError, match="library must give what pyvidx gives, got a difference of 0.1"):
        towers.prepare([coarse._replace(name="library")], lambda text: None)


def test_turns():
    """Every contender runs as often as the others, none always after the same one."""
    seen = []
    times = towers.rounds({name: lambda name=name: seen.append(name) for name in "abc"}, 3)
    assert seen == list("abcbcacab") and all(len(t) == 3 for t in times.values())
