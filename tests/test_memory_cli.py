"""pyvidx memory: a video in, a picture of its slots out."""

from pathlib import Path

import pytest
import torch

from pyvidx import memory
from pyvidx.cli.memory import colors, main
from pyvidx.video import stream, write
from tests.drawn import drawn_clip

pytest.importorskip("av", reason="reading video needs PyAV: pip install 'pyvidx[video]'")

CASES = Path(__file__).parent / "cases/video"


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Three scenes of 15 frames, 25 per second."""
    path = tmp_path_factory.mktemp("memory") / "scenes.mp4"
    write(path, drawn_clip(0.6, (96, 128)), fps=25)
    return path


def test_colors_are_means_of_cells():
    frames = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    rows = colors(frames)
    assert rows.shape == (2, 16, 8 * 8 * 3)
    cell = frames[1, 16:32, 48:72].float() / 255 - 0.5  # row 1, column 2 of the 4 x 4 positions, 2 x 3 pixels per mean
    want = cell.reshape(8, 2, 8, 3, 3).mean((1, 3))
    torch.testing.assert_close(rows[1, 6], want.flatten())


def test_slots_find_the_scenes(video, tmp_path, capsys):
    out, saved = tmp_path / "new/slots.png", tmp_path / "bank.safetensors"
    arguments = [str(video), "--policy", "merge:unit=frame", "--capacity", "3", "--out", str(out), "--save", str(saved)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "45 frames, policy merge (capacity 3, weighted True, unit frame), features: colors" in text
    assert out.read_bytes().startswith(b"\x89PNG")
    policy, bank = memory.load(saved)
    assert policy == memory.create("merge", capacity=3, unit="frame")
    assert bank.entries().sizes[0, :, 0].tolist() == [15, 15, 15]
    assert [round(s * 25) for s in bank.entries().first[0, :, 0].tolist()] == [0, 15, 30]
    rows = torch.cat([colors(clip.frames) for clip in stream(video)])
    torch.testing.assert_close(bank.entries().rows[0, 1], rows[15:30].mean(0))


@pytest.mark.parametrize("options, sizes", [
    (["--policy", "fifo", "--capacity", "4", "--anchors", "1"], 4),
    (["--policy", "tome:axis=space"], 45),
    (["--policy", "moviechat"], 45),
    (["--policy", "flash_vstream", "--capacity", "70"], 45),
    (["--policy", "average", "--fps", "5", "--features", "model", "--position", "3"], 9),
])  # fmt: skip
def test_options(video, tmp_path, options, sizes, capsys):
    assert (
        main([str(video), *options, "--out", str(tmp_path / "a.png"), "--save", str(tmp_path / "a.safetensors")]) == 0
    )
    text = capsys.readouterr()
    assert ("moving shapes" in text.err) == ("model" in options)
    sizes_found = memory.load(tmp_path / "a.safetensors")[1].entries().sizes
    assert sizes_found.sum() == sizes * sizes_found.shape[2] if "tome:axis=space" not in options else 45 * 16


@pytest.mark.parametrize("arguments, message", [
    (["nothing.mp4"], "there is no nothing.mp4"),
    (["VIDEO", "--policy", "average", "--capacity", "3"], "options do not fit 'average'"),
    (["VIDEO", "--policy", "fifo:unit=frame"], "options do not fit 'fifo'"),
    (["VIDEO", "--capacity", "0"], "at least 1"),
    (["VIDEO", "--position", "16"], "position must be in"),
    (["https://example.org/a.mp4"], "and give its path"),
    (["VIDEO", "--fps", "0"], "--fps: must be above 0"),
    (["VIDEO", "--save", "bank.pt"], "--save must end in .safetensors"),
    (["VIDEO", "--save", "VIDEO"], "--save must end in .safetensors"),
    (["VIDEO", "--model", "nobody/nothing"], "pyvidx downloads nothing"),
    (["."], "must hold frames"),
])  # fmt: skip
def test_bad_arguments(video, tmp_path, arguments, message, capsys):
    arguments = [str(video) if a == "VIDEO" else a for a in arguments]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out", str(tmp_path / "a.png")])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_file_that_is_no_video(tmp_path, capsys):
    (tmp_path / "broken.mp4").write_bytes(b"this is not a video" * 100)
    assert main([str(tmp_path / "broken.mp4")]) == 1
    assert "FAILED" in capsys.readouterr().err


def test_a_picture_that_exists_is_kept_unless_told(video, tmp_path, capsys):
    out = tmp_path / "kept.png"
    out.write_bytes(b"mine")
    with pytest.raises(SystemExit) as stop:
        main([str(video), "--out", str(out)])
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err and out.read_bytes() == b"mine"
    assert main([str(video), "--out", str(out), "--overwrite"]) == 0 and out.read_bytes().startswith(b"\x89PNG")


def test_damage_is_told_and_the_rest_is_watched(tmp_path, capsys):
    with pytest.warns(UserWarning, match="is damaged"):
        assert main([str(CASES / "damaged_middle.mp4"), "--out", str(tmp_path / "a.png")]) == 0
    assert "51 frames" in capsys.readouterr().out
    assert main([str(CASES / "h264_in.avi"), "--out", str(tmp_path / "b.png")]) == 0
    assert "60 frames" in capsys.readouterr().out
