"""Training: the recipe's numbers, resuming to the same bits, two processes as one, and the command from end to end."""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import pyvidx.train
from pyvidx.__main__ import main as pyvidx_main
from pyvidx.cli.train import Shown
from pyvidx.cli.train import main as train_command
from pyvidx.models import MALMM
from pyvidx.train import Ranks, Recipe, State, Task, train
from pyvidx.train.data import Row, plan, random_box, rows
from pyvidx.train.loop import CHECKPOINT
from pyvidx.train.malmm import Config
from pyvidx.train.recipe import decays, groups, learning_rate, load
from pyvidx.video import write
from pyvidx.weights.malmm import export_malmm, load_malmm_weights
from tests.torchvision_shim import mend_torchvision
from tests.two import two_processes

PLAIN = dict(epochs=3, batch=4, warmup=3, peak_lr=0.05, amp="none", save_every=2)


class Rows(NamedTuple):
    x: torch.Tensor  # [B, 3]
    counts: torch.Tensor  # [B]
    broken: dict

    def __len__(self):
        return len(self.x)


class Toy(torch.utils.data.Dataset):
    """Row i has 1 + i % 4 targets; `broken` rows cannot be read."""

    def __init__(self, count, broken=()):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def __getitem__(self, at):
        return at[1], torch.randn(3, generator=torch.Generator().manual_seed(at[1]))

    def collate(self, samples):
        good = [(i, x) for i, x in samples if i not in self.broken]
        x = torch.stack([x for _, x in good]) if good else torch.empty(0, 3)
        bad = {str(i): "bad" for i, _ in samples if i in self.broken}
        return Rows(x, torch.tensor([1 + i % 4 for i, _ in good]), bad)


class Regression(Task):
    """Mean over all targets of (w x - j)^2. One parameter never gets a gradient, one is frozen."""

    some_unused = True

    def __init__(self, dropout=0.0):
        super().__init__()
        self.unused, self.frozen = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2), requires_grad=False)
        self.dropout = nn.Dropout(dropout)
        self.layer = nn.Linear(3, 1)

    def count(self, batch):
        return int(batch.counts.sum())

    def forward(self, batch):
        y = self.layer(self.dropout(batch.x))[:, 0].repeat_interleave(batch.counts)
        targets = torch.cat([torch.arange(int(n)) for n in batch.counts])
        return (y - targets).square().mean()


def toy(out: Path, recipe: Recipe, alike=Ranks(), data=None, dropout=0.0, stop=None) -> tuple[State, list]:  # noqa: B008
    torch.manual_seed(1)
    seen = []

    def report(stepped):
        seen.append(stepped)
        if stepped.step == stop:
            raise KeyboardInterrupt

    return train(Regression(dropout), data or Toy(27), recipe, alike, out, report=report), seen


# --- recipe


def test_rates_are_those_of_the_paper():
    recipe = Recipe()
    # Breakfast: 1357 videos, 4 processes with 16 each, 21 steps, so the warm-up ends at 2e-6.
    steps = plan(1357, recipe, Ranks(3, 4), 0)
    assert len(steps) == 21 and {len(batch) for batch in steps} == {16}
    assert learning_rate(recipe, 0, 0, 21) == 1e-8
    assert learning_rate(recipe, 0, 20, 21) == pytest.approx(2e-6, rel=0.01)
    assert learning_rate(recipe, 0, 5000, 21) == 1e-4
    assert learning_rate(recipe, 1, 7, 21) == pytest.approx(1e-4 * 0.99384, rel=1e-5)  # (1 + cos(pi / 20)) / 2
    assert learning_rate(recipe, 10, 0, 21) == pytest.approx(0.5e-4)
    assert learning_rate(recipe, 20, 0, 21) == pytest.approx(0, abs=1e-12)


def test_weight_decay_is_for_what_the_official_names_say():
    model = MALMM.default()
    named = dict(model.named_parameters())
    chosen = {name for name, p in named.items() if p.requires_grad and decays(name, p)}
    with torch.no_grad():
        for name, p in named.items():  # a mark that survives the renaming, cutting and stacking
            p.fill_(float(name in chosen))
    exported = export_malmm(model, "lavis")
    for name, value in exported.items():
        wanted = value.dim() >= 2 and not any(part in name for part in ("bias", "ln", "bn"))
        wanted &= not name.startswith("visual_encoder.")
        assert bool((value == float(wanted)).all()), name
    assert {"time", "qformer.query_tokens", "qformer.keys_values.weight"} <= chosen
    decayed, plain = groups(model, Recipe())
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert len(decayed["params"]) == len(chosen)
    assert not any(p is q for p in model.vision.blocks.parameters() for q in decayed["params"] + plain["params"])


