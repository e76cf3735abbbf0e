"""BT-Adapter's pretraining as a command: the recipe's numbers, sources of weights, two processes as one, resuming to
the same bits, stored features, mixed precision and what is left afterwards."""

import contextlib
import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pyvidx.train
from pyvidx.backbones import TextConfig, TextTower
from pyvidx.cli.train import Shown
from pyvidx.cli.train import main as train_command
from pyvidx.models import BTAdapter
from pyvidx.models.pretraining import Pretraining
from pyvidx.train import Ranks, Recipe, pretrain
from pyvidx.train.loop import CHECKPOINT, evaluate
from pyvidx.train.pairs import Pairs
from pyvidx.train.pretrain import Config, build, datasets
from pyvidx.train.pretrain_tasks import ContrastiveTask
from pyvidx.train.recipe import groups, learning_rate, load
from pyvidx.train.tokens import tokenizer
from pyvidx.video import write
from pyvidx.weights.bt_adapter import load_official
from pyvidx.weights.mma_export import export_mma
from pyvidx.weights.text_towers import text_tower
from tests.test_models import CONFIG, P, clip, randomized
from tests.torchvision_shim import mend_torchvision

TEXT = TextConfig(vocab=49408, context=77, width=16, heads=2, layers=1, mlp_width=16, embed_dim=6)
CAPTIONS = ["a red wall", "night", "something green that is not grass", "snow", "a broken file", "sea", "sand", "ash"]


def step(seed=1, **options):
    torch.manual_seed(seed)
    return randomized(Pretraining(BTAdapter(CONFIG), TextTower(TEXT), **options))


def some_tokenizer(texts):
    return torch.tensor([[1, 5 + len(text) % 7, 49407, 0] for text in texts])


@pytest.fixture
def run(tmp_path):
    """A configuration, with weights and eight videos, one of which cannot be read."""
    pytest.importorskip("av", reason="reading video needs PyAV: pip install 'pyvidx[video]'")
    mend_torchvision()
    pytest.importorskip("open_clip", reason="pip install 'pyvidx[hosts]'")
    torch.manual_seed(3)
    (tmp_path / "videos").mkdir()
    for i, text in enumerate(CAPTIONS):
        path = tmp_path / f"videos/{i}.mp4"
        write(path, torch.randint(0, 256, (7, 32, 64, 3), dtype=torch.uint8))
        path.with_suffix(".txt").write_text(text)
        if "broken" in text:
            path.write_bytes(b"this is not a video" * 100)
    start = step()
    start.model.save(tmp_path / "start.safetensors")
    weights = {name: value for name, value in export_mma(start).items() if name.startswith("text_")}
    save_file(weights, tmp_path / "text.safetensors")
    # A large eps: Adam would make whole steps of gradients that are nothing but rounding.
    recipe = {"epochs": 3, "batch": 4, "schedule": "steps", "peak_lr": 1e-3, "start_lr": 1e-4, "eps": 0.01,
              "multipliers": {"branch": 10, "gate": 1e-3}, "decay": "all", "clip": 5.0, "amp": "none",
              "save_every": 1}  # fmt: skip
    values = {
        "out": str(tmp_path / "out"), "train": {"kind": "folder", "root": str(tmp_path / "videos")},
        "weights": str(tmp_path / "start.safetensors"), "text": str(tmp_path / "text.safetensors"),
        "heads": [2, 2], "frames": 4, "drop_path": 0.5, "recipe": recipe,
    }  # fmt: skip
    return tmp_path, values


def command(folder, values, *options, **changes):
    recipe = values["recipe"] | changes.pop("recipe", {})
    path = folder / "run.json"
    path.write_text(json.dumps(values | changes | {"recipe": recipe}))
    return train_command(["pretrain", "--config", str(path), "--device", "cpu", *options])


