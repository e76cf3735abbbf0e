"""Zero-shot retrieval and classification from video files and from embeddings, by the command line."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyvidx.backbones import TextConfig, TextTower
from pyvidx.cli.encode import main as encode
from pyvidx.cli.eval import main
from pyvidx.corpus import embeddings
from pyvidx.corpus.encode import Encoded
from pyvidx.eval import zero_shot
from pyvidx.eval.classify import class_embeddings, classification, prompts
from pyvidx.eval.files import Named
from pyvidx.eval.text import Tokenizer, embed, load_tokenizer, token_ids
from pyvidx.eval.zero_shot import CONFIGS, Config
from pyvidx.models import BTAdapter, Encoding, TextVideo
from pyvidx.preprocess import PRESETS, preprocess
from pyvidx.video import read, sampling, write
from pyvidx.weights.bt_adapter import load_official
from tests.drawn import drawn_clip
from tests.test_checkpoints import VISION, state
from tests.test_checkpoints import tower as towers
from tests.torchvision_shim import mend_torchvision

LETTERS = [c + end for end in ("", "</w>") for c in "abcdefghijklmnopqrstuvwxyz"]
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three videos and one that is none, a model, a text tower that knows letters, and its tokenizer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    for i, name in enumerate(("one", "two", "three")):
        write(tmp_path / f"videos/{name}.mp4", drawn_clip(0.4, (64 + 16 * i, 80)), fps=10)
    (tmp_path / "videos/broken.mp4").write_bytes(b"no video" * 99)
    model = BTAdapter(TextVideo.default().model.config).eval()  # untrained
    model.save(tmp_path / "model.safetensors")
    torch.manual_seed(0)
    sizes = TextConfig(vocab=54, context=12, width=16, heads=2, layers=1, mlp_width=32,
                           embed_dim=model.config.vision.embed_dim)  # fmt: skip
    torch.save(official_names(TextTower(sizes)), tmp_path / "text.pth")
    (tmp_path / "tokenizer").mkdir()
    vocabulary = {token: i for i, token in enumerate(LETTERS + SPECIAL)}
    (tmp_path / "tokenizer/vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    pairs = "video_id,sentence\none,a red dot\ntwo,the blue line\nthree,q\n"
    (tmp_path / "test.csv").write_text(pairs)
    return tmp_path


def official_names(tower):
    """The state dict under the names of transformers' tower."""
    state, found = tower.state_dict(), {}
    top = {"token.weight": "embeddings.token_embedding.weight", "position": "embeddings.position_embedding.weight",
           "norm.weight": "final_layer_norm.weight", "norm.bias": "final_layer_norm.bias"}  # fmt: skip
    inner = {"norm1": "layer_norm1", "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
             "out": "self_attn.out_proj"}  # fmt: skip
    for name, value in state.items():
        if name == "projection.weight":
            found["text_projection.weight"] = value
        elif name in top:
            found["text_model." + top[name]] = value
        else:
            _, layer, module, kind = name.split(".")
            start = f"text_model.encoder.layers.{layer}."
            if module == "qkv":
                for part, third in zip("qkv", value.chunk(3)):
                    found[f"{start}self_attn.{part}_proj.{kind}"] = third.clone()
            else:
                found[f"{start}{inner[module]}.{kind}"] = value
    return found


def config(folder, **changes):
    values = {
        "base": "msrvtt", "annotations": "test.csv", "root": "videos", "model": "model.safetensors", "frames": 3,
        "text": "text.pth", "text_options": {"heads": 2}, "tokenizer": "tokenizer", "text_length": 12,
        "videos": "cache/video.safetensors", "texts": "cache/text.safetensors", "device": "cpu",
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(values | changes))
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configurations(path, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"base": path.stem, "annotations": "x", "videos": "v"}))
    c = Config.from_file(tmp_path / "c.json")
    assert c.preset in PRESETS and c.sampler in sampling.names()
    want = {"msrvtt": (12, 32), "classification": (16, 32)}.get(path.stem, (64, 77))
    assert (c.frames, c.text_length) == want
    (tmp_path / "c.json").write_text(json.dumps({"base": "kinetics", "annotations": "x"}))
    with pytest.raises(ValueError, match="base must be one of activitynet"):
        Config.from_file(tmp_path / "c.json")


