"""The world of moving shapes: the same for a seed, with opposites that only the order of frames tells apart."""

import pytest
import torch

from pyvidx.backbones.words import Words
from pyvidx.data import motion


def one(kind: str, seed: int = 3) -> motion.Scene:
    return motion.random_scenes(1, seed, kinds=[kind])[0]


def test_scenes_are_the_same_for_a_seed():
    a, b = motion.random_scenes(20, 5), motion.random_scenes(20, 5)
    assert a == b and a != motion.random_scenes(20, 6) and a[:7] == motion.random_scenes(7, 5)
    assert torch.equal(motion.render(a[0], 4, 24), motion.render(b[0], 4, 24))
    assert {o for s in motion.random_scenes(500, 1) for o in s.objects} == set(motion.SEEN)


@pytest.mark.parametrize("kind", motion.KINDS)
@pytest.mark.parametrize("T, size", [(8, 32), (5, 31), (1, 16), (4, (24, 40))])
def test_an_opposite_is_the_same_frames_backwards(kind, T, size):
    scene = one(kind)
    frames, back = motion.render(scene, T, size), motion.render(motion.opposite(scene), T, size)
    assert frames.dtype == torch.uint8 and frames.shape == (T, *((size, size) if isinstance(size, int) else size), 3)
    assert torch.equal(back, frames.flip(0)), "so any mean over frames is equal too"
    if T > 1:
        assert not torch.equal(back, frames), "something happens"
    assert motion.opposite(motion.opposite(scene)) == scene
    assert motion.appearance(scene) == motion.appearance(motion.opposite(scene))
    assert motion.caption(scene) != motion.caption(motion.opposite(scene))
    ours, theirs = motion.caption(scene).split(), motion.caption(motion.opposite(scene)).split()
    assert len(ours) == len(theirs)


def center(frames, color):  # [T, H, W, 3] -> [T, 2], mean (x, y) of the pixels near a color
    near = (frames.float() - torch.tensor(motion.COLORS[color])).norm(dim=-1) < 60  # [T, H, W]
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in near.shape[1:]), indexing="ij")[::-1], -1)
    return torch.stack([grid[n].float().mean(0) for n in near])


def scene_of(kind, *objects, forward=True):
    return motion.Scene(kind, objects, "black", forward, seed=11)


def test_captions_say_what_the_frames_show():
    red, blue = ("red", "circle"), ("blue", "square")
    for kind, axis in (("horizontal", 0), ("vertical", 1)):
        for forward, word in ((True, ("right", "down")), (False, ("left", "up"))):
            scene = scene_of(kind, red, forward=forward)
            path = center(motion.render(scene, 6, 48), "red")[:, axis]
            assert ((path.diff() > 0) == forward).all() and motion.caption(
                scene
            ) == f"the red circle moves {word[axis]}"
    tip = center(motion.render(scene_of("turn", ("red", "triangle")), 6, 64), "red")
    assert tip[0, 0] > tip[-1, 0], "its mass is opposite the tip, which turns from left to right over the top"
    area = [(f.float().sum(-1) > 150).sum() for f in motion.render(scene_of("size", red), 6, 48)]
    assert area == sorted(area) and area[0] < area[-1]
    light = motion.render(scene_of("presence", red), 6, 48).float().mean(dim=(1, 2, 3))
    assert (light.diff() > 0).all()
    first, *_, last = motion.render(scene_of("order", red, blue, forward=False), 4, 48)
    assert motion.caption(scene_of("order", red, blue, forward=False)) == "the blue square comes before the red circle"
    assert center(first[None], "blue").isfinite().all() and center(last[None], "red").isfinite().all()
    assert center(first[None], "red").isnan().all()
    swap = motion.render(scene_of("swap", red, blue), 6, 48)
    gap = (center(swap, "red") - center(swap, "blue"))[:, 0]
    assert gap[0] < 0 < gap[-1] and "red circle swaps to the right of" in motion.caption(scene_of("swap", red, blue))
    follow = motion.render(scene_of("follow", red, blue), 6, 64)
    ahead, step = center(follow, "blue") - center(follow, "red"), center(follow, "red").diff(dim=0).mean(0)
    assert (ahead @ step > 0).all() and motion.caption(scene_of("follow", red, blue)).startswith(
        "the red circle follows"
    )


def test_held_out_objects_have_no_new_word():
    assert not set(motion.HELD_OUT) & set(motion.SEEN) and set(motion.HELD_OUT) | set(motion.SEEN) == set(
        motion.OBJECTS
    )
    for part in (motion.HELD_OUT, motion.SEEN):
        assert {c for c, _ in part} == set(motion.COLORS) and {s for _, s in part} == set(motion.SHAPES)


@pytest.mark.parametrize("make", [
    lambda: scene_of("flies", ("red", "circle")),
    lambda: scene_of("swap", ("red", "circle")),
    lambda: scene_of("horizontal", ("pink", "circle")),
    lambda: scene_of("turn", ("red", "circle")),
    lambda: motion.render(one("size"), 0, 32),
    lambda: motion.render(one("size"), 2, (0, 32)),
])  # fmt: skip
def test_wrong_scenes(make):
    with pytest.raises(ValueError):
        make()


def test_words():
    words = Words(motion.vocabulary(), 12)
    scenes = motion.random_scenes(50, 2)
    texts = [f(s) for s in scenes for f in (motion.caption, motion.appearance)]
    ids = words(texts)
    assert ids.shape == (100, 12) and ids.dtype == torch.int64
    assert [words.text(row) for row in ids] == texts
    ends = ids.argmax(dim=1)  # where pyvidx.backbones.TextTower reads a text
    assert ids.max() == len(words) - 1 and ends.tolist() == [len(t.split()) for t in texts]
    for text, message in (("the pink circle", "'pink' is not"), ("the red " * 6, "at most 11 words")):
        with pytest.raises(ValueError, match=message):
            words([text])
    with pytest.raises(ValueError, match="must be a list"):
        words(texts[0])
    end = len(words) - 1
    for row in ([1, 2], [0, 1, end], [1, end + 1, end]):
        with pytest.raises(ValueError, match="up to the end token"):
            words.text(torch.tensor(row))
    with pytest.raises(ValueError, match="twice"):
        Words(["a", "a"], 4)


def test_a_clip_as_a_file(tmp_path):
    pytest.importorskip("av", reason="writing video needs PyAV: pip install 'pyvidx[video]'")
    from pyvidx.video import read

    scene = one("horizontal")
    motion.write_clip(tmp_path / "clip.mp4", scene)
    clip = read(tmp_path / "clip.mp4", frames=8, sampler="uniform")
    assert len(clip) == 8 and clip.frames.shape[1:] == (128, 128, 3)
    want = motion.render(scene, 33, 128)[2:31:4]  # the frames that "uniform" takes of 33
    assert (clip.frames.float() - want.float()).abs().mean() < 6, "but for what H.264 loses"
