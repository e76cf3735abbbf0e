"""encode_videos: one video's trouble is that video's error, whatever else is in its batch."""

import os

import pytest
import torch

from pyvidx.corpus.encode import Timing, encode_videos
from pyvidx.models import TextVideo
from pyvidx.video import Decoders, write
from pyvidx.video.pool import shared
from tests import decoding
from tests.drawn import drawn_clip

pytest.importorskip("av", reason="reading video needs PyAV: pip install 'pyvidx[video]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """v.mp4 of 45 frames; long.mp4 of 60; dark.mp4."""
    folder = tmp_path_factory.mktemp("videos")
    write(folder / "v.mp4", drawn_clip(0.6, (64, 96)), fps=25)
    write(folder / "long.mp4", drawn_clip(0.8, (64, 96)), fps=25)
    write(folder / "dark.mp4", torch.zeros(45, 64, 96, 3, dtype=torch.uint8), fps=25)
    return folder


@pytest.fixture
def model():
    return TextVideo.default().model.fold()


def of(folder, *names):
    return [str(folder / f"{name}.mp4") for name in names]


def test_a_decoder_that_dies_costs_its_video(folder, model):
    paths, timing = of(folder, "v", "long", "dark", "long", "v"), Timing()
    found = list(
        encode_videos(paths, model, frames=4, sampler=decoding.abort_if_long, batch=2, workers=2, timing=timing)
    )
    assert [one.path for one in found] == paths, "also where a path comes twice"
    for one in found:
        died = "long" in one.path
        assert (one.encoding is None) == died and ("SIGABRT" in str(one.error)) == died
    assert torch.equal(found[0].encoding.pooled, found[4].encoding.pooled)
    assert (timing.videos, timing.failed, timing.frames) == (3, 2, 12) and timing.parts["read"] > 0


def test_a_timeout_is_given_with_ones_own_decoders(folder, model):
    with Decoders(timeout=1) as decoders:
        paths = of(folder, "long", "v")
        found = list(encode_videos(paths, model, frames=4, sampler=decoding.hang_if_long, decoders=decoders))
    assert "takes longer than 1 s" in found[0].error and found[1].error is None


class Fussy(torch.nn.Module):
    """A model that fails on batches with a dark video, or gives NaN for it."""

    def __init__(self, model, nan):
        super().__init__()
        self.model, self.config, self.nan = model, model.config, nan

    def forward(self, pixels, **options):
        dark = (pixels == pixels[:, :1, :, :1, :1]).flatten(1).all(1)
        if dark.any() and not self.nan:
            raise IndexError("too dark")
        found = self.model(pixels, **options)
        found.pooled[dark] = float("nan")
        return found


@pytest.mark.parametrize("nan, said", [
    (True, "RuntimeError: encode_videos: pooled must be finite, got NaN or Inf"), (False, "IndexError: too dark"),
])  # fmt: skip
def test_a_video_that_the_model_cannot_take_costs_no_other(folder, model, nan, said):
    paths = of(folder, "v", "dark", "v", "v")
    want = next(encode_videos(paths, model, frames=4)).encoding.pooled
    found = list(encode_videos(paths, Fussy(model, nan), frames=4, batch=3))
    assert [one.path for one in found] == paths
    assert [one.error is None for one in found] == [True, False, True, True] and said in found[1].error
    for one in found[:1] + found[2:]:
        torch.testing.assert_close(one.encoding.pooled, want, rtol=1e-4, atol=1e-5)


def test_weights_that_are_not_finite_are_an_error_of_every_video(folder, model):
    with torch.no_grad():
        next(p for p in model.parameters() if p.dim() > 1)[0] = float("nan")
    found = list(encode_videos(of(folder, "v", "dark"), model, frames=4, batch=2))
    assert all(one.encoding is None and "must be finite, got NaN or Inf: the weights" in one.error for one in found)


def test_what_a_file_lacks_is_told(folder, model, tmp_path):
    write(tmp_path / "cut.mkv", drawn_clip(0.6, (64, 96)), fps=25)
    os.truncate(tmp_path / "cut.mkv", (tmp_path / "cut.mkv").stat().st_size * 6 // 10)
    with pytest.warns(UserWarning, match="cut.mkv is damaged: cut before its end"):
        cut, whole = encode_videos([str(tmp_path / "cut.mkv"), *of(folder, "v")], model, frames=4, batch=2)
    assert cut.error is None and cut.damaged.cut and not whole.damaged


def test_a_name_that_is_not_utf8_is_a_name(folder, model):
    path = os.fsdecode(os.fsencode(folder) + b"/\xff.mp4")
    os.link(folder / "v.mp4", path)
    (one,) = encode_videos([path], model, frames=4, reader="pyav")
    assert one.path == path and (one.error is None or "surrogates" in one.error)


def test_arguments_are_refused_at_once(folder, model):
    for wrong in ({"batch": 0}, {"workers": 0}):
        with pytest.raises(ValueError, match="batch and workers must be at least 1"):
            encode_videos([], model, **wrong)
    with pytest.raises(ValueError, match="preset must be one of"):
        encode_videos([], model, preset="none")
    assert list(encode_videos([], model)) == []


def test_calls_share_the_processes(folder, model):
    before = shared()._idle[-1].process.pid
    for _ in range(2):
        list(encode_videos(of(folder, "v"), model, frames=4))
    assert shared()._idle[-1].process.pid == before