def test_retrieval_from_videos_then_from_what_it_kept(folder, capsys, monkeypatch):
    pytest.importorskip("transformers")
    path, out = config(folder), folder / "out.json"
    assert main(["retrieval", "--config", str(path), "--json", str(out), "--plot", str(folder / "p.png")]) == 0
    first = json.loads(out.read_text())
    assert set(first) == {"text to video", "video to text", "about"}
    assert "random weights: True" in capsys.readouterr().out and (folder / "p.png").stat().st_size > 1000
    assert first["about"]["frames"] == "3" and first["about"]["texts"] == 3
    # By hand: the same model and tower on the same frames and texts.
    results, about = embeddings.load(folder / "cache/video.safetensors")
    assert sorted(r.path for r in results) == [f"videos/{n}.mp4" for n in ("one", "three", "two")]
    named = {r.path: r.encoding.pooled[0] for r in results}
    video = torch.stack([named[f"videos/{n}.mp4"] for n in ("one", "two", "three")])
    text = load_file(folder / "cache/text.safetensors")["text"]
    cosine = torch.nn.functional.cosine_similarity(text[:, None], video[None], dim=2)
    place = (cosine > cosine.diagonal()[:, None]).sum(1)
    assert first["text to video"]["MnR"] == pytest.approx(float(place.double().mean()) + 1)
    # Again, without weights or videos.
    monkeypatch.setattr(zero_shot, "encode_videos", None)
    path = config(folder, model=None, text=None, tokenizer=None, root=None)
    assert main(["retrieval", "--config", str(path), "--json", str(out), "--dsl", "--overwrite"]) == 0
    again = json.loads(out.read_text())
    assert "text to video (DSL)" in again and again["about"]["dsl"] is True
    path = config(folder, frames=4)
    with pytest.raises(SystemExit):
        main(["retrieval", "--config", str(path)])
    assert "it has frames = 3, not 4" in capsys.readouterr().err
    path = config(folder, cut="official")
    with pytest.raises(SystemExit):
        main(["retrieval", "--config", str(path)])
    assert "it differs in cut" in capsys.readouterr().err


def test_what_the_encoder_wrote_is_taken(folder, capsys):
    pytest.importorskip("transformers")
    command = ["videos/one.mp4", "videos/two.mp4", "videos/three.mp4", "--model", "model.safetensors", "--frames", "3",
               "--preset", "bt_adapter_retrieval", "--outputs", "pooled", "--device", "cpu", "--overwrite",
               "--out"]  # fmt: skip
    for name in ("e.npz", "e.safetensors"):
        assert encode([*command, name]) == 0
        assert main(["retrieval", "--config", str(config(folder, videos=name, root=None))]) == 0
        assert "videos: 3" in capsys.readouterr().out
    assert encode([*command[:1], *command[3:9], "--device", "cpu", "--out", "e"]) == 0
    for _ in range(2):  # what the folder lacks is added to it, then there
        assert main(["retrieval", "--config", str(config(folder, videos="e"))]) == 0
        assert "videos: 3" in capsys.readouterr().out
    rows, _ = embeddings.load("e")
    assert len(rows) == 3 and all(row.encoding.tokens is not None for row in rows)
    moments = [{"video": f"{name}.mov", "description": "a"} for name in ("one", "two", "three")]
    (folder / "didemo.json").write_text(json.dumps(moments))
    assert encode([*command, "e.npz", "--end", "30"]) == 0
    assert main(["retrieval", "--config", str(config(folder, format="didemo", annotations="didemo.json", videos="e.npz",
                                                     texts=None))]) == 0  # fmt: skip
    assert "end: 30.0" in capsys.readouterr().out
    assert encode([*command, "e.npz", "--end", "0.2"]) == 0
    with pytest.raises(SystemExit):
        main(["retrieval", "--config", str(config(folder, videos="e.npz"))])
    assert "end = 0.2, not None" in capsys.readouterr().err


