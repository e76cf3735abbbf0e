"""`pyvidx train pretrain` of every module, by both objectives: two steps through the command's own path."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from pyvidx import temporal
from pyvidx.backbones import TextTower
from pyvidx.backbones.vit import ViT
from pyvidx.cli.train import Shown
from pyvidx.models import BTAdapter, VideoEncoder
from pyvidx.models.umt import UnmaskedTeacher
from pyvidx.train import pretrain
from pyvidx.train.pretrain import Config, build
from pyvidx.video import write
from pyvidx.weights.mma_export import export_mma
from tests.test_models import CONFIG
from tests.test_pretraining import SIGLIP
from tests.test_train_pretrain import TEXT, command, lines, some_tokenizer, step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four videos with captions, a tower and its text tower."""
    pytest.importorskip("av", reason="reading video needs PyAV: pip install 'pyvidx[video]'")
    folder = tmp_path_factory.mktemp("modules")
    torch.manual_seed(3)
    (folder / "videos").mkdir()
    for i, text in enumerate(["a red wall", "night", "something green", "sea"]):
        write(folder / f"videos/{i}.mp4", torch.randint(0, 256, (5, 16, 24, 3), dtype=torch.uint8))
        (folder / f"videos/{i}.txt").write_text(text)
    for name, vision in {"clip": CONFIG.vision, "siglip": SIGLIP}.items():
        VideoEncoder(ViT(vision), temporal.create("mean", vision)).save(folder / f"{name}.safetensors")
    weights = {name: value for name, value in export_mma(step()).items() if name.startswith("text_")}
    save_file(weights, folder / "text.safetensors")
    return folder


def values(folder, out, weights="clip", **changes):
    recipe = {"epochs": 2, "batch": 4, "schedule": "steps", "peak_lr": 1e-2, "start_lr": 1e-3, "amp": "none"}
    return {
        "out": str(out), "train": {"kind": "folder", "root": str(folder / "videos")}, "frames": 4, "heads": [2, 2],
        "weights": str(folder / f"{weights}.safetensors"), "text": str(folder / "text.safetensors"),
        "drop_path": 0.0, "taps": 2, "recipe": recipe,
    } | changes  # fmt: skip


@pytest.mark.parametrize("objective", ["contrastive", "umt"])
@pytest.mark.parametrize("name", temporal.names())
def test_two_steps(folder, tmp_path, monkeypatch, name, objective):
    monkeypatch.setattr(pretrain, "tokenizer", lambda *options: some_tokenizer)
    trained = not isinstance(temporal.create(name, CONFIG.vision), (temporal.Mean, temporal.STPool, temporal.GridPool))
    asked = values(folder, tmp_path / "out", module={"name": name}, objective=objective, train_tower=not trained)
    start = build(Config.from_dict(asked), torch.device("cpu")).model
    assert command(tmp_path, asked) == 0
    first, second = lines(tmp_path / "out")
    assert first["loss"] != second["loss"] and first["loss"] > 0
    parts = {"vtc", "mbca", "mbta"} if start.temporal.masks else {"vtc"}
    parts = parts if objective == "contrastive" else set()
    assert set(first["parts"]) == parts
    found = (BTAdapter if name == "bt_adapter" else VideoEncoder).from_pretrained(tmp_path / "out/last.safetensors")
    assert found.temporal.name == name and not found.is_random
    before = start.state_dict()
    moved = {key.split(".")[0] for key, value in found.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == ({"temporal"} if trained else {"tower"})


def test_a_tower_without_a_class_token(folder, tmp_path, monkeypatch):
    """A SigLIP with a module inside it, resumed in the middle to the same bits; its text tower reads the last place."""
    text = TextTower(replace(TEXT, embed_dim=SIGLIP.width, pool="last", context=4))
    monkeypatch.setattr("pyvidx.train.pretrain.text_of", lambda *args, **options: text)
    monkeypatch.setattr(pretrain, "tokenizer", lambda *options: some_tokenizer)
    asked = values(folder, tmp_path / "out", "siglip", module={"name": "st_adapter", "width": 8})
    with pytest.raises(SystemExit):  # SigLIP's text tower reads padding, which must be there
        command(tmp_path, asked)
    asked |= {"text_length": 4, "text_end": "kept"}
    assert command(tmp_path, asked) == 0
    whole = lines(tmp_path / "out")
    asked["out"] = str(tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(Shown, "step", _stopping(Shown.step))
        with pytest.raises(KeyboardInterrupt):
            command(tmp_path, asked, recipe={"save_every": 1})
    assert command(tmp_path, asked, recipe={"save_every": 1}) == 0
    assert [row["loss"] for row in lines(tmp_path / "cut")] == [row["loss"] for row in whole]


def _stopping(shown):
    """Ended at the second step, which is not saved yet."""

    def step(self, stepped):
        if stepped.step == 2:
            raise KeyboardInterrupt
        shown(self, stepped)

    return step


def test_what_a_run_refuses(folder, tmp_path, capsys, monkeypatch):
    """Before a step is taken, in one line."""
    monkeypatch.setattr(pretrain, "tokenizer", lambda *options: some_tokenizer)
    refused = {
        "mean has no parameters to train": {"module": {"name": "mean"}},
        "features are of a branch": {"module": {"name": "joint"}, "features": {"folder": str(tmp_path / "stored")}},
        "needs all patches": {"module": {"name": "joint", "sincos": True}, "objective": "umt", "train_tower": True},
        "taps must be in": {"module": {"name": "stan", "depth": 2}, "objective": "umt", "taps": 3},
    }
    for text, change in refused.items():
        with pytest.raises(SystemExit):
            command(tmp_path, values(folder, tmp_path / "out", **change))
        assert text in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(tmp_path, values(folder, tmp_path / "out", module={"name": "joint"}), "--export", "x.pth")
    assert "has no names for the weights" in capsys.readouterr().err


def test_the_module_of_the_command_line(folder, tmp_path, capsys, monkeypatch):
    """In place of the configuration's, and told."""
    monkeypatch.setattr(pretrain, "tokenizer", lambda *options: some_tokenizer)
    asked = values(folder, tmp_path / "out", module={"name": "joint"})
    assert command(tmp_path, asked, "--module", "st_adapter:width=4,kernel=(3,1,1)") == 0
    assert "st_adapter on the tower of" in capsys.readouterr().err
    found = VideoEncoder.from_pretrained(tmp_path / "out/last.safetensors")
    assert found.temporal.spec == {"name": "st_adapter", "width": 4, "kernel": [3, 1, 1]}
    for module, text in {"stan:depht=2": "stan takes depth", "st_adapter:width=-1": "width must be in"}.items():
        with pytest.raises(SystemExit):
            command(tmp_path, asked, "--module", module)
        assert text in capsys.readouterr().err


def test_the_teacher_is_the_tower_as_it_starts(folder, tmp_path):
    asked = values(folder, tmp_path / "out", module={"name": "separate"}, objective="umt", train_tower=True)
    task = build(Config.from_dict(asked), torch.device("cpu"))
    assert isinstance(task.step, UnmaskedTeacher) and task.step.teacher is not task.model.tower
    for (name, own), taught in zip(task.model.tower.named_parameters(), task.step.teacher.parameters()):
        assert torch.equal(own, taught) and own.requires_grad and not taught.requires_grad, name
