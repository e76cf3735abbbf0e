"""Instruction tuning of branch and projector: numbers, what is trained and kept, and runs that were ended."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyvidx.video import write

pytest.importorskip("transformers", reason="pip install 'pyvidx[hosts]'")
pytest.importorskip("av", reason="pip install 'pyvidx[video]'")

from tests.torchvision_shim import mend_torchvision  # noqa: E402

mend_torchvision()
pytest.importorskip("torchvision", reason="pip install 'pyvidx[hosts]'")

from transformers import LlamaForCausalLM  # noqa: E402

from pyvidx.cli.train import Shown  # noqa: E402
from pyvidx.cli.train import main as train_command  # noqa: E402
from pyvidx.hosts import llava  # noqa: E402
from pyvidx.hosts.templates import VIDEO, template  # noqa: E402
from pyvidx.preprocess import preprocess  # noqa: E402
from pyvidx.train import Ranks, chat  # noqa: E402
from pyvidx.train.data import sized  # noqa: E402
from pyvidx.train.recipe import load  # noqa: E402
from pyvidx.video import read  # noqa: E402
from pyvidx.weights.mma_export import export_names  # noqa: E402
from tests.tiny_hosts import bt_adapter_llava  # noqa: E402

RECIPE = {"epochs": 3, "batch": 2, "schedule": "steps", "peak_lr": 1e-2, "warmup_epochs": 0.1, "cosine_epochs": 2.9,
          "weight_decay": 0.0, "amp": "none", "save_every": 1}  # fmt: skip
PRESET = sized("bt_adapter_retrieval", 28)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a chat model, three videos of which one cannot be read, and five rows."""
    folder = tmp_path_factory.mktemp("tuning")
    model, processor = bt_adapter_llava()
    model.save_pretrained(folder / "chat")
    processor.save_pretrained(folder / "chat")
    for i, name in enumerate(("a.mp4", "b.mp4")):
        frames = torch.randint(0, 256, (9, 32, 32, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        write(folder / name, frames, fps=5)
    (folder / "c.mp4").write_bytes(b"no video")
    rows = [("a", "what is the person doing ?", "running"), ("b", "color of cup ?", "red"), ("c", "what ?", "eggs"),
            ("a", "what color ?", "blue and red"), ("b", "what is the person doing ?", "stirring eggs")]  # fmt: skip
    rows = [{"video": f"{v}.mp4", "prompt": p, "answer": a} for v, p, a in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(given, out, **changes):
    values = {"out": str(out), "train": str(given / "rows.jsonl"), "root": str(given), "model": str(given / "chat"),
              "features": {"folder": str(given / "features"), "dtype": "float32", "shard": 2}, "frames": 6,
              "language_dtype": "float32", "recipe": RECIPE}  # fmt: skip
    return values | changes


def run(given, out, *more, **changes):
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text(json.dumps(settings(given, out, **changes)))
    return train_command(["chat", "--config", str(out / "config.json"), "--device", "cpu", *more])


def test_the_loss_is_that_of_the_whole_model(given):
    """From stored features, through templates and masks, against transformers' own forward from pixels and labels."""
    config = chat.Config.from_dict(settings(given, given / "x"))
    task = chat.build(config, torch.device("cpu"))
    data, _ = chat.datasets(config, task, Ranks())
    batch = data.collate([data[0, row] for row in range(5)])
    assert len(batch) == 4 and batch.broken.keys() == {"c.mp4"} and "cannot" in batch.broken["c.mp4"]
    got = task(batch)
    opened = llava.open(given / "chat")
    tokenizer, sums, count = opened.processor.tokenizer, 0.0, 0
    for (row, _), prompt, answer in zip([data[0, i] for i in (0, 1, 3, 4)], batch.prompts, batch.answers):
        clip = read(given / row.video, 6, "uniform")
        shown = "<vid_start>" + "<vid_patch>" * 5 + "<vid_end>"
        text = template("vicuna_v1_1").prompt(prompt, answer=answer).replace(VIDEO, shown)
        assert text.endswith(f"ASSISTANT: {answer}</s>")
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        n = len(tokenizer(f"{answer}</s>", add_special_tokens=False)["input_ids"])
        labels = torch.full_like(ids, -100)
        labels[0, -n:] = ids[0, -n:]
        loss = opened.model(input_ids=ids, pixel_values=preprocess(clip.frames, PRESET)[None], labels=labels).loss
        sums, count = sums + n * loss, count + n
    assert task.count(batch) == count
    torch.testing.assert_close(got, sums / count, atol=1e-5, rtol=1e-5)
    got.backward(), (sums / count).backward()
    theirs = opened.model.model
    for mine, want in (
        (task.model.encoder.temporal.branch.time, theirs.vision_tower.encoder.temporal.branch.time),
        (task.model.projector.linear_1.weight, theirs.multi_modal_projector.linear_1.weight),
    ):
        torch.testing.assert_close(mine.grad, want.grad, atol=1e-6, rtol=1e-4)
    embedded = theirs.get_input_embeddings().weight.grad[task.model.ids]
    torch.testing.assert_close(task.model.rows.grad, embedded, atol=1e-6, rtol=1e-4)
    moved = {name for name, p in task.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {"model.rows", "model.projector.linear_2.bias", "model.encoder.temporal.branch.time"} <= moved
    assert not any("tower" in name or "gate" in name for name in moved)


def test_ended_runs_go_on_to_the_same_bits(given, tmp_path, monkeypatch, capsys):
    """And what is written is read as the public tuned files are."""
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    assert run(given, whole, "--export", str(tmp_path / "tuned.pth")) == 0
    steps, step = [], Shown.step

    def stops(self, stepped):
        step(self, stepped)
        steps.append(stepped)
        if len(steps) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Shown, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        run(given, ended)
    monkeypatch.undo()
    assert run(given, ended) == 0
    assert "going on after step" in capsys.readouterr().err
    assert (ended / "last.safetensors").read_bytes() == (whole / "last.safetensors").read_bytes()
    assert "c.mp4" in (whole / "broken.jsonl").read_text()

    tuned = load_file(whole / "last.safetensors")
    exported = torch.load(tmp_path / "tuned.pth")
    assert exported.keys() == tuned.keys() and all(torch.equal(exported[k], x) for k, x in tuned.items())
    assert tuned["model.embed_tokens.weight"].shape == (2, 32) and "model.mm_projector.2.bias" in tuned
    chat_model = llava.open(given / "chat")
    start = chat_model.model
    LlamaForCausalLM(start.config.text_config).save_pretrained(tmp_path / "llama")
    chat_model.processor.tokenizer.save_pretrained(tmp_path / "llama")
    encoder = start.model.vision_tower.encoder
    tower = export_names({f"model.{n}": p for n, p in encoder.named_parameters() if n.startswith("tower.")})
    save_file(tower, tmp_path / "clip.safetensors")
    file = whole / "last.safetensors"
    again, _, report = llava.load(
        tmp_path / "llama", file, clip=tmp_path / "clip.safetensors", projector=file, num_frames=8, heads=4,
        depth=2, hidden_act="quick_gelu",
    )  # fmt: skip
    assert report.tower.missing == ["temporal.branch.gate"]
    parts = again.model.vision_tower.encoder.temporal.branch, again.model.multi_modal_projector
    assert torch.equal(parts[0].time, tuned["model.vision_tower.btadapter_time_embed.weight"])
    assert not torch.equal(parts[0].time, encoder.temporal.branch.time)
    assert torch.equal(parts[1].linear_2.bias, tuned["model.mm_projector.2.bias"])
    rows = again.get_input_embeddings().weight[chat_model.processor.tokenizer.convert_tokens_to_ids(
        ["<vid_start>", "<vid_end>"])]  # fmt: skip
    assert torch.equal(rows, tuned["model.embed_tokens.weight"])


def test_refused(given, tmp_path, capsys):
    config = chat.Config.from_dict(settings(given, given / "x"))
    chat.datasets(config, chat.build(config, torch.device("cpu")), Ranks())  # features of 6 frames are there
    for changes, message in (
        ({"conversation": "none"}, "conversation must be one of"),
        ({"features": {"folder": "f", "variants": 2}}, "must have one variant"),
        ({"model": "none"}, "there is no folder none"),
        ({"max_tokens": 8}, "must hold the 5 of its video"),
        ({"max_tokens": 39}, "must hold some of its answer, got none with the prompt 'what is the person doing ?'"),
        ({"frames": 3}, "features of 3 frames"),
        ({"frames": 2}, "train: the features in"),
        ({"frames": 40}, "frames"),
        ({"recipe": RECIPE | {"amp": "bfloat16"}, "language_dtype": "float16"}, "language_dtype must be float32 or"),
    ):
        with pytest.raises(SystemExit):
            run(given, tmp_path / "no", **changes)
        assert message in capsys.readouterr().err, changes
    (tmp_path / "rows.jsonl").write_text('{"video": "a.mp4", "prompt": "what ?", "answer": "red", "start": 1}\n')
    with pytest.raises(SystemExit):
        run(given, tmp_path / "no", train=str(tmp_path / "rows.jsonl"))
    assert "must be about whole videos" in capsys.readouterr().err
    for answer, message in (("a <vid_patch>", "the 5 of its video, got 6"), ("<video>", "no text may hold <video>")):
        row = json.dumps({"video": "a.mp4", "prompt": "what ?", "answer": answer})
        (tmp_path / "rows.jsonl").write_text(row + "\n")
        with pytest.raises(SystemExit):
            run(given, tmp_path / "no", train=str(tmp_path / "rows.jsonl"))
        assert message in capsys.readouterr().err


def test_the_example_is_the_script():
    config = chat.Config.from_dict(load(Path(chat.__file__).parent / "configs/btadapter-chat.json"))
    assert (config.frames, config.recipe.epochs, config.recipe.peak_lr, config.max_tokens) == (100, 3, 2e-5, 2048)
