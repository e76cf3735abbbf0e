"""Training: the recipe's numbers, resuming to the same bits, two processes as one, and the command from end to end."""

import os
import socket
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from pyvidx.integrations.malmm_checkpoints import export_malmm
from pyvidx.models import MALMM
from pyvidx.train import Ranks, Recipe, State, Task, ranks, train
from pyvidx.train.data import plan, random_box, rows
from pyvidx.train.loop import CHECKPOINT
from pyvidx.train.recipe import decays, groups, learning_rate

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
    assert learning_rate(recipe, 0, 0) == 1e-8
    assert learning_rate(recipe, 0, 20) == pytest.approx(2e-6, rel=0.01)
    assert learning_rate(recipe, 0, 5000) == 1e-4
    assert learning_rate(recipe, 1, 7) == pytest.approx(1e-4 * 0.99384, rel=1e-5)  # (1 + cos(pi / 20)) / 2
    assert learning_rate(recipe, 10, 0) == pytest.approx(0.5e-4)
    assert learning_rate(recipe, 20, 0) == pytest.approx(0, abs=1e-12)


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
    # A warm-up that is over at once: it counts micro-batches.
    small = Recipe(**{**PLAIN, "batch": 2, "accumulation": 4, "warmup": 0})
    large = Recipe(**{**PLAIN, "batch": 8, "warmup": 0})
    states = [toy(tmp_path / str(r.batch), r, data=Toy(24))[0] for r in (small, large)]
    torch.testing.assert_close(*(s.task.layer.weight for s in states), rtol=1e-5, atol=1e-6)


CASES = {
    "uneven": (dict(batch=2), Toy(27)),
    "accumulated": (dict(batch=2, accumulation=2, clip=0.5), Toy(27)),
    # Some batches of a process hold no sample that can be read.
    "broken": (dict(batch=1), Toy(12, broken=(1, 3, 4, 5, 8, 9, 10))),
    "both": (dict(batch=1, accumulation=3), Toy(12, broken=(1, 3, 4, 5, 8, 9, 10))),
}


def _process(rank: int, out: Path):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    with ranks("cpu") as both:
        for name, (changes, data) in CASES.items():
            state, seen = toy(out / name, Recipe(**(PLAIN | changes)), both, data)
            if both.first:
                torch.save({"seen": [tuple(s[:5]) for s in seen], "model": state.task.state_dict()}, out / f"{name}.pt")


def test_two_processes_are_one(tmp_path, monkeypatch):
    """To 1e-5, with other numbers of answers in each, and with processes that read nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    torch.multiprocessing.spawn(_process, (tmp_path,), nprocs=2)
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
