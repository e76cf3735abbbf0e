"""The main job: pyvidx encode, from files to files."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import pyvidx
from pyvidx.__main__ import main as pyvidx_main
from pyvidx.cli.demo import main as demo
from pyvidx.cli.encode import main as encode
from pyvidx.corpus.encode import Timing, encode_videos
from pyvidx.models import TextVideo
from pyvidx.preprocess import clip_preprocess
from pyvidx.video import read, write
from tests.drawn import drawn_clip

pytest.importorskip("av", reason="reading video needs PyAV: pip install 'pyvidx[video]'")
SIDES = ("left", "right")
pyarrow_parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two clips, one file that is no video, in a folder."""
    folder = tmp_path_factory.mktemp("videos")
    write(folder / "a.mp4", drawn_clip(0.6, (96, 128)), fps=25)
    write(folder / "b.mp4", drawn_clip(0.4, (120, 90)), fps=10)
    (folder / "broken.mp4").write_bytes(b"this is not a video" * 100)
    return folder


def test_embeddings_are_those_of_the_model(videos):
    model = TextVideo.default().model
    (result,) = encode_videos([str(videos / "a.mp4")], model, frames=6)
    clip = read(videos / "a.mp4", frames=6)
    with torch.inference_mode():
        want = model(clip_preprocess(clip.frames, model.config.vision.image_size)[None])
    torch.testing.assert_close(result.encoding.pooled, want.pooled)
    torch.testing.assert_close(result.encoding.tokens, want.tokens)
    assert torch.equal(result.seconds, clip.seconds)


@pytest.mark.parametrize("batch, workers", [(1, 1), (2, 2), (3, 1)])
def test_batches_and_failures(videos, batch, workers):
    paths = [str(videos / name) for name in ("a.mp4", "broken.mp4", "b.mp4", "missing.mp4", "a.mp4")]
    model, timing = TextVideo.default().model, Timing()
    alone = {p: next(iter(encode_videos([p], model, frames=4))) for p in set(paths)}
    results = list(encode_videos(paths, model, frames=4, batch=batch, workers=workers, timing=timing))
    assert [r.path for r in results] == paths
    for r in results:
        if r.error is None:
            torch.testing.assert_close(r.encoding.pooled, alone[r.path].encoding.pooled, rtol=1e-4, atol=1e-5)
        else:
            assert r.encoding is None
    assert "missing.mp4" in results[3].error and results[1].error and timing.failed == 2
    assert timing.videos == 3 and timing.frames == 12 and timing.wall > 0


def test_too_many_frames_is_an_error_of_the_file(videos):
    (result,) = encode_videos([str(videos / "a.mp4")], TextVideo.default().model, frames=200, sampler="linspace")
    assert result.encoding is None and "ValueError" in result.error


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "parquet"])
def test_files(videos, suffix, tmp_path, capsys):
    out = tmp_path / f"new/out.{suffix}"
    code = encode([str(videos), "--frames", "4", "--out", str(out)])
    text = capsys.readouterr()
    assert code == 1, "a file failed"
    assert "broken.mp4" in text.err and "small world of moving shapes" in text.err
    assert "2 videos, 1 FAILED, 8 frames" in text.out and "frames/s (read" in text.out
    (want,) = encode_videos([str(videos / "a.mp4")], TextVideo.default().model.fold(), frames=4)
    if suffix == "safetensors":
        arrays = load_file(out)
        with safe_open(out, "pt") as file:
            note = json.loads(file.metadata()["pyvidx"])
        paths, pooled, tokens = note["paths"], arrays["pooled"][0], arrays["tokens"][0]
        assert note["about"]["is_random"] is False and list(note["errors"]) == [str(videos / "broken.mp4")]
    elif suffix == "npz":
        arrays = np.load(out)
        paths, pooled, tokens = (
            list(arrays["paths"]),
            torch.tensor(arrays["pooled"][0]),
            torch.tensor(arrays["tokens"][0]),
        )
    else:
        rows = pyarrow_parquet.read_table(out).to_pylist()
        paths = [row["path"] for row in rows if row["error"] is None]
        pooled = torch.tensor(rows[0]["pooled"])
        tokens = torch.tensor(rows[0]["tokens"]).reshape(rows[0]["tokens_shape"])
        assert [row["path"] for row in rows if row["error"]] == [str(videos / "broken.mp4")]
    assert paths == [str(videos / "a.mp4"), str(videos / "b.mp4")]
    torch.testing.assert_close(pooled, want.encoding.pooled[0])
    torch.testing.assert_close(tokens, want.encoding.tokens[0])


def test_saved_model(videos, tmp_path, capsys):
    model = TextVideo.default().model
    for is_random in (False, True):
        model.is_random = is_random
        model.save(tmp_path / "model")
        given = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out.npz"), "--overwrite"]
        assert encode([str(videos / "a.mp4"), *given]) == 0
        assert ("NOTE: these weights were never trained" in capsys.readouterr().err) == is_random


@pytest.mark.parametrize("arguments, message", [
    (["nothing.mp4", "--out", "x.csv"], "must end in"),
    (["nothing.mp4", "--model", "no/such/model"], "there is no"),
    (["nothing.mp4", "--sampler", "nearest"], "invalid choice"),
])  # fmt: skip
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        encode(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_empty_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        encode([str(tmp_path)])
    assert "no video files" in capsys.readouterr().err


def test_demo(tmp_path, capsys):
    assert demo(["--out", str(tmp_path), "--frames", "6", "--size", "tiny", "--speed-frames", "4"]) == 0
    text = capsys.readouterr().out
    assert "embedding: pooled (1, " in text and "largest difference" in text
    own, opposite = (next(l for l in text.splitlines() if l.startswith(f"the green cross moves {w}")) for w in SIDES)
    places = [re.findall(r"\((\d)\)", l) for l in (own, opposite)]
    assert places[0][0] == "1" and places[1][1] == "1", "BT-Adapter ranks the right one first, forward and backward"
    shown = [re.findall(r"-?\d\.\d+", l)[2:] for l in (own, opposite)]
    assert all(abs(float(a) - float(b)) < 0.02 for a, b in shown), "to the frame mean both clips are one"
    assert (tmp_path / "similarity.png").read_bytes().startswith(b"\x89PNG")
    assert len(read(tmp_path / "clip.mp4", frames=3)) == 3


def test_commands(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pyvidx", "nonsense"])
    assert pyvidx_main() == 2 and "encode" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["pyvidx", "info"])
    assert pyvidx_main() == 0 and "token_gather" in capsys.readouterr().out


def test_public_names():
    assert all(getattr(pyvidx, name) is not None for name in pyvidx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pyvidx.nonsense