@pytest.mark.parametrize(
    "values, text",
    [({"amp": "half"}, "amp must be"), ({"epochs": 0}, "at least 1, got 0"), ({"speed": 1}, "unknown fields speed")],
)
def test_recipes_that_mean_nothing_are_refused(values, text):
    with pytest.raises(ValueError, match=text):
        Recipe.from_dict(values)


# --- loop


@pytest.mark.parametrize("amp, accumulation", [("none", 1), ("bfloat16", 2), ("float16", 1)])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, amp, accumulation):
    recipe = Recipe(**{**PLAIN, "amp": amp, "accumulation": accumulation})
    whole, seen = toy(tmp_path / "whole", recipe, dropout=0.3)
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path / "cut", recipe, dropout=0.3, stop=5)  # within an epoch, after the checkpoint of step 4
    again, rest = toy(tmp_path / "cut", recipe, dropout=0.3)
    assert [s[:5] for s in rest] == [s[:5] for s in seen[4:]]
    for (name, p), q in zip(whole.task.named_parameters(), again.task.parameters()):
        assert torch.equal(p, q), name
    files = [torch.load(tmp_path / run / CHECKPOINT, weights_only=True) for run in ("whole", "cut")]
    for part in ("model", "optimizer", "scaler", "generators"):
        torch.testing.assert_close(*(file[part] for file in files), rtol=0, atol=0)
    assert "frozen" not in files[0]["model"] and not list(tmp_path.rglob("*.part"))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    toy(tmp_path, Recipe(**PLAIN))
    with pytest.raises(ValueError, match=r"of another run: peak_lr 0.05 \(now 0.1\)"):
        toy(tmp_path, Recipe(**{**PLAIN, "peak_lr": 0.1}))
    with pytest.raises(ValueError, match="needs 40 rows, got 27"):
        toy(tmp_path / "new", Recipe(**{**PLAIN, "batch": 40}))


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    # Without a warm-up, which counts micro-batches.
    small = Recipe(**{**PLAIN, "batch": 2, "accumulation": 4, "start_lr": 0.05})
    large = Recipe(**{**PLAIN, "batch": 8, "start_lr": 0.05})
    states = [toy(tmp_path / str(r.batch), r, data=Toy(24))[0] for r in (small, large)]
    torch.testing.assert_close(*(s.task.layer.weight for s in states), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["tokens", "ranks"])
def test_the_loss_is_the_mean_it_says(tmp_path, reduction):
    recipe = Recipe(**{**PLAIN, "batch": 2, "accumulation": 4, "epochs": 1, "reduction": reduction})
    _, (first,) = toy(tmp_path, recipe, data=Toy(8))
    torch.manual_seed(1)
    fresh, data = Regression(), Toy(8)
    batches = [data.collate([data[at] for at in batch]) for batch in plan(8, recipe, Ranks(), 0)]
    means = torch.stack([fresh(batch) for batch in batches])
    weights = torch.tensor([fresh.count(b) if reduction == "tokens" else 1 for b in batches])
    assert len(set(fresh.count(b) for b in batches)) > 1, "the two means must differ"
    torch.testing.assert_close(torch.tensor(first.loss), (means * weights).sum().detach() / weights.sum())


CASES = {
    "uneven": (dict(batch=2), Toy(27)),
    "accumulated": (dict(batch=2, accumulation=2, clip=0.5), Toy(27)),
    # Some batches of a process hold no sample that can be read.
    "broken": (dict(batch=1), Toy(12, broken=(1, 3, 4, 5, 8, 9, 10))),
    "both": (dict(batch=1, accumulation=3), Toy(12, broken=(1, 3, 4, 5, 8, 9, 10))),
}


def cases(both: Ranks, out: Path):
    for name, (changes, data) in CASES.items():
        state, seen = toy(out / name, Recipe(**(PLAIN | changes)), both, data)
        if both.first:
            torch.save({"seen": [tuple(s[:5]) for s in seen], "model": state.task.state_dict()}, out / f"{name}.pt")


