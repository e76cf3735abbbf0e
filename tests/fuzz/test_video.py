"""A small fixed sample of tests.fuzz.video, whose full run is in results/."""

import pytest

from tests.fuzz.video import BAD, run

pytest.importorskip("av", reason="needs PyAV (pyvidx[video])")

NAMES = ["h264.mp4", "h264_first.mp4", "h264.mkv", "vp9.webm", "mjpeg.avi", "h264.ts", "colors.gif"]


@pytest.mark.parametrize("files", [25, pytest.param(400, marks=pytest.mark.slow)])
def test_damaged_videos_are_read_told_or_refused(tmp_path, files):
    result = run(files, seed=7, folder=tmp_path, names=NAMES)
    # What another FFmpeg thinks of a file depends on its version; the full run counts that.
    assert not {kind: n for kind, n in result["bad"].items() if n and kind != "damage not told"}, result["bad files"]
    assert sum(n for what, n in result["outcomes"].items() if what.startswith("all: damaged")) >= files // 4
    assert set(result["bad"]) == set(BAD)
