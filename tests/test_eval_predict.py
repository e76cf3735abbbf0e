"""From videos to answers to numbers, by the command line, with a small random MA-LMM."""

import json

import pytest
import torch

from pyvidx.cli.eval import main
from pyvidx.eval import task
from pyvidx.eval.predict import read_predictions
from pyvidx.preprocess import Preset, preprocess
from pyvidx.train.malmm import Config, build
from pyvidx.video import read
from tests.test_train import run  # noqa: F401


def test_predict_then_score(run, capsys):  # noqa: F811
    folder, values = run
    rows = {
        name: {"class_name": name.removeprefix("P47_")} for name in ("P47_red", "P47_blue", "P47_lost", "P47_broken")
    }
    for name in ("red", "blue", "broken"):
        (folder / f"{name}.mp4").rename(folder / f"P47_{name}.mp4")
    (folder / "val.json").write_text(json.dumps(rows))
    out = folder / "new/answers.jsonl"
    annotated = ["--task", "breakfast", "--format", "breakfast", "--annotations", str(folder / "val.json")]
    command = ["predict", *annotated, "--config", str(folder / "run.json"), "--frames", "4", "--memory", "2",
               "--device", "cpu", "--out", str(out)]  # fmt: skip
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "without an answer: 2: P47_lost, P47_broken" in text
    found = read_predictions(out)
    assert list(found) == ["P47_red", "P47_blue"] and all(len(answers) == 5 for answers in found.values())

    asked = build(Config.from_dict(values), torch.device("cpu"))
    size = asked.model.config.vision.image_size
    clip = read(folder / "P47_blue.mp4", 4, "linspace_round")

    pixels = preprocess(clip.frames, Preset(size, "squash", size, filter="bicubic", to_uint8="truncate"))[None]
    t = task("breakfast")
    (want,) = asked.model.eval().generate(
        pixels, [t.prompt], asked.language, memory={"length": 2}, max_new_tokens=20, min_new_tokens=1, num_beams=5,
        num_return_sequences=5,
    )  # fmt: skip
    assert found["P47_blue"] == want

    with pytest.raises(SystemExit):
        main([*command, "--memory", "3"])
    assert "must hold answers of this task and these weights" in capsys.readouterr().err
    with out.open("a") as file:
        file.write('{"id": "P47_lost", "ans')  # killed while it wrote
    before = out.read_text()
    assert main(command) == 0 and out.read_text() == before + "\n", "what is answered is not asked again"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["answers", *annotated, "--predictions", str(out)])
    assert "predictions lack 2 samples" in capsys.readouterr().err
    (folder / "val.json").write_text(json.dumps({name: rows[name] for name in found}))
    assert main(["answers", *annotated, "--predictions", str(out)]) == 0
    assert "top-5" in capsys.readouterr().out


def test_predictions_that_mean_nothing(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"id": "a", "answers": ["x"]}\n{"id": "b"}\n')
    with pytest.raises(ValueError, match="p.jsonl, line 2 must have answers"):
        read_predictions(tmp_path / "p.jsonl")
    (tmp_path / "p.json").write_text("[]")
    with pytest.raises(ValueError, match="p.json must hold an object, got list"):
        read_predictions(tmp_path / "p.json")