def test_two_processes_are_one(tmp_path):
    """To 1e-5, with other numbers of answers in each, and with processes that read nothing."""
    two_processes(cases, tmp_path)
    for name, (changes, data) in CASES.items():
        one = Recipe(**(PLAIN | changes | {"batch": 2 * changes["batch"]}))
        state, seen = toy(tmp_path / f"{name}-one", one, data=data)
        two = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert [s[1:3] + s[4:] for s in two["seen"]] == [s[1:3] + s[4:5] for s in seen], name
        torch.testing.assert_close([s[3] for s in two["seen"]], [s.loss for s in seen], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(two["model"], dict(state.task.state_dict()), rtol=1e-5, atol=1e-6)
        assert bool((two["model"]["unused"] == 1).all()), "a parameter without gradients must not decay"
        saved = torch.load(tmp_path / name / CHECKPOINT, weights_only=True)
        assert set(saved["broken"]) == set(map(str, data.broken)), name


# --- data


def test_boxes_fit_and_keep_area_and_aspect():
    draws = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(300):
        top, left, h, w = random_box(256, 340, draws)
        assert 0 <= top <= 256 - h and 0 <= left <= 340 - w and 0.74 < w / h < 1.35
        shares.append(h * w / (256 * 340))
    assert 0.49 < min(shares) < 0.55 and max(shares) > 0.9
    assert random_box(10, 100, draws) == (0, (100 - 13) // 2, 10, 13)  # none fits: the middle, as wide as allowed


def test_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"video": "a.mp4", "prompt": "p", "answer": "b", "start": 2}\n\n')
    (tmp_path / "a.csv").write_text("video,prompt,answer,start,end\na.mp4,p,b,2,\n")
    assert rows(tmp_path / "a.jsonl") == rows(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("video,prompt\na.mp4,p\n")
    with pytest.raises(ValueError, match="row 1 of .*b.csv must have video, prompt and answer"):
        rows(tmp_path / "b.csv")


@pytest.mark.parametrize("start, end", [(-1, 2), ("nan", 2), (float("nan"), 2), (0, "inf"), (3, 2), (2, 2), (True, 2),
                                        ("one", 2), ([1], 2), (0, -1), ("1e400", None)])  # fmt: skip
def test_times_that_mean_nothing_are_named(tmp_path, start, end):
    good = {"video": "a.mp4", "prompt": "p", "answer": "b", "start": "1.5", "end": ""}
    (tmp_path / "a.jsonl").write_text(json.dumps(good) + "\n\n" + json.dumps(good | {"start": start, "end": end}))
    with pytest.warns(UserWarning, match=r"row 2 of .*a.jsonl .*\(line 3\)"):
        assert rows(tmp_path / "a.jsonl") == [Row("a.mp4", "p", "b", 1.5)]


# --- MA-LMM, and the command


def test_the_example_is_the_paper():
    config = Config.from_dict(load(Path(pyvidx.train.__file__).parent / "configs/malmm-classification.json"))
    assert (config.frames, config.memory, config.max_answer, config.language_dtype) == (
        100,
        {"length": 20},
        20,
        "float16",
    )
    assert config.recipe == Recipe(reduction="ranks")
    with pytest.raises(ValueError, match="must be float32 or amp's float16, got bfloat16"):
        Config.from_dict({"out": "o", "train": "t", "weights": "w", "language": "l", "language_dtype": "bfloat16"})
    with pytest.raises(ValueError, match="weights must be given"):
        Config.from_dict({"out": "o", "train": "t", "language": "l"})


@pytest.fixture
def run(tmp_path):
    """A configuration, with two videos that can be read and one that cannot, and a random language model."""
    pytest.importorskip("av", reason="reading video needs PyAV: pip install 'pyvidx[video]'")
    mend_torchvision()
    pytest.importorskip("transformers", reason="pip install 'pyvidx[hosts]'")
    from tests.test_language import causal_lm, tokenizer

    causal_lm().save_pretrained(tmp_path / "lm")
    tokenizer().save_pretrained(tmp_path / "lm")
    tokenizer(bos=False).save_pretrained(tmp_path / "text")
    model = MALMM.default()
    no_dropout = replace(model.config, qformer=replace(model.config.qformer, dropout=0.0))
    MALMM(no_dropout).save(tmp_path / "start.safetensors")
    for name, level in (("red.mp4", 40), ("blue.mp4", 200)):
        write(tmp_path / name, torch.full((8, 48, 64, 3), level, dtype=torch.uint8))
    (tmp_path / "broken.mp4").write_bytes(b"this is not a video" * 100)
    samples = [(f"{answer}.mp4", answer) for answer in ("red", "blue", "red", "blue", "broken")]
    lines = [json.dumps({"video": v, "prompt": "what is the color ?", "answer": a}) for v, a in samples]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "held_out.jsonl").write_text("\n".join(lines[:2]))
    recipe = {"epochs": 6, "batch": 5, "warmup": 1, "start_lr": 0.01, "peak_lr": 0.01, "amp": "none", "save_every": 1}
    values = {
        "out": str(tmp_path / "out"), "train": str(tmp_path / "train.jsonl"), "root": str(tmp_path),
        "held_out": str(tmp_path / "held_out.jsonl"), "weights": str(tmp_path / "start.safetensors"),
        "language": str(tmp_path / "lm"), "text_tokenizer": str(tmp_path / "text"), "language_dtype": "float32",
        "frames": 4, "memory": {"length": 2}, "recipe": recipe,
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(values))
    return tmp_path, values


def test_the_command(run, monkeypatch, capsys):
    folder, values = run
    arguments = ["train", "malmm", "--config", str(folder / "run.json"), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["pyvidx", *arguments, "--export", str(folder / "tuned.pth")])
    # Killed between the third checkpoint and the end of its epoch.
    with monkeypatch.context() as patched:
        patched.setattr(Shown, "epoch", lambda self, state, loss, best: 1 / (state.epoch != 3))
        with pytest.raises(ZeroDivisionError):
            pyvidx_main()
    assert pyvidx_main() == 0
    shown = capsys.readouterr()
    assert "going on after step 3, epoch 2" in shown.err and "1 videos could not be read" in shown.err
    out = folder / "out"
    lines = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert losses[-1] < losses[0] - 0.1 and {line["count"] for line in lines if "count" in line} == {8}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    (broken,) = [json.loads(line) for line in (out / "broken.jsonl").read_text().splitlines()]
    assert broken["video"] == "broken.mp4" and broken["error"]

    start, last = MALMM.from_pretrained(folder / "start.safetensors"), MALMM.from_pretrained(out / "last.safetensors")
    moved = {n for (n, p), q in zip(start.named_parameters(), last.parameters()) if not torch.equal(p, q)}
    unused = {n for n in dict(start.named_parameters()) if n.startswith("qformer.layers.3.feed_text.")}
    assert moved == {n for n, p in start.named_parameters() if p.requires_grad} - unused
    assert bool((last.time[3] != 0).all()) and not last.time[:3].any() and not last.time[4:].any()
    tuned = MALMM.from_pretrained(folder / "start.safetensors")
    load_malmm_weights(tuned, folder / "tuned.pth", allow_missing=["vision.[!n]*"])
    for (name, p), q in zip(tuned.named_parameters(), last.parameters()):
        assert torch.equal(p, q), name
    assert (out / "best.safetensors").exists()


def test_other_rows_and_language_models_are_another_run(run, capsys):
    from tests.test_language import causal_lm, tokenizer

    folder, values = run
    values["recipe"] |= {"epochs": 1}
    values["held_out"] = None

    def command(**changes) -> str:
        (folder / "run.json").write_text(json.dumps(values | changes))
        with pytest.raises(SystemExit):
            train_command(["malmm", "--config", str(folder / "run.json"), "--device", "cpu"])
        return capsys.readouterr().err

    (folder / "run.json").write_text(json.dumps(values))
    train_command(["malmm", "--config", str(folder / "run.json"), "--device", "cpu"])
    causal_lm(seed=5).save_pretrained(folder / "other")
    tokenizer(bos=False).save_pretrained(folder / "other")
    other = folder / "other.jsonl"
    other.write_text((folder / "train.jsonl").read_text().replace('"blue"', '"cup"'))
    assert "of another run: frozen weights" in command(language=str(folder / "other"), tokenizer=str(folder / "lm"))
    assert "of another run: tokenizer" in command(tokenizer=str(folder / "other"))
    assert "of another run: content of rows" in command(train=str(other))
    assert "of another run: frames 4 (now 3)" in command(frames=3)
    assert "of another run: memory {'length': 2} (now {'length': 3})" in command(memory={"length": 3})


def test_the_command_refuses(run):
    folder, values = run
    (folder / "bad.json").write_text(json.dumps(values | {"frames": 99}))
    (folder / "worse.json").write_text(json.dumps(values | {"language": "some/name"}))
    for name in ("bad", "worse", "missing"):
        with pytest.raises(SystemExit):
            train_command(["malmm", "--config", str(folder / f"{name}.json"), "--device", "cpu"])
