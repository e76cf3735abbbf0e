"""The study on moving shapes, small: all rows train, are tested and reported; what is done is not done again."""

import json

import pytest
import torch

from bench import motion_study
from bench.motion import clip as tiny
from bench.motion import temporal, world
from bench.motion.rows import ROWS
from pyvidx.data import motion
from pyvidx.models import TextVideo

pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install 'pyvidx[cli]'")


def study(out, *options):
    return motion_study.main(["--out", str(out), "--small", "--seeds", "2", "--workers", "1", *options])


def test_the_study(tmp_path, capsys, monkeypatch):
    assert study(tmp_path, "--rows", "BT-Adapter, 4") == 0
    again = capsys.readouterr().out
    assert "BT-Adapter, 4 frames, seed 1" in again
    found = json.loads((tmp_path / "study.json").read_text())
    assert [r["seed"] for r in found["runs"]] == [0, 1] and found["runs"][0]["sha256"] != found["runs"][1]["sha256"]
    assert found["runs"][0]["test"]["events"] == 14 and len(found["clip"]["sha256"]) == 64
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    with monkeypatch.context() as patch:
        patch.setattr(motion_study, "run", None)  # nothing is left to be run
        assert study(tmp_path, "--rows", "BT-Adapter, 4") == 0
    path = tmp_path / "shipped.safetensors"
    assert study(tmp_path, "--rows", "no mask", "--ship", str(path)) == 0
    shipped = TextVideo.load(path)
    assert shipped.about["row"] == "BT-Adapter, no mask" and shipped.about["frames"] == 8
    with pytest.raises(SystemExit, match="must hold runs of the same plan"):
        motion_study.main(["--out", str(tmp_path)])
    first = next((tmp_path / "work/runs").glob("*4-frames-0.json"))
    before = json.loads(first.read_text())
    first.unlink()
    assert study(tmp_path, "--rows", "BT-Adapter, 4") == 0
    assert json.loads(first.read_text())["sha256"] == before["sha256"], "a run repeats to the bit on one machine"
    assert "| BT-Adapter, 4 frames |" in (tmp_path / "table.md").read_text()


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return tiny.TinyCLIP().eval().requires_grad_(False)


@pytest.mark.parametrize("row", [r for r in ROWS if r.frames == 8], ids=lambda r: r.name)
def test_a_row_trains_what_it_says(clip, row):
    clips = world.seen_by(clip, motion.random_scenes(8, 1), 2, motion_study.LAYERS)
    before = {name: p.clone() for name, p in clip.named_parameters()}
    trained, encode = temporal.train(clip, clips, row, motion_study.SMALL.recipe, seed=0)
    assert all(torch.equal(p, before[name]) for name, p in clip.named_parameters()), "the CLIP itself is never touched"
    tower = next(m for name, m in trained.named_modules() if name.split(".")[-1] in ("tower", "backbone", "vision"))
    moved = any(not torch.equal(p, before[f"vision.{name}"]) for name, p in tower.named_parameters())
    assert moved == row.tower
    rows, back = torch.arange(4), torch.zeros(4, dtype=torch.bool)
    with torch.no_grad():
        assert encode(*clips.batch(rows, back)).shape == (4, tiny.VISION.embed_dim)


def test_a_mean_of_frames_is_at_chance(clip):
    gallery = temporal.Gallery.of(clip, motion.HELD_OUT, 3, 4, [4, 5], {"singles": 6, "pairs": 2, "looks": 4})
    *_, encode = temporal.build(clip, ROWS[0])
    found = gallery.scores(encode)
    assert ROWS[0].name == "frame mean" and found["pair"] == 50 and set(found["kinds"].values()) == {50}


def test_recall_shares_ties():
    similarity = torch.tensor([[0.9, 0.9, 0.1], [0.2, 0.5, 0.6], [0.1, 0.1, 0.3]])
    assert world.recall(similarity, torch.arange(3)) == pytest.approx(50)  # a half, nothing and one of three
    scores = world.scores(
        torch.eye(4).view(2, 2, 4), torch.eye(4).view(2, 2, 4), ["size", "turn"], torch.eye(3), torch.eye(3)
    )
    assert scores["time"] == scores["pair"] == scores["appearance"] == 100
    assert scores["kinds"] == {"size": 100, "turn": 100}


def test_galleries_have_one_of_each_caption():
    events = world.event_gallery(motion.HELD_OUT, 1, 60, 40)
    captions = [motion.caption(x) for s in events for x in (s, motion.opposite(s))]
    assert len(set(captions)) == len(captions) == 2 * (52 + 3 * 40)
    looks = [motion.appearance(s) for s in world.look_gallery(motion.HELD_OUT, 1, 48, 48)]
    assert len(set(looks)) == len(looks) == 96


def test_events_are_photographed_late():
    frames, captions = tiny.stills(40, seed=0)
    assert frames.shape == (120, 32, 32, 3) and len(captions) == 120
    left = [f for f, c in zip(frames, captions) if c.endswith("moves left")]
    right = [f for f, c in zip(frames, captions) if c.endswith("moves right")]
    assert left and right

    def side(f):  # where it is lighter: -1 left, 1 right
        light = (f.float() - f[0, 0].float()).norm(dim=-1).sum(0)
        return torch.sign(light[16:].sum() - light[:16].sum())

    assert sum(map(side, left)) / len(left) < -0.4 and sum(map(side, right)) / len(right) > 0.4
