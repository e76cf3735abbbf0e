"""One door for every model: whatever --model and --module may name, on tiny random weights."""

import json

import pytest
import torch

from pyvidx import temporal
from pyvidx.hosts import open_clip as host
from pyvidx.hosts.open import check_source, open_model, open_text, parse_module
from pyvidx.models import MALMM, BTAdapter, BTAdapterConfig, TextVideo, VideoEncoder
from tests.test_backbones import SIZES, hf_clip, randomized
from tests.test_published import pretraining_file, vectors
from tests.torchvision_shim import mend_torchvision

TINY = {
    "embed_dim": 6, "vision_cfg": {"image_size": 12, "layers": 3, "width": 64, "patch_size": 4},
    "text_cfg": {"context_length": 9, "vocab_size": 50, "width": 64, "heads": 1, "layers": 1},
}  # fmt: skip


@pytest.fixture
def clip_folder(tmp_path):
    randomized(model := hf_clip(SIZES)).save_pretrained(tmp_path / "clip", max_shard_size="30KB")
    assert (tmp_path / "clip/model.safetensors.index.json").exists()
    return str(tmp_path / "clip"), model


@pytest.fixture
def tiny_open_clip(tmp_path):
    mend_torchvision()
    open_clip = pytest.importorskip("open_clip", reason="pip install 'pyvidx[hosts]'")
    (tmp_path / "pyvidx-open.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "pyvidx-open.json")
    torch.manual_seed(1)
    torch.save((model := open_clip.create_model("pyvidx-open").eval()).state_dict(), tmp_path / "w.pt")
    return model


def frames_mean(embed, pixels):
    return torch.stack([embed(x) for x in pixels.unbind(1)]).mean(0)


@torch.no_grad()
def test_a_folder_of_transformers(clip_folder):
    """Shards and config.json; alone it is a mean of frames, and with a module that reads only, too."""
    folder, theirs = clip_folder
    pixels = torch.randn(2, 3, 3, 28, 28)
    encoder, loaded = open_model(folder)
    want = frames_mean(lambda x: theirs.visual_projection(theirs.vision_model(x).pooler_output), pixels)
    torch.testing.assert_close(encoder(pixels).pooled, want, rtol=1e-4, atol=1e-5)
    assert not encoder.training and not encoder.is_random
    assert folder in loaded.model and "3 layers" in loaded.model and loaded.module.startswith("mean, without weights")
    assert str(loaded).count("\n") == 1


@pytest.mark.parametrize("name", temporal.names())
def test_every_module(clip_folder, name, tmp_path):
    """Made for the tower, always with the same weights; saved, it is opened again as it was."""
    folder, _ = clip_folder
    given = {"stan": "stan:depth=2", "branch": "branch:depth=2", "bt_adapter": "bt_adapter:depth=2"}.get(name, name)
    encoder, loaded = open_model(folder, given)
    again, _ = open_model(folder, given)
    assert encoder.temporal.name == name and loaded.module.startswith(name)
    for (key, p), q in zip(encoder.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(p, q), key
    assert encoder.is_random == ("never trained" in loaded.module) == bool(list(encoder.temporal.parameters()))
    encoder.save(tmp_path / "saved")
    saved, loaded = open_model(tmp_path / "saved")
    assert type(saved) is type(encoder) and str(tmp_path / "saved") in loaded.model
    pixels = torch.randn(1, 3, 3, 28, 28)
    torch.testing.assert_close(saved(pixels).pooled, encoder(pixels).pooled)


def test_what_pyvidx_saved(tmp_path):
    built_in, loaded = open_model()
    assert isinstance(built_in, BTAdapter) and "ships with pyvidx" in loaded.model and not built_in.is_random
    model = TextVideo.default()
    model.save(tmp_path / "both.safetensors")
    model.model.save(tmp_path / "video.safetensors")
    for name in ("both", "video"):
        found, loaded = open_model(tmp_path / f"{name}.safetensors")
        assert (
            torch.equal(found.temporal.branch.seed, model.model.temporal.branch.seed)
            and "its own weights" in loaded.module
        )
    found, _ = open_model(tmp_path / "video.safetensors", "bt_adapter", compat="official")
    assert found.compat == "official"
    other, loaded = open_model(tmp_path / "video.safetensors", "mean")
    assert isinstance(other, VideoEncoder) and other.temporal.spec == {"name": "mean"} and not other.is_random
    BTAdapter(BTAdapterConfig.named("tiny")).save(tmp_path / "random")
    assert "random weights" in open_model(tmp_path / "random")[1].module


def test_what_encodes_no_clip(tmp_path):
    MALMM.default().save(tmp_path / "malmm")
    with pytest.raises(ValueError, match="MALMM.from_pretrained opens it, `pyvidx eval predict`"):
        open_model(tmp_path / "malmm")


@torch.no_grad()
def test_published_files(tmp_path, clip_folder):
    file = vectors("bt_adapter/mma_eval")
    path = pretraining_file(tmp_path / "pretrain_btadapter_weight.pth", file.part("weights."))
    model, loaded = open_model(path, heads=4)
    got, want = model(file.tensors["in.T8_B2.video"]).pooled, file.tensors["out.T8_B2.gated.embed"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert "published BT-Adapter weights" in loaded.model and loaded.report.loaded
    assert open_model(path, compat="paper", heads=4)[0].compat == "paper"
    tower, _ = open_model(path, "mean", heads=4)
    assert tower.temporal.spec == {"name": "mean"}
    theirs = clip_folder[1]
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    encoder, _ = open_model(tmp_path / "clip.pt", heads=4, hidden_act="quick_gelu")
    pixels = torch.randn(1, 2, 3, 28, 28)
    want = frames_mean(lambda x: theirs.visual_projection(theirs.vision_model(x).pooler_output), pixels)
    torch.testing.assert_close(encoder(pixels).pooled, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_open_clip(tmp_path, tiny_open_clip, capsys):
    pixels = torch.randn(2, 3, 3, 12, 12)
    encoder, loaded = open_model(f"open_clip:pyvidx-open:{tmp_path / 'w.pt'}")
    torch.testing.assert_close(encoder(pixels).pooled, frames_mean(tiny_open_clip.encode_image, pixels))
    assert not encoder.is_random and "pyvidx-open" in loaded.model
    random, loaded = open_model("open_clip:pyvidx-open", "stan:depth=2")
    assert random.is_random and "random weights" in loaded.model and "stan (depth=2)" in loaded.module
    assert capsys.readouterr().err == ""


def test_a_tag_of_open_clip_is_told(tiny_open_clip, monkeypatch, capsys):
    """Only open_clip itself downloads, only what was named, and not in silence."""
    import open_clip

    asked = []
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"url": "x"} if tag == "some_tag" else {})
    monkeypatch.setattr(open_clip, "create_model", lambda name, **given: asked.append(given) or tiny_open_clip)
    _, loaded = open_model("open_clip:pyvidx-open:some_tag")
    assert asked[0]["pretrained"] == "some_tag" and "some_tag" in loaded.model
    assert "'some_tag' from its cache, or downloads it" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no file other_tag"):
        open_model("open_clip:pyvidx-open:other_tag")


@torch.no_grad()
def test_text_towers(tmp_path, clip_folder, tiny_open_clip):
    folder, theirs = clip_folder
    ids = torch.tensor([[0, 5, 7, 2]])
    want = theirs.text_projection(theirs.text_model(ids).pooler_output)
    torch.testing.assert_close(open_text(folder)(ids), want, rtol=1e-4, atol=1e-5)
    ids = torch.tensor([[1, 49, 0, 0, 0, 0, 0, 0, 0]])
    named = f"open_clip:pyvidx-open:{tmp_path / 'w.pt'}"
    torch.testing.assert_close(open_text(named)(ids), tiny_open_clip.encode_text(ids))
    both = TextVideo.default()
    both.save(tmp_path / "both.safetensors")
    assert torch.equal(open_text(tmp_path / "both.safetensors").position, both.text.position)
    both.model.save(tmp_path / "video.safetensors")
    with pytest.raises(ValueError, match="holds a bt_adapter, without a text tower"):
        open_text(tmp_path / "video.safetensors")


@pytest.mark.parametrize("source, message", [
    ("no.pth", "there is no no.pth"),
    ("openai/clip-vit", "pyvidx downloads nothing"),
    ("https://host/x.pth", "download https://host/x.pth"),
])  # fmt: skip
def test_sources_that_are_not_there(source, message):
    for door in (check_source, open_model, open_text):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            door(source)


def test_names_of_open_clip(tiny_open_clip, tmp_path):
    assert host.parse("open_clip:ViT-B-32") == ("ViT-B-32", None)
    with pytest.raises(ValueError, match="knows no model 'ViT-B-33'; there are ViT-B-3"):
        check_source("open_clip:ViT-B-33")
    with pytest.raises(FileNotFoundError, match="no file none.pt"):
        check_source("open_clip:ViT-B-32:none.pt")
    (tmp_path / "bad.pt").write_bytes(b"not weights")
    with pytest.raises(RuntimeError, match="cannot be made with .*bad.pt"):
        open_model(f"open_clip:pyvidx-open:{tmp_path / 'bad.pt'}")


@pytest.mark.parametrize("text, want", [
    ("mean", ("mean", {})),
    ("stan:depth=2,per_frame=True", ("stan", {"depth": 2, "per_frame": True})),
    ("st_adapter:kernel=(3,1,1),places=both", ("st_adapter", {"kernel": (3, 1, 1), "places": "both"})),
    ("st_pool:rows=None", ("st_pool", {"rows": None})),
])  # fmt: skip
def test_modules_as_text(text, want):
    assert parse_module(text) == want


@pytest.mark.parametrize("text, message", [
    ("stann", "must be one of .*stan"), ("", "must be one of"), ("mean:depth=2", "takes no options"),
    ("stan:deep=2", "stan takes depth, time_length, per_frame, got deep"), ("stan:depth", "NAME=VALUE.*got 'depth'"),
    ("stan:depth=1,depth=2", "each once"), ("stan:depth=1,", "got ''"),
])  # fmt: skip
def test_modules_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        parse_module(text)


def test_contradictions(tmp_path, clip_folder):
    folder, _ = clip_folder
    with pytest.raises(ValueError, match="depth must be in"):
        open_model(folder, "stan:depth=9")
    with pytest.raises(ValueError, match="compat must not be given"):
        open_model(folder, compat="paper")
    open_model(folder, "stan:depth=2")[0].save(tmp_path / "stan")
    with pytest.raises(ValueError, match="holds stan .depth=2., which cannot become stan .depth=3."):
        open_model(tmp_path / "stan", "stan:depth=3")
    with pytest.raises(
        ValueError, match="cannot become stan .time_length=5."
    ):  # an option that was left at its default
        open_model(tmp_path / "stan", "stan:time_length=5")
    assert open_model(tmp_path / "stan", "stan:depth=2,time_length=64")[1].module.startswith("stan (depth=2), random")
    with pytest.raises(ValueError, match="gated must not be given"):
        open_model(tmp_path / "stan", gated=False)
    for other in ("gated=False", "eps=1"):
        with pytest.raises(ValueError, match="that ships with pyvidx holds .*cannot become bt_adapter"):
            open_model(None, f"bt_adapter:{other}")
    for wrong in ("stan:depth=x", "bt_adapter:depth=x", "bt_adapter:time_length=-1", "clip_vip:proxies=(1,2)"):
        with pytest.raises(ValueError):
            open_model(folder, wrong)