def test_the_official_file_holds_both_towers(folder):
    pytest.importorskip("transformers")
    sizes = TextConfig(vocab=54, context=12, width=16, heads=2, layers=1, mlp_width=32, embed_dim=VISION.embed_dim)
    tower = TextTower(sizes)
    words = {f"text_backbone.{name}": weight for name, weight in official_names(tower).items()}
    torch.save({"state_dict": state(*towers(6, 4), prefix="backbone.") | words}, folder / "official.pth")
    path = config(folder, model="official.pth", text=None)
    assert main(["retrieval", "--config", str(path), "--json", str(folder / "out.json")]) == 0
    assert json.loads((folder / "out.json").read_text())["about"]["random weights"] is False
    (first, *_), _ = embeddings.load(folder / "cache/video.safetensors")
    model, _ = load_official(folder / "official.pth")
    clip = read("videos/one.mp4", frames=3, sampler="uniform")
    preset = replace(PRESETS["bt_adapter_retrieval"], size=8, crop=8)
    with torch.inference_mode():
        want = model(preprocess(clip.frames, preset)[None], outputs=("pooled",)).pooled
    torch.testing.assert_close(first.encoding.pooled, want, rtol=1e-4, atol=1e-5)
    ids, _ = token_ids(["a red dot"], load_tokenizer("tokenizer"), 12)
    torch.testing.assert_close(load_file(folder / "cache/text.safetensors")["text"][:1], tower(ids).detach())


def test_broken_videos_fail_or_are_left_out(folder, capsys):
    pytest.importorskip("transformers")
    with (folder / "test.csv").open("a") as file:
        file.write("broken,x\nlost,y\n")
    path, out = config(folder), folder / "out.json"
    assert main(["retrieval", "--config", str(path)]) == 1
    error = capsys.readouterr().err
    assert "FAILED broken: " in error and "FAILED lost: not in videos" in error and "2 videos could not" in error
    assert main(["retrieval", "--config", str(path), "--broken", "exclude", "--json", str(out)]) == 0
    assert "excluded videos: 2: broken, lost" in capsys.readouterr().out
    about = json.loads(out.read_text())["about"]
    assert list(about["excluded videos"]) == ["broken", "lost"] and about["texts"] == about["videos"] == 3


def test_classification(folder, capsys):
    pytest.importorskip("transformers")
    (folder / "names.txt").write_text("red\nblue\n")
    (folder / "list.txt").write_text("one.mp4 0\ntwo.mp4 1\nthree.mp4 1\n")
    path = config(folder, base="classification", annotations="list.txt", classes="names.txt", texts=None,
                  templates=["{}", "a {}"])  # fmt: skip
    assert main(["classify", "--config", str(path), "--json", str(folder / "out.json")]) == 0
    assert "classes: 2" in capsys.readouterr().out
    assert set(json.loads((folder / "out.json").read_text())["zero-shot"]) == {"top-1", "mean class"}


def test_nearest_classes():
    assert prompts(["run", "jump"], ["{}", "a {}."]) == ["run", "a run.", "jump", "a jump."]
    with pytest.raises(ValueError, match="must hold {} once"):
        prompts(["run"], ["a"])
    classes = class_embeddings(torch.eye(6).repeat_interleave(2, 0) * torch.tensor([3.0, 1.0]).repeat(6)[:, None], 2)
    assert torch.allclose(classes, torch.eye(6))
    found = classification(classes[[0, 1, 2, 2]] + 0.1, classes, [0, 1, 2, 3])
    # The fourth is of class 3, which shares its place with three others: one of places 2 to 6, and 4 on average.
    assert found == {"top-1": 75.0, "top-5": 100.0, "mean class": 75.0}
    with pytest.raises(ValueError, match="labels from 0 to 5"):
        classification(classes, classes, [0, 1, 2, 3, 4, 6])