def lines(out):
    """What the steps of a run gave, without times."""
    rows = [json.loads(line) for line in (Path(out) / "loss.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


# --- recipe


def test_the_example_is_the_paper():
    config = Config.from_dict(load(Path(pyvidx.train.__file__).parent / "configs/btadapter-webvid.json"))
    recipe, batches = config.recipe, 1000
    factors = [learning_rate(recipe, 0, p * 10, batches) / 2e-6 for p in (0, 10, 25, 50, 75, 100)]
    assert factors == pytest.approx([0.05, 0.24, 0.525, 1, 0.992, 0.970], abs=1e-3)
    torch.manual_seed(0)
    pretraining = Pretraining(BTAdapter(CONFIG), TextTower(replace(TEXT, vocab=9)))
    rates = {}
    for group in groups(pretraining, recipe):
        assert group["weight_decay"] == 0.05
        rates |= {id(p): 2e-6 * group["multiplier"] for p in group["params"]}
    for name, p in pretraining.named_parameters():
        fast = "branch.temporal." in name or "gate" in name
        assert not p.requires_grad or rates[id(p)] == pytest.approx(2e-4 if fast else 2e-5), name
        assert p.requires_grad or id(p) not in rates
    assert (recipe.batch, recipe.betas, recipe.clip, recipe.epochs) == (52, (0.9, 0.98), 5.0, 1)
    assert (config.frames, config.text_length, config.mask_rate, config.loss_weights) == (8, 64, 0.7, (1.0, 0.1, 0.1))


def test_multipliers():
    recipe = Recipe(multipliers={"branch": 2, "branch.time": 3, "gate": 5}, decay="all")
    found = {g["multiplier"]: len(g["params"]) for g in groups(step(), recipe)}
    named = [n for n, p in step().named_parameters() if p.requires_grad]
    assert found[3] == 1 and found[5] == 1 and found[1] == sum("branch" not in n and "gate" not in n for n in named)
    with pytest.raises(ValueError, match="no trained parameter has lm_head"):
        groups(step(), Recipe(multipliers={"lm_head": 2}))


@pytest.mark.parametrize("change", [{"schedule": "linear"}, {"decay": "some"}, {"cosine_epochs": 0}])
def test_recipes_that_mean_nothing_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Recipe(**change)


# --- the step


@pytest.mark.parametrize("mask, mask_order", [("tube", "tube"), ("random", "tube"), ("tube", "official")])
def test_checkpointing_gives_the_same_gradients(mask, mask_order):
    pixels = clip(B=2, dtype=torch.float32)
    batch, results = Pairs([(0, 4), (0, 9)], ["a", "some text"], pixels, {}), []
    for checkpointing in (False, True):
        options = {"drop_path": 0.5, "mask_rate": 2 / 3, "mask_order": mask_order, "checkpointing": checkpointing}
        task = ContrastiveTask(step(**options), some_tokenizer, mask=mask)
        task.train()
        calls = []
        for layer in (*task.model.temporal.branch.temporal, *task.model.temporal.branch.spatial):
            layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        losses = task(batch)
        sum(losses.values()).backward()
        grads = {n: p.grad for n, p in task.named_parameters() if p.grad is not None}
        results.append((losses, grads))
        assert len(calls) == 2 * CONFIG.depth * (1 + checkpointing)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_draws_belong_to_rows():
    task = ContrastiveTask(step(drop_path=0.5), some_tokenizer, seed=7).train()
    at = [(epoch, row) for epoch in range(2) for row in range(4)]
    mask, drops = task.draws(at, 4)
    assert mask.shape == (8, P) and (mask.sum(1) == int(0.7 * P)).all() and drops[0] is None
    for i, key in enumerate(at):
        own, own_drops = task.draws([key], 4)
        assert torch.equal(own[0], mask[i])
        assert all(torch.equal(a[0], b[i]) for x, y in zip(own_drops[1:], drops[1:]) for a, b in zip(x, y))
    assert len(mask.unique(dim=0)) > 5
    other = ContrastiveTask(step(drop_path=0.5), some_tokenizer, seed=8)
    assert not torch.equal(other.draws(at, 4)[0], mask) and other.eval().draws(at, 4)[1] is None


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision(amp):
    task = ContrastiveTask(step(), some_tokenizer).train()
    batch = Pairs([(0, i) for i in range(3)], ["a", "bc", "def"], clip(B=3, dtype=torch.float32), {})
    want = task(batch)
    with torch.autocast("cpu", getattr(torch, amp)):
        got = task(batch)
    for name, value in got.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, want[name], rtol=0.1, atol=0.05)
    assert got["vtc"] != want["vtc"]
    sum(got.values()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in task.parameters() if p.requires_grad)


def test_tokens():
    mend_torchvision()
    pytest.importorskip("open_clip", reason="pip install 'pyvidx[hosts]'")
    long, end = "cat " * 100, 49407
    official, kept = tokenizer(length=8)(["A dog", long]), tokenizer(length=8, end="kept")(["A dog", long])
    assert official.shape == kept.shape == (2, 8) and official.dtype == torch.int64
    assert torch.equal(official[0], kept[0]) and official[0].tolist() == [49406, 320, 1929, end, 0, 0, 0, 0]
    assert end not in official[1] and kept[1, -1] == end and torch.equal(official[1, :-1], kept[1, :-1])
    with pytest.raises(ValueError, match="end must be"):
        tokenizer(end="lost")
    with pytest.raises(FileNotFoundError, match="no folder"):
        tokenizer("nowhere")


# --- the command


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_the_command_resumes_to_the_same_bits(run, monkeypatch, capsys, amp):
    folder, values = run
    held_out = {"kind": "folder", "root": str(folder / "videos")}
    # Small losses: float16's scaler starts at 65536, and halves it until gradients are finite.
    options = {"held_out": held_out, "recipe": {"amp": amp}, "loss_weights": [0.1, 0.01, 0.01]}
    assert command(folder, values, **options, out=str(folder / "whole")) == 0
    with monkeypatch.context() as patched:
        # Killed in an epoch, between a checkpoint and the next.
        patched.setattr(Shown, "step", lambda self, stepped: 1 / (stepped.step != 4))
        with pytest.raises(ZeroDivisionError):
            command(folder, values, **options)
    capsys.readouterr()
    assert command(folder, values, "--export", str(folder / "official.pth"), **options) == 0
    shown = capsys.readouterr()
    assert "going on after step 3, epoch 1" in shown.err and "1 videos could not be read" in shown.err
    out, whole = folder / "out", lines(folder / "whole")
    rows = [row for row in lines(out) if "loss" in row]
    assert rows == [row for row in whole if row.get("step", 0) > 3 and "loss" in row]
    files = [torch.load(folder / name / CHECKPOINT, weights_only=True) for name in ("whole", "out")]
    for part in ("model", "optimizer", "scaler", "generators"):
        torch.testing.assert_close(*(file[part] for file in files), rtol=0, atol=0)
    assert len({(str(file["broken"]), file["best"]) for file in files}) == 1

    trained = [row for row in whole if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in whole if "held_out" in row] == [0, 1, 2]
    assert all(sum(row["parts"].values()) == pytest.approx(row["loss"]) for row in trained)
    finite = [row["norm"] for row in trained if row["norm"] is not None]  # float16 starts with too large a scale
    assert min(finite) > 0 and (len(finite) == 6 or amp == "float16")
    assert set(trained[0]["parts"]) == {"vtc", "mbca", "mbta"} and {row["count"] for row in trained} == {4}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG") and (out / "best.safetensors").exists()
    (broken,) = [json.loads(line) for line in (out / "broken.jsonl").read_text().splitlines()]
    assert broken["video"] == "4.mp4" and broken["error"]

    start, last = (BTAdapter.from_pretrained(p) for p in (folder / "start.safetensors", out / "last.safetensors"))
    moved = {n for (n, p), q in zip(start.named_parameters(), last.parameters()) if not torch.equal(p, q)}
    assert moved == {n for n in dict(start.named_parameters()) if not n.startswith("tower.")}
    official, report = load_official(folder / "official.pth", heads=2)
    for (name, p), q in zip(official.named_parameters(), last.parameters()):
        assert torch.equal(p, q), name
    assert not report.missing and not report.unexpected and not report.unused
    state = torch.load(folder / "official.pth", weights_only=True)["state_dict"]
    text = text_tower({key: value for key, value in state.items() if key.startswith("text_")}, heads=2)
    assert torch.equal(text.token.weight, step().text.token.weight)


def test_tensorboard(run):
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="pip install 'pyvidx[train]'"
    )
    folder, values = run
    command(folder, values, recipe={"epochs": 1})
    read = events.EventAccumulator(str(folder / "out/tensorboard")).Reload()
    want = {f"train/{name}" for name in ("loss", "rate", "norm", "vtc", "mbca", "mbta")}
    assert set(read.Tags()["scalars"]) == want
    rows = lines(folder / "out")
    assert [e.value for e in read.Scalars("train/loss")] == pytest.approx([row["loss"] for row in rows])


