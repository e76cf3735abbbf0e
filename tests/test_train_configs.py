"""Configurations that mean nothing: one line that names the field, before anything is loaded or written."""

import json

import pytest

from pyvidx.cli.train import main as train_command
from pyvidx.train import Recipe, malmm, pretrain
from pyvidx.train.features import Features
from pyvidx.train.recipe import load

PRETRAIN = {"train": {"kind": "folder", "root": "videos"}, "weights": "start.safetensors"}
MALMM = {"train": "train.jsonl", "weights": "start.safetensors", "language": "lm"}

RECIPES = [
    ({"batch": "8"}, "batch must be a whole number, got '8'"), ({"batch": 8.0}, "batch must be a whole number"),
    ({"batch": True}, "batch must be a whole number"), ({"batch": 0}, "batch must be at least 1, got 0"),
    ({"batch": 10**12}, "batch must be at most"), ({"batch": None}, "batch must be a whole number, got None"),
    ({"epochs": -1}, "epochs must be at least 1"), ({"epochs": [3]}, "epochs must be a whole number"),
    ({"peak_lr": True}, "peak_lr must be a finite number"), ({"peak_lr": "1e-4"}, "peak_lr must be a finite number"),
    ({"peak_lr": float("nan")}, "peak_lr must be a finite number"), ({"min_lr": -1e-5}, "min_lr must be at least 0"),
    ({"peak_lr": float("inf")}, "peak_lr must be a finite"), ({"start_lr": 10**400}, "start_lr must be a finite"),
    ({"betas": [0.9]}, "betas must be a list of 2"), ({"betas": [0.9, 1.0]}, "betas must be at most"),
    ({"betas": 0.9}, "betas must be a list of 2"), ({"betas": [0.9, "0.99"]}, "betas must be a list of 2"),
    ({"eps": -1}, "eps must be at least 0"), ({"clip": 0}, "clip must be at least"), ({"clip": -5.0}, "clip must be"),
    ({"multipliers": {"branch": "10"}}, "multipliers must be an object"), ({"multipliers": []}, "multipliers must be"),
    ({"multipliers": {"branch": -1}}, "multipliers must be at least 0"), ({"amp": None}, "amp must be a text"),
    ({"amp": "fp8"}, "amp must be one of"), ({"schedule": "cosine"}, "schedule must be one of"),
    ({"seed": -1}, "seed must be at least 0"), ({"seed": 2**70}, "seed must be at most"),
    ({"workers": 10**6}, "workers must be at most 1024"), ({"workers": -1}, "workers must be at least 0"),
    ({"cosine_epochs": 0}, "cosine_epochs must be at least"), ({"warmup": -1}, "warmup must be at least 0"),
    ({"save_every": 0}, "save_every must be at least 1"), ({"lr": 1}, "unknown fields lr"),
    ([], "recipe must be an object"), ("fast", "recipe must be an object"), (None, "recipe must be an object"),
]  # fmt: skip
BOTH = [
    ({"out": None}, "out must be a text"), ({"out": 5}, "out must be a text"), ({"speed": 1}, "unknown fields speed"),
    ({"frames": 0}, "frames must be at least 1"), ({"frames": 10**9}, "frames must be at most"),
    ({"frames": "4"}, "frames must be a whole number"), ({"preset": "none"}, "preset must be one of"),
    ({"preset": ["ma_lmm"]}, "preset must be a text"), ({"reader": "opencv"}, "reader must be one of"),
    ({"weights": 5}, "weights must be a text"),
]  # fmt: skip
OWN = {
    "pretrain": [
        ({"train": "folder"}, "train must be an object"), ({"train": {"kind": "tar"}}, "train must have a kind"),
        ({"train": {"kind": ["folder"]}}, "train must have a kind"), ({"train": {"kind": "folder"}}, "missing"),
        ({"train": {"kind": "folder", "root": 5}}, "train: root must be a text"),
        ({"held_out": {"kind": "webvid", "table": "a.csv", "caption": 1.5}}, "held_out: caption must be a whole"),
        ({"held_out": {"kind": "webvid", "table": "a.csv", "columns": 1}}, "held_out: got an unexpected"),
        ({"train": {"kind": "shards", "files": []}}, "train: files must be a text or a list"),
        ({"heads": [2]}, "heads must be a list of 2"), ({"heads": [0, 2]}, "heads must be at least 1"),
        ({"module": {"name": "bt_adapter", "gated": 1}}, "module bt_adapter: gated must be true or false"),
        ({"module": {"name": "branch", "time_length": 10**10}}, "time_length must be in"), ({"module": {}}, "a name"),
        ({"module": {"name": "st_adapter", "depth": 2}}, "it has no depth"), ({"objective": "mae"}, "objective must"),
        ({"module": {"name": ["stan"]}}, "a name"), ({"taps": 0}, "taps must be"), ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"objective": "umt", "features": {"folder": "f"}}, "features must not"), ({"module": "stan"}, "module must"),
        ({"mask": "block"}, "mask must be one of"),
        ({"mask_rate": 1.0}, "mask_rate must be at most"), ({"mask_rate": -0.1}, "mask_rate must be at least"),
        ({"mask_order": "frames"}, "mask_order must be one of"), ({"gradient": "local"}, "gradient must be one of"),
        ({"loss_weights": [1, 1]}, "loss_weights must be a list of 3"), ({"loss_weights": [1, 1, -1]}, "loss_weights"),
        ({"drop_path": 1}, "drop_path must be at most"), ({"area": [0.5, 0.1]}, "ascending"),
        ({"area": [0, 1]}, "area must be at least"),
        ({"area": None}, "area must be a list of 2"), ({"shorter": 0}, "shorter must be at least 1"),
        ({"text_length": 99}, "text_length must be at most 77"), ({"text_end": "cut"}, "text_end must be one of"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"), ({"hidden_act": "relu"}, "hidden_act must be one of"),
        ({"weights": "open_clip:ViT-L-14"}, "weights must be a path or"), ({"text": 1}, "text must be a text or"),
        ({"features": "stored"}, "features must be an object"), ({"features": {}}, "folder must be given"),
        ({"features": {"folder": "f", "shard": 0}}, "shard must be at least 1"),
        ({"features": {"folder": "f", "variants": 1.5}}, "variants must be a whole number"),
        ({"features": {"folder": "f", "dtype": "int8"}}, "dtype must be one of"),
    ],
    "malmm": [
        ({"train": {"kind": "folder"}}, "train must be a text"), ({"weights": []}, "weights must be a text or a list"),
        ({"weights": ["a.pth", 5]}, "weights must be a text or a list"), ({"memory": 20}, "memory must be an object"),
        ({"memory": {"length": -1}}, "length must be at least 0"), ({"memory": {"size": 2}}, "unknown fields size"),
        ({"memory": {"length": "20"}}, "length must be a whole number"), ({"memory": {"visual": 1}}, "visual must be"),
        ({"language_dtype": "float64"}, "language_dtype must be one of"), ({"bos": 1}, "bos must be a text or null"),
        ({"max_answer": 0}, "max_answer must be at least 1"), ({"root": None}, "root must be a text"),
        ({"language_dtype": "bfloat16"}, "must be float32 or amp's float16"),
    ],
}  # fmt: skip
CASES = [
    (kind, change, text)
    for kind, own in OWN.items()
    for change, text in [*own, *BOTH, *(({"recipe": recipe}, text) for recipe, text in RECIPES)]
]