def test_texts_are_cut(folder):
    words = Tokenizer(lambda text: [ord(c) for c in text], 1000, 1001)
    ids, cut = token_ids(["ab", "abcdef"], words, 5)
    assert ids.tolist() == [[1000, 97, 98, 1001, 0], [1000, 97, 98, 99, 1001]] and cut == 1
    ids, _ = token_ids(["ab", "abcdef", "z" * 90], words, 5, cut="official")
    assert ids.tolist()[1] == [1000, 97, 98, 99, 100] and ids.tolist()[2] == [1000] + [122] * 4
    assert token_ids(["z" * 90], words, 77, cut="official")[0][0, -1] == 1001
    pytest.importorskip("transformers")
    ids, _ = token_ids(["Ab  c"], load_tokenizer(folder / "tokenizer"), 8)
    spelled = [(LETTERS + SPECIAL)[i] for i in ids[0, :5].tolist()]
    assert spelled == [SPECIAL[0], "a", "b</w>", "c</w>", SPECIAL[1]]
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere"):
        load_tokenizer("nowhere")


def test_the_tokenizer_inside_open_clip():
    mend_torchvision()
    open_clip = pytest.importorskip("open_clip")
    texts = ["A man is  running &amp; jumping", "x " * 90]
    ids, cut = token_ids(texts, load_tokenizer("open_clip"), cut="official")
    assert torch.equal(ids, open_clip.get_tokenizer("ViT-B-32")(texts)) and cut == 1


def test_text_tower_in_batches():
    torch.manual_seed(0)
    tower = TextTower(TextConfig(vocab=20, context=6, width=16, heads=2, layers=1, mlp_width=32, embed_dim=8))
    ids = torch.randint(20, (5, 6))
    torch.testing.assert_close(embed(tower, ids, batch=2), tower(ids).detach())


def test_videos_by_name():
    named = Named(["x/a/one.mp4", "x/b/one.mp4", "x/0001_Juno_00.32.161-00.37.620.avi"])
    assert named.find("b/one.mov") == "x/b/one.mp4" and named.find("two") is None and named.find("ne") is None
    assert named.find("0001_Juno_00.32.161-00.37.620") == "x/0001_Juno_00.32.161-00.37.620.avi"
    with pytest.raises(ValueError, match="must be one file"):
        named.find("one")


@pytest.mark.parametrize("suffix", embeddings.FORMATS)
def test_embeddings_come_back(suffix, tmp_path):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    results = [
        Encoded(f"{n}.mp4", Encoding(torch.randn(1, 3, 4), torch.randn(1, 5), seconds[None]), seconds)
        for n, seconds in ((1, torch.tensor([0.0, 0.5, 1.0]).double()), (2, torch.tensor([0.0]).double()))
    ]
    path = tmp_path / f"e{suffix}"
    embeddings.save(path, [Encoded("bad.mp4", error="no video"), *results], {"frames": "3"})
    found, about = embeddings.load(path)
    assert about["frames"] == "3" and found[2] == Encoded("bad.mp4", error="no video")
    for have, want in zip(found, results):
        assert have.path == want.path and torch.equal(have.seconds, want.seconds)
        assert torch.equal(have.encoding.pooled, want.encoding.pooled)
        assert torch.equal(have.encoding.tokens, want.encoding.tokens)
    with pytest.raises(FileNotFoundError):
        embeddings.load(tmp_path / f"none{suffix}")


def test_embeddings_of_others_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="must be written by pyvidx encode, got x"):
        embeddings.load(tmp_path / "x.safetensors")