# The public code's gradient, of the losses that are gathered.
OFFICIAL = {"gradient": "official", "loss_weights": [1, 0.1, 0], "recipe": {"epochs": 1}}


def _process(rank, folder, values, ports):
    torch.set_num_threads(1)
    pretrain.tokenizer = lambda *options: some_tokenizer  # open_clip takes seconds to import
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    stored = {"folder": str(folder / "stored"), "dtype": "float32", "shard": 3}
    changes = [
        {},
        {"features": stored, "out": str(folder / "two-stored"), "recipe": {"epochs": 1}},
        OFFICIAL | {"out": str(folder / "two-official")},
    ]
    # A port each: on an old one the faster process would meet the store that the slower one is about to close.
    for port, change in zip(ports, changes):
        os.environ["MASTER_PORT"] = str(port)
        command(folder / str(rank), values, **change)


def test_two_processes_are_one(run, monkeypatch):
    """With a video that cannot be read, DropPath, checkpointing and a held-out loss; the two take a video at a time;
    also from features that both have stored. To 1e-5 for four steps: the order of sums differs, and rounding grows with
    every step. After the fifth 5e-5 was seen."""
    folder, values = run
    monkeypatch.setattr(pretrain, "tokenizer", lambda *options: some_tokenizer)
    values |= {"checkpointing": True, "held_out": values["train"]}
    command(folder, values)
    command(folder, values, **OFFICIAL, out=str(folder / "official"))
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(3)]
        for each in free:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in free]
    for rank in "01":
        (folder / rank).mkdir()
    two = values | {"out": str(folder / "two"), "micro_batch": 1, "recipe": values["recipe"] | {"batch": 2}}
    torch.multiprocessing.spawn(_process, (folder, two, ports), nprocs=2)
    got, want = lines(folder / "two"), lines(folder / "out")
    assert len(got) == 6 + 3
    torch.testing.assert_close(got[:5], want[:5], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(lines(folder / "two-stored"), want[:3], rtol=1e-5, atol=1e-6)
    weights = [load_file(folder / name / "last.safetensors") for name in ("two", "out")]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
    official = [lines(folder / name)[0] for name in ("two-official", "official")]
    assert official[0]["loss"] == pytest.approx(official[1]["loss"], rel=1e-5)
    assert official[0]["norm"] == pytest.approx(official[1]["norm"] / 2, rel=1e-5)
    listed = {(folder / name / "broken.jsonl").read_text() for name in ("two", "two-stored", "out")}
    assert len(listed) == 1 and "4.mp4" in listed.pop()


# --- stored features


def test_stored_features_train_the_same(run):
    folder, values = run
    command(folder, values)
    stored = {"folder": str(folder / "stored"), "dtype": "float32", "variants": 3, "shard": 4}
    command(folder, values, features=stored, out=str(folder / "cached"))
    assert lines(folder / "cached") == lines(folder / "out")
    weights = [load_file(folder / name / "last.safetensors") for name in ("cached", "out")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    listed = [(folder / name / "broken.jsonl").read_text() for name in ("cached", "out")]
    assert listed[0] == listed[1] != ""
    for path in (folder / "videos").iterdir():
        path.write_bytes(b"") if path.suffix == ".mp4" else None
    command(folder, values, features=stored, out=str(folder / "again"))  # without looking at the videos
    assert lines(folder / "again") == lines(folder / "out")


def test_stored_features_are_rounded_and_refused(run, capsys):
    folder, values = run
    values["features"] = {"folder": str(folder / "stored")}
    config = Config.from_dict(values)
    task = build(config, torch.device("cpu"))
    stored, _ = datasets(config, task, Ranks())
    pixels, _ = datasets(replace(config, features=None), task, Ranks())
    at = [(0, row) for row in (0, 4, 6)]
    pairs = [data.collate([data[key] for key in at]) for data in (stored, pixels)]
    assert pairs[0].at == pairs[1].at == [(0, 0), (0, 5), (0, 6)] and pairs[0].broken == pairs[1].broken
    xs, text = task.frozen(pairs[1])
    assert torch.equal(pairs[0].video, torch.stack(xs, dim=1).half().float()) and torch.equal(pairs[0].text, text)
    assert stored[1, 0].at == (1, 0) and torch.equal(stored[1, 0].video, stored[0, 0].video)
    losses = [task.train()(batch) for batch in pairs]
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.01)
    changes = {"frames": {"frames": 3}, "seed": {"recipe": {"seed": 1}}, "towers": {"text": str(folder / "other")},
               "dtype": {"features": values["features"] | {"dtype": "float32"}}}  # fmt: skip
    other = {name: value for name, value in export_mma(step(seed=2)).items() if name.startswith("text_")}
    torch.save(other, folder / "other")
    for name, change in changes.items():
        with pytest.raises(SystemExit):
            command(folder, values, **change)
        assert f"are of something else: {name}" in capsys.readouterr().err


def test_an_interrupted_store_goes_on(run, monkeypatch):
    folder, values = run
    values["features"] = {"folder": str(folder / "stored"), "shard": 3}
    config = Config.from_dict(values)
    task = build(config, torch.device("cpu"))
    whole, _ = datasets(config, task, Ranks())
    want = [whole[0, row] for row in range(len(whole))]
    (folder / "stored/index.json").unlink()
    (folder / "stored/00002.safetensors").unlink()
    calls = []
    monkeypatch.setattr(task, "frozen", lambda pairs: calls.append(len(pairs)) or ContrastiveTask.frozen(task, pairs))
    again, _ = datasets(config, task, Ranks())
    assert calls == [2]
    got = [again[0, row] for row in range(len(again))]
    torch.testing.assert_close([p.video for p in got], [p.video for p in want], rtol=0, atol=0)
    assert [(p.at, p.broken) for p in got] == [(p.at, p.broken) for p in want]


# --- refusals


def test_a_loss_over_the_batch_does_not_accumulate(run, capsys):
    folder, values = run
    with pytest.raises(SystemExit):
        command(folder, values, recipe={"accumulation": 2})
    assert "accumulation must be 1 for a loss that compares" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, text",
    [
        ({"mask": "block"}, "mask must be one of tube, random"),
        ({"area": [0, 1]}, "area must be"),
        ({"speed": 1}, "unknown fields speed"),
        ({"features": {"folder": "f", "dtype": "int8"}}, "dtype must be one of"),
        ({"text": None}, "holds no text tower"),
        ({"weights": "TEXT"}, "no sizes without position, patch"),
        ({"weights": "open_clip:ViT-L-14"}, "weights must be a path or"),
        ({"mask_order": "frames"}, "mask_order"),
        ({"preset": "none"}, "preset must be one of"),
        ({"weights": "nowhere.pth"}, "there is no nowhere.pth"),
        ({"train": {"kind": "folder", "root": "nowhere"}}, "no folder nowhere"),
        ({"recipe": {"batch": 9}}, "needs 9 rows, got 8"),
    ],
)
def test_configurations_that_mean_nothing_are_refused(run, change, text, capsys):
    folder, values = run
    if change.get("weights") == "TEXT":
        change = {"weights": values["text"]}
    with pytest.raises(SystemExit):
        command(folder, values, **change)
    assert text in capsys.readouterr().err