def refused(kind, path, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        train_command([kind, "--config", str(path), "--device", "cpu"])
    assert ended.value.code == 2
    text = capsys.readouterr().err.rstrip("\n").rpartition("error: ")[2]
    assert "\n" not in text and len(text) < 500
    return text


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for kind in (pretrain, malmm):
        monkeypatch.setattr(kind, "build", lambda *_: pytest.fail("something is loaded"))
    yield
    assert [path.name for path in tmp_path.iterdir()] in ([], ["run.json"], ["run.toml"]), "something is written"


@pytest.mark.parametrize("kind, change, text", CASES, ids=range(len(CASES)))
def test_values_of_configurations(tmp_path, capsys, kind, change, text):
    values = {"out": "out"} | (PRETRAIN if kind == "pretrain" else MALMM) | change
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert text in refused(kind, tmp_path / "run.json", capsys)


@pytest.mark.parametrize(
    "content, text",
    [
        (b"", "does not parse"), (b"[1, 2]", "must hold an object, got list"), (b"[" * 10**5, "does not parse"),
        (b'{"out": "\xff"}', "does not parse"), (b"{}" + b" " * 2**21, "at most 1048576 bytes"),
        (b'{"a": ' + b"9" * 5000 + b"}", "does not parse"), (b"\xef\xbb\xbf{}", "out, train, weights must be given"),
        (b"\0" * 100, "does not parse"),
    ],
)  # fmt: skip
def test_files_of_configurations(tmp_path, capsys, content, text):
    (tmp_path / "run.json").write_bytes(content)
    assert text in refused("pretrain", tmp_path / "run.json", capsys)
    (tmp_path / "run.json").unlink()
    assert "no such file" in refused("pretrain", tmp_path / "run.json", capsys)


def test_a_device_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "run.json").write_text(json.dumps({"out": "out", **PRETRAIN}))
    with pytest.raises(SystemExit):
        train_command(["pretrain", "--config", str(tmp_path / "run.json"), "--device", "cuda"])
    assert "--device cuda needs a GPU" in capsys.readouterr().err
    (tmp_path / "out").rmdir()


def test_types_are_those_of_the_fields(tmp_path):
    """A whole number does for any other, and lists become tuples."""
    recipe = Recipe.from_dict({"peak_lr": 1, "betas": [0, 0.5], "clip": None, "multipliers": {"branch": 10}})
    assert recipe == Recipe(peak_lr=1.0, betas=(0.0, 0.5), clip=None, multipliers={"branch": 10.0})
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    values = {"out": "o", **PRETRAIN, "area": [1, 1], "features": {"folder": "f"}, "shorter": None}
    config = pretrain.Config.from_dict(values)
    assert (config.area, config.features, config.recipe) == ((1.0, 1.0), Features("f"), Recipe())
    (tmp_path / "run.toml").write_text('out = "o"\n[recipe]\nbatch = 3\n')
    assert load(tmp_path / "run.toml") == {"out": "o", "recipe": {"batch": 3}}
