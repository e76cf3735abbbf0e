"""The model that ships: its header, and that it tells events from their opposites, which a mean of frames cannot."""

import pytest
import torch
from safetensors import safe_open

from pyvidx import temporal
from pyvidx.data import motion
from pyvidx.models import BTAdapter, TextVideo, VideoEncoder, files
from pyvidx.models.text_video import DEFAULT
from pyvidx.preprocess import clip_preprocess


@pytest.fixture(scope="module")
def default():
    return TextVideo.default()


def test_the_file(default):
    assert DEFAULT.stat().st_size < 3_000_000
    with safe_open(DEFAULT, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}
    assert {w.dtype for w in weights.values()} == {torch.float16}
    assert files.digest(weights) == default.about["sha256"]
    assert "bench.motion_study" in default.about["command"]
    assert list(default.words.vocabulary) == motion.vocabulary()


def test_the_default_is_that_model(default):
    model = TextVideo.default(compat="official", variant="llava").model
    assert not model.is_random and not model.training and (model.compat, model.variant) == ("official", "llava")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), default.model.parameters()))
    assert next(model.parameters()).dtype == torch.float32
    assert not model.tower.position.requires_grad and model.temporal.branch.time.requires_grad


def test_similarity_refuses(default):
    E = default.text.config.embed_dim
    for pooled in (torch.zeros(2, E + 1), torch.zeros(E)):
        with pytest.raises(ValueError, match=rf"pooled must be \[B, E = {E}\]"):
            default.similarity(pooled, [])
    with pytest.raises(ValueError, match="must be a list"):
        default.similarity(torch.zeros(2, E), "red")


@torch.inference_mode()
def test_it_tells_events_from_their_opposites(default):
    """On objects that no training had. The baseline, the mean of the same frames, gives both clips one vector."""
    T, size = default.about["frames"], default.model.config.vision.image_size
    scenes = motion.random_scenes(64, seed=77, objects=motion.HELD_OUT)
    right, told = 0, 0
    for scene in scenes:
        both = [scene, motion.opposite(scene)]
        pixels = torch.stack([clip_preprocess(motion.render(s, T, size), size) for s in both])
        captions = [motion.caption(s) for s in both]
        cosines = default.similarity(default.model(pixels, outputs=["pooled"]).pooled, captions)
        right += int((cosines.argmax(dim=1) == torch.arange(2)).sum())
        backbone = default.model.tower
        mean = backbone.embedding(backbone(pixels)[0]).mean(dim=1)
        told += not torch.allclose(*default.similarity(mean, captions), atol=1e-5)
    assert right / 128 > 0.8, "chance is 0.5"
    assert told == 0


@pytest.mark.parametrize("name", ["stan", "joint"])
def test_another_encoder(default, tmp_path, name):
    """Its header says which module; the files of one that is folded, or changes that it has no place for, are none."""
    model = VideoEncoder(default.model.tower, temporal.create(name, default.model.tower.config, time_length=8)).eval()
    own = TextVideo(model, default.text, default.words, {})
    again, pixels = TextVideo.load(own.save(tmp_path / "m.safetensors")), torch.randn(1, 4, 3, 32, 32)
    assert type(again.model) is VideoEncoder and again.model.temporal.spec == {"name": name, "time_length": 8}
    assert not again.model.is_random and not again.model.tower.position.requires_grad
    torch.testing.assert_close(again.model(pixels).pooled, model(pixels).pooled, rtol=2e-2, atol=2e-2)  # float16
    with pytest.raises(ValueError, match="a video_encoder has no compat"):
        TextVideo.load(tmp_path / "m.safetensors", compat="official")
    with pytest.raises(RuntimeError, match="save the model itself"):
        TextVideo(model.fold(), default.text, default.words, {}).save(tmp_path / "folded.safetensors")
    assert not (tmp_path / "folded.safetensors").exists()


def test_save_and_load(default, tmp_path):
    path = default.save(tmp_path / "m.safetensors")
    again = TextVideo.load(path)
    assert again.about == default.about and again.words.vocabulary == default.words.vocabulary
    pooled = torch.randn(2, default.text.config.embed_dim)
    captions = ["the red circle moves left", "a blue ring on a black ground"]
    assert torch.equal(again.similarity(pooled, captions), default.similarity(pooled, captions))
    with pytest.raises(ValueError, match="'dog' is not one of"):
        again.similarity(pooled, ["a dog"])
    with pytest.raises(ValueError, match="text_video"):
        BTAdapter.from_pretrained(path)
