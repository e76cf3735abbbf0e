"""The run over a whole corpus, small, and what a larger one would take by its rates."""

import json

import pytest
import torch

from bench import corpus_run
from pyvidx.cli.plan import main as plan
from pyvidx.corpus.engines import Job
from pyvidx.corpus.rates import Rates, measure, report
from pyvidx.models import TextVideo

pytest.importorskip("av", reason="reading video needs PyAV: pip install 'pyvidx[video]'")
pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "clips"
    assert corpus_run.make(folder, 60) == {"videos": 60, "broken": 1}
    return folder


@pytest.mark.slow
def test_a_small_run(tmp_path):
    out = tmp_path / "run.json"
    corpus_run.main(["--videos", "120", "--kills", "1", "--part-rows", "20", "--every", "0.2", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["compared"]["rows"] == 120 and found["compared"]["errors"] == 1
    assert len(found["runs"]["killed"]["kills"]) == 1 and not found["runs"]["undisturbed"]["kills"]
    assert found["rates"]["videos"] == 120


def test_rates_are_those_of_the_videos(clips, tmp_path):
    paths = sorted(map(str, clips.rglob("*.mp4")))
    model = TextVideo.default().model.fold()
    rates = measure(paths[45:55], model, Job(frames=4, batch=2))
    assert (rates.videos, rates.failed, rates.device) == (10, 1, "cpu")
    assert min(rates.read, rates.preprocess, rates.encode, rates.write) > 0
    tokens = 4 * 17 * model.tower.config.width
    assert tokens < rates.size < 2 * tokens + 2000, "mostly the tokens of nine in ten"
    pooled = measure(paths[:4], model, Job(frames=4, outputs=("pooled",), dtype=torch.float16), "npz")
    assert pooled.size < rates.size / 2
    with pytest.raises(RuntimeError, match="none could be encoded"):
        measure(paths[50:51], model, Job(frames=4))
    with pytest.raises(ValueError, match="there must be a video"):
        measure([], model, Job())


def test_a_million_is_arithmetic():
    rates = Rates(100, 1, read=2e-3, preprocess=1e-3, encode=0.6e-3, write=0, size=1000.0, device="cpu")
    said = report(rates, 1e6, cores=2)
    assert "1e+06 videos: 1.0 core hours" in said and "PREDICTED: 0.5 hours on 2 cores" in said
    assert "reading takes 56%" in said and "--workers 1" in said and "store: 1.00 GB" in said
    rates = Rates(100, 0, read=36e-3, preprocess=1e-3, encode=2.6e-3, write=0, size=1.0, device="cuda")
    said = report(rates, 1e6, cores=2, devices=1)
    assert "10.0 core hours and 1.0 hours of a cuda device" in said
    assert "PREDICTED: 5.0 hours on 2 cores and 1 devices" in said and "10.0 cores keep up with 1 devices" in said


def test_the_plan(clips, tmp_path, capsys):
    kept = str(tmp_path / "rates.json")
    given = ["encode", str(clips), "--videos", "3e6", "--frames", "4", "--most", "6", "--cores", "4", "--json", kept]
    assert plan(given) == 0
    said = capsys.readouterr().out
    assert "measured on 6 videos" in said and "3e+06 videos" in said and "on 4 cores" in said
    assert plan(["encode", "--rates", kept, "--videos", "3e6", "--cores", "4"]) == 0
    assert capsys.readouterr().out == said
    for wrong in ({"read": 0.0}, {"read": float("inf")}, {"videos": 0}):
        with pytest.raises(ValueError, match="Rates: "):
            Rates(**{"videos": 1, "failed": 0, "read": 1.0, "preprocess": 0.0, "encode": 0.0, "write": 0.0,
                     "size": 1.0, "device": "cpu"} | wrong)  # fmt: skip
    (tmp_path / "bad.json").write_text('{"rates": {"videos": 0}}')
    for wrong, message in (
        (["encode"], "there must be videos to measure on, or --rates"),
        (["encode", str(clips), "--rates", kept], "one of the two"),
        (["encode", "--rates", str(tmp_path / "bad.json")], "must hold rates as bench.corpus_run writes them"),
        (["encode", "none.mp4"], "there is no none.mp4"),
    ):
        with pytest.raises(SystemExit) as stop:
            plan(wrong)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and message in said and said.count("\n") == 1
