"""pyvidx convert: published names to pyvidx's file and back, and a word on every key."""

import pytest
import torch
from safetensors.torch import load_file

from pyvidx.cli.convert import main
from pyvidx.hosts.convert import to_published, to_pyvidx
from pyvidx.hosts.open import open_model
from pyvidx.models import MALMM, BTAdapter, TextVideo, VideoEncoder
from pyvidx.weights.malmm import export_malmm
from pyvidx.weights.place import MissingWeights
from pyvidx.weights.text_towers import text_tower
from tests.test_backbones import SIZES, hf_clip, randomized
from tests.test_published import chat_files, vectors


def same(a, b):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


def test_bt_adapter_there_and_back(tmp_path, capsys):
    """Official names are read by the official door, give the same weights, and come back the same to the bit."""
    own = TextVideo.default()
    own.model.save(tmp_path / "own.safetensors")
    for suffix in (".pth", ".safetensors"):
        published = str(tmp_path / f"official{suffix}")
        assert main([str(tmp_path / "own.safetensors"), published, "--to", "official"]) == 0
        assert main([published, str(tmp_path / "again.safetensors"), "--heads", "4", "--overwrite"]) == 0
        same(BTAdapter.from_pretrained(tmp_path / "again.safetensors"), own.model)
    text = capsys.readouterr()
    heads = own.model.config.vision.heads
    assert heads == 4 and "loaded" in text.out and "under another name" in text.out and not text.err


def test_the_text_tower_goes_with_it(tmp_path):
    own = TextVideo.default()
    own.save(tmp_path / "both.safetensors")
    converted = to_published(str(tmp_path / "both.safetensors"), "official")
    converted.save(tmp_path / "official.pth")
    found = text_tower(tmp_path / "official.pth", heads=own.text.config.heads)
    same(found, own.text)


def test_a_chat_model_of_two_files(tmp_path, capsys):
    """The branch over a folder of CLIP; gates that no file holds are told."""
    chat_files(tmp_path, vectors("bt_adapter/llava_sft"))
    sources = [str(tmp_path / "clip-vit-large-patch14"), str(tmp_path / "sft_btadapter_weight.bin")]
    assert main([*sources, str(tmp_path / "chat.safetensors"), "--part", "tokens", "--keys"]) == 0
    text = capsys.readouterr().out
    assert "assumed" in text and "btadapter_time_embed.weight -> " in text and "wrote" in text
    assert BTAdapter.from_pretrained(tmp_path / "chat.safetensors").config.part == "tokens"


def test_weights_that_are_missing(tmp_path, capsys):
    """Exit 1, which they are, and no file; patterns allow them."""
    own = TextVideo.default().model
    own.save(tmp_path / "own.safetensors")
    weights = to_published(str(tmp_path / "own.safetensors"), "official").content
    gate = next(key for key in weights if key.endswith("btadapter_T_layers.0.temporal_fc.weight"))
    torch.save({k: v for k, v in weights.items() if k != gate}, tmp_path / "less.pth")
    given = [str(tmp_path / "less.pth"), str(tmp_path / "out.safetensors"), "--heads", "4"]
    assert main(given) == 1
    text = capsys.readouterr()
    assert "temporal.*.fc" in text.err and "nothing fills 1" in text.err and not text.out
    assert not (tmp_path / "out.safetensors").exists()
    assert main([*given, "--allow-missing", "*temporal.0.fc.weight"]) == 0
    assert "missing 1: " in capsys.readouterr().out
    torch.save({"branch_only": torch.zeros(2)}, tmp_path / "none.pth")
    with pytest.raises(MissingWeights):
        to_pyvidx([str(tmp_path / "none.pth")])


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        to_published(str(tmp_path / "none.safetensors"), "official")
    with pytest.raises(ValueError, match="there must be a source"):
        to_pyvidx([])


@pytest.mark.parametrize("naming", ["lavis", "huggingface"])
def test_malmm_there_and_back(tmp_path, naming):
    own = MALMM.default()
    own.save(tmp_path / "own")
    assert main([str(tmp_path / "own"), str(tmp_path / "p.safetensors"), "--to", naming]) == 0
    want = export_malmm(own, naming)
    got = load_file(tmp_path / "p.safetensors")
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
    given = ["--heads", "4", "--vision-heads", "4", "--allow-missing", "time"]
    given = given[:4] if "image_pe.weight" in got else given
    assert main([str(tmp_path / "p.safetensors"), str(tmp_path / "again.safetensors"), *given]) == 0
    again = MALMM.from_pretrained(tmp_path / "again.safetensors")
    same(again.qformer, own.qformer)
    for name, p in own.vision.state_dict().items():
        parts = [p] if naming == "huggingface" or not name.endswith("qkv.bias") else p.chunk(3)[::2]
        found = again.vision.state_dict()[name]
        assert all(map(torch.equal, parts, [found] if len(parts) == 1 else found.chunk(3)[::2])), name


def test_a_tower(tmp_path, capsys):
    """A folder of transformers becomes one file, whose text tower is told as left out."""
    theirs = randomized(hf_clip(SIZES))
    theirs.save_pretrained(tmp_path / "clip")
    assert main([str(tmp_path / "clip"), str(tmp_path / "t.safetensors")]) == 0
    text = capsys.readouterr().out
    assert "left_out" in text and "text_model" in text and "ViT of 3 layers" in text
    want, _ = open_model(tmp_path / "clip")
    found = VideoEncoder.from_pretrained(tmp_path / "t.safetensors")
    same(found, want)
    assert main([str(tmp_path / "t.safetensors"), str(tmp_path / "s.safetensors"), "--module", "stan:depth=2"]) == 0
    assert VideoEncoder.from_pretrained(tmp_path / "s.safetensors").temporal.spec == {"name": "stan", "depth": 2}


@pytest.mark.parametrize("given, message", [
    ("a.pth", "the following arguments are required: OUT"),
    ("a.pth out.bin", "OUT must end in .safetensors, got out.bin"),
    ("a.pth s3://bucket/out.safetensors", "must be a path on this machine"),
    ("a.pth a.pth --to lavis", "a.pth is an input"),
    ("b.pth out.safetensors", "there is no b.pth"),
    ("a.pth out.safetensors --module nothing", "must be one of"),
    ("a.pth out.safetensors --to lavis --part tokens", "takes one file that pyvidx saved, and no more options"),
    ("a.pth a.pth out.safetensors --to lavis", "takes one file that pyvidx saved, and no more options"),
    ("a.pth out.safetensors --to lavis", "only what pyvidx saved gets published names"),
    ("video.safetensors out.safetensors --to lavis", "those of a malmm, video.safetensors holds a bt_adapter"),
    ("video.safetensors out.safetensors --heads 4", "heads must not be given for video.safetensors"),
    ("video.safetensors a.pth out.safetensors", "several sources must be published files"),
    ("a.pth out.safetensors", "holds"),
])  # fmt: skip
def test_refused(given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"epoch": 1}, "a.pth")
    TextVideo.default().model.save("video.safetensors")
    with pytest.raises(SystemExit) as stop:
        main(given.split())
    text = capsys.readouterr()
    assert stop.value.code == 2 and text.err.count("\n") == 1 and message in text.err
    assert not (tmp_path / "out.safetensors").exists()