def test_another_mask_is_another_run(run, capsys):
    folder, values = run
    command(folder, values)
    with pytest.raises(SystemExit):
        command(folder, values, mask_rate=0.5)
    assert "of another run: mask_rate 0.7 (now 0.5)" in capsys.readouterr().err


def test_other_captions_and_weights_are_another_run(run, capsys):
    folder, values = run
    held_out = {"kind": "folder", "root": str(folder / "videos")}
    recipe = {"epochs": 1}
    command(folder, values, held_out=held_out, recipe=recipe)
    before = (folder / "out" / CHECKPOINT).read_bytes()
    other = step(seed=2)
    other.model.save(folder / "other.safetensors")
    text = {name: value for name, value in export_mma(other).items() if name.startswith("text_")}
    save_file(text, folder / "text-other.safetensors")
    changes = {
        "start weights": {"weights": str(folder / "other.safetensors")},
        "frozen weights": {"text": str(folder / "text-other.safetensors")},
        "content of held-out rows": {"held_out": None},
        "text_end": {"text_end": "kept"},
    }
    for name, change in changes.items():
        with pytest.raises(SystemExit):
            command(folder, values, **{"held_out": held_out, "recipe": recipe} | change)
        assert f"of another run: {name}" in capsys.readouterr().err
    (folder / "videos/6.txt").write_text("another caption")
    with pytest.raises(SystemExit):
        command(folder, values, held_out=held_out, recipe=recipe)
    assert "of another run: content of rows" in capsys.readouterr().err
    assert (folder / "out" / CHECKPOINT).read_bytes() == before


def test_held_out_batches_are_full(run):
    folder, values = run
    config = Config.from_dict(values)
    task = build(config, torch.device("cpu"))
    data, _ = datasets(config, task, Ranks())
    loss, broken = evaluate(task, data, replace(config.recipe, batch=5), Ranks())
    task.eval()
    with torch.no_grad():
        assert loss == pytest.approx(float(sum(task(data.collate([data[0, i] for i in range(5)])).values())))
    assert set(broken) == {"4.mp4"}
    with pytest.raises(RuntimeError, match="too few for a batch"):
        evaluate(task, data, replace(config.recipe, batch=9), Ranks())
