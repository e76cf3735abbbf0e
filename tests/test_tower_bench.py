"""The benches of whole towers at the smallest size, with what is installed."""

import json
import sys

import pytest
import torch

from bench import files_to_embeddings, towers
from bench.towers import Contender

SLOW = ("transformers, torch.compile", "official, torch.compile", "openvino", "openvino, int8")  # to get ready
KINDS = pytest.mark.parametrize("kind, public", [("frames", "transformers"), ("bt_adapter", "official")])


def measured(kind, public, without):
    pytest.importorskip("transformers")
    case = towers.measure(kind, "tiny", 2, 1, 2, without, report=lambda text: None)
    rows = {row["name"]: row for row in case["contenders"]}
    assert rows["pyvidx"]["ratio"] == 1 and rows["pyvidx"]["difference"] == 0
    assert 0 < rows[public]["difference"] < 1e-5
    assert all(row["least_ms"] <= row["ms"] and row["cosine"] > 0.99 for row in rows.values())
    return rows.keys() | case["absent"].keys()


@KINDS
def test_towers(kind, public):
    """Each has run, or it is said why not."""
    assert measured(kind, public, SLOW) >= {"onnxruntime", "onnxruntime, int8"}


@pytest.mark.slow
@KINDS
def test_every_contender(kind, public):
    assert measured(kind, public, ()) >= {f"{public}, torch.compile", "openvino", "openvino, int8"}


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


def test_files_to_embeddings(tmp_path, monkeypatch):
    """Both give one embedding of a clip, and both are timed."""
    pytest.importorskip("decord")
    pytest.importorskip("transformers")
    out = tmp_path / "found.json"
    options = "--sizes tiny --cores 1 --clips 1 --seconds 0.4 --rounds 1"
    monkeypatch.setattr(sys, "argv", ["files_to_embeddings", "--out", str(out), *options.split()])
    files_to_embeddings.main()
    rows = json.loads(out.read_text())["results"]
    names = ["pyvidx", "pyvidx, int8", "script"]
    assert [(row["height"], row["name"]) for row in rows] == [(h, name) for h in (360, 720) for name in names]
    assert all(row["wall_gain"] == 1 for row in rows[2::3])
    assert all(row["cosine"] > 0.999 and row["cpu_gain"] > 0 for row in rows)
