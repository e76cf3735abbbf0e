"""What a run goes on from: its own whole checkpoint, weights and rows and nothing else; and what its files hold after
kills, cuts and full disks."""

import contextlib
import json
import os
import random
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pyvidx.cli.train import check_outputs
from pyvidx.train import Ranks, Recipe, State, train
from pyvidx.train.checkpoint import CHECKPOINT, identity, restore
from pyvidx.train.curve import Board, Curve, held_out_row
from pyvidx.train.data import Row, Videos
from pyvidx.train.loop import begin
from pyvidx.train.outputs import sweep, written
from tests.test_train import PLAIN, Regression, Rows, Toy

RECIPE = Recipe(**PLAIN | {"epochs": 2, "amp": "float16"})


class Named(Toy):
    """Rows that say what they are."""

    def __init__(self, count, name):
        super().__init__(count)
        self.name = name

    def digest(self):
        return self.name


def run(out: Path, data=None, held_out=None, seed=1, frozen=1.0) -> State:
    torch.manual_seed(seed)
    task = Regression()
    task.frozen.data.fill_(frozen)
    return train(task, data or Named(12, "rows"), RECIPE, Ranks(), out, held_out=held_out)


# --- other weights, rows


@pytest.mark.parametrize(
    "change, text",
    [
        ({"seed": 2}, "start weights"),
        ({"frozen": 2.0}, "frozen weights"),
        ({"data": Named(12, "others")}, r"content of rows rows \(now others\)"),
        ({"data": Named(13, "rows")}, r"rows 12 \(now 13\)"),
        ({"held_out": Named(8, "others")}, "content of held-out rows held out .now others."),
        ({"held_out": None}, "content of held-out rows held out .now None."),
    ],
)
def test_other_weights_and_rows_are_refused(tmp_path, change, text):
    own = {"held_out": Named(8, "held out")}
    run(tmp_path, **own)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(ValueError, match=rf"checkpoint.pt is of another run: {text}") as error:
        run(tmp_path, **own | change)
    assert "\n" not in str(error.value) and (tmp_path / CHECKPOINT).read_bytes() == before
    run(tmp_path, **own)


def test_rows_are_what_they_say():
    first = Row("a.mp4", "p", "b", 1.0, None)
    others = [Row("b.mp4", "p", "b", 1.0), Row("a.mp4", "p", "c", 1.0), Row("a.mp4", "p", "b", None, 1.0),
              Row("\udcff.mp4", "p", "b", 1.0)]  # fmt: skip
    digests = {Videos([row], ".", frames=2).digest() for row in [first, *others]}
    assert len(digests) == 5 and Videos([first], "elsewhere", frames=9, train=False).digest() in digests


class Unread(Named):
    """Rows of which some cannot be read, by names of any bytes."""

    def collate(self, samples):
        good = super().collate(samples)
        return Rows(good.x, good.counts, {os.fsdecode(b"caf\xe9.mp4"): "why \udcff", "b": "why"})


def test_names_that_are_not_utf_8_do_not_cost_the_run(tmp_path):
    first = run(tmp_path, Unread(12, "rows"))
    again = run(tmp_path, Unread(12, "rows"))
    assert again.broken == first.broken == {os.fsdecode(b"caf\xe9.mp4"): "why \udcff", "b": "why"}


# --- damaged checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    run(out)
    return out / CHECKPOINT


def again(path: Path) -> State:
    torch.manual_seed(1)
    task, data = Regression(), Named(12, "rows")
    state = begin(task, RECIPE, Ranks())
    return restore(state, path, identity(task, RECIPE, Ranks(), data, None), RECIPE, Ranks(), 3)


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        again(path)
    text = str(error.value)
    assert str(path) in text and "remove it to begin again" in text and len(text) < 1000, text
    return text


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.99])
def test_cut_checkpoints_are_named(checkpoint, tmp_path, share):
    content = checkpoint.read_bytes()
    for name, damaged in (("cut", content[: int(share * len(content))]),
                          ("nul", content[: int(share * len(content))].ljust(len(content), b"\0"))):  # fmt: skip
        path = tmp_path / f"{name}.pt"
        path.write_bytes(damaged)
        refused(path)


def test_flipped_bytes_are_found(checkpoint, tmp_path):
    """Each of 60 is refused or, where zip does not look at it, changes nothing."""
    content, draws = checkpoint.read_bytes(), random.Random(0)
    want = again(checkpoint)
    found = 0
    for _ in range(60):
        damaged = bytearray(content)
        damaged[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
        path = tmp_path / "flipped.pt"
        path.write_bytes(damaged)
        try:
            got = again(path)
        except ValueError as error:
            found += str(path) in str(error)
            continue
        found += 1
        for p, q in zip(got.task.parameters(), want.task.parameters()):
            assert torch.equal(p, q)
        assert (got.step, got.epoch, got.position, got.best) == (want.step, want.epoch, want.position, want.best)
    assert found == 60


class Code:
    """A pickle that would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def changed(saved: dict, *keys, value) -> dict:
    """A copy with one value of it replaced; value may be a function of the old one."""
    if not keys:
        return value(saved) if callable(value) else value
    part = dict(saved) if isinstance(saved, dict) else list(saved)
    part[keys[0]] = changed(part[keys[0]], *keys[1:], value=value)
    return part


HUGE = torch.empty(1).expand(10**12)  # a file of a few bytes that claims 4 TB
HOSTILE = [
    (("step",), -1), (("step",), 10**30), (("step",), True), (("step",), "4"), (("step",), 2.0), (("step",), None),
    (("epoch",), 3), (("epoch",), -1), (("position",), 10**9), (("position",), 1), (("best",), float("nan")),
    (("best",), float("inf")), (("best",), "0.1"), (("broken",), []), (("broken",), {"a": 1}), (("broken",), {1: "a"}),
    (("model",), {}), (("model",), None), (("model", "layer.weight"), HUGE), (("model", "layer.weight"), [[1.0] * 3]),
    (("model", "layer.weight"), torch.zeros(3, 1)), (("model", "layer.weight"), torch.zeros(1, 3).double()),
    (("model", "layer.weight"), torch.zeros(1, 3).to_sparse()), (("model", "layer.weight"), torch.zeros(1, 3).cfloat()),
    (("model", "layer.weight"), torch.empty(1, 3, device="meta")), (("model",), lambda m: m | {"more": torch.ones(1)}),
    (("optimizer",), {}), (("optimizer",), None), (("optimizer", "state"), []), (("optimizer", "state", 1), {}),
    (("optimizer", "state"), lambda s: s | {99: s[1]}), (("optimizer", "state"), lambda s: s | {"1": s[1]}),
    (("optimizer", "state", 1, "exp_avg"), HUGE), (("optimizer", "state", 1, "exp_avg_sq"), torch.ones(2)),
    (("optimizer", "state", 1, "step"), torch.tensor(float("nan"))),
    (("optimizer", "state", 1, "step"), torch.tensor(1e9)), (("optimizer", "state", 1, "step"), torch.tensor(-1.0)),
    (("optimizer", "state", 1, "step"), torch.ones(3)), (("optimizer", "state", 1, "step"), 1),
    (("optimizer", "param_groups"), []), (("optimizer", "param_groups"), None), (("optimizer", "param_groups", 0), 1),
    (("optimizer", "param_groups", 1, "lr"), torch.ones(2)), (("optimizer", "param_groups", 0, "lr"), float("inf")),
    (("scaler",), {}), (("scaler",), None), (("scaler", "scale"), -1.0), (("scaler", "scale"), float("nan")),
    (("scaler", "growth_interval"), 0), (("scaler", "_growth_tracker"), 10**9), (("scaler", "scale"), "big"),
    (("generators",), []), (("generators",), None), (("generators",), lambda g: g * 2), (("generators", 0), {}),
    (("generators", 0, "cpu"), torch.zeros(5056, dtype=torch.uint8)),
    (("generators", 0, "cpu"), torch.full((5056,), 255, dtype=torch.uint8)),
    (("generators", 0, "cpu"), torch.zeros(3, dtype=torch.uint8)), (("generators", 0, "cpu"), HUGE),
    (("run",), None), (("run",), []),
]  # fmt: skip


@pytest.mark.parametrize("keys, value", HOSTILE, ids=lambda v: "-".join(map(str, v)) if isinstance(v, tuple) else None)
def test_values_that_no_run_has_are_refused(checkpoint, tmp_path, keys, value):
    saved = torch.load(checkpoint, weights_only=True)
    path = tmp_path / "hostile.pt"
    torch.save(changed(saved, *keys, value=value), path)
    refused(path)


@pytest.mark.parametrize("key", ["step", "epoch", "position", "broken", "best", "model", "optimizer", "scaler",
                                 "generators", "run"])  # fmt: skip
def test_what_lacks_a_part_is_refused(checkpoint, tmp_path, key):
    saved = torch.load(checkpoint, weights_only=True)
    del saved[key]
    torch.save(saved, tmp_path / "part.pt")
    refused(tmp_path / "part.pt")


def test_no_code_of_a_checkpoint_runs(tmp_path):
    torch.save({"run": Code(tmp_path / "written")}, tmp_path / "code.pt")
    refused(tmp_path / "code.pt")
    assert not (tmp_path / "written").exists()
    torch.save([1, 2], tmp_path / "list.pt")
    assert "no dict but list" in refused(tmp_path / "list.pt")
    torch.save({"run": {}}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pt")


def test_hostile_values_are_shown_in_short(tmp_path):
    nested = []
    for _ in range(40):  # 2^40 parts to whoever prints or compares all of it
        nested = [nested, nested]
    for value in (nested, HUGE, {"a": HUGE}, [HUGE, HUGE], "x" * 10**6, -(10**200)):
        torch.save({"run": {"betas": value, "multipliers": value, "seed": value}}, tmp_path / "run.pt")
        with pytest.raises(ValueError, match="of another run: .*seed") as error:
            again(tmp_path / "run.pt")
        assert len(str(error.value)) < 5000


def test_packed_entries_are_not_unfolded(checkpoint, tmp_path):
    path = tmp_path / "packed.pt"
    with zipfile.ZipFile(checkpoint) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert "entries are not those" in refused(path)


# --- loss.jsonl


def step_row(step: int, epoch: int, **more) -> dict:
    own = {"rate": 0.1, "loss": 1.0 / step, "count": 4, "norm": None, "seconds": 0.5, "parts": {"vtc": 1.0}}
    return {"step": step, "epoch": epoch} | own | more


ROWS = [step_row(1, 0), step_row(2, 0), held_out_row(2, 0, 0.5), step_row(3, 1), step_row(4, 1)]


def written_rows(folder: Path) -> list:
    return [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "tail",
    [b"", b'{"step": 5, "ep', b"\0" * 5000, b'{"step": 5}\n', b"null\n[]\n7\n", b"\xff\xfe\n", b"[" * 100_000,
     b'{"step": 3, "epoch": 1, "rate": 0.1, "loss": "1", "norm": null, "parts": {}}\n',
     json.dumps(ROWS[3]).encode() + b"\n", json.dumps(ROWS[2]).encode() + b"\n"],
    ids=["none", "cut", "nul", "other", "no objects", "no text", "deep", "text", "twice", "held out twice"],
)  # fmt: skip
def test_losses_have_no_row_twice_and_survive_a_cut(tmp_path, tail):
    (tmp_path / "loss.jsonl").write_bytes("".join(json.dumps(row) + "\n" for row in ROWS).encode() + tail)
    curve = Curve(tmp_path, 3, 1)
    assert written_rows(tmp_path) == ROWS[:4] == curve.kept
    curve.add(ROWS[4])
    assert written_rows(tmp_path) == ROWS
    curve.draw()
    # Killed between the held-out loss of epoch 0 and the checkpoint after it: that is noted again.
    assert Curve(tmp_path, 2, 0).kept == ROWS[:2]
    assert Curve(tmp_path, 0, 0).kept == [] and written_rows(tmp_path) == []


def test_a_loss_that_is_no_number_is_json(tmp_path):
    curve = Curve(tmp_path, 0, 0)
    curve.add(held_out_row(2, 0, float("nan")))
    curve.draw()
    assert written_rows(tmp_path) == [{"step": 2, "epoch": 0, "held_out": None}]


def test_tensorboard_has_no_step_twice(tmp_path):
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="pip install 'pyvidx[train]'"
    )
    first = Board(tmp_path, [])
    for row in ROWS:
        first.add(row)
    first.writer.flush()  # and no close, as of a run that was killed
    second = Board(tmp_path, ROWS[:4])
    second.add(ROWS[4])
    second.close()
    read = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in read.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [e.step for e in read.Scalars("held_out/loss")] == [2]


# --- outputs


@pytest.fixture
def full_disk():
    """No file of this process grows beyond 2 KB, which ends writes as a full disk does."""
    resource = pytest.importorskip("resource", reason="limits of files are POSIX's")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return full


def figure(path):
    from matplotlib.figure import Figure

    Figure().savefig(path)


WRITERS = {
    "checkpoint.pt": lambda path: torch.save(torch.zeros(10**5), path),
    "tuned.safetensors": lambda path: save_file({"a": torch.zeros(10**5)}, path),
    "broken.jsonl": lambda path: path.write_text("x" * 10**5),
    "loss.png": figure,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_what_was_there(tmp_path, full_disk, name):
    path = tmp_path / name
    WRITERS[name](path)
    before = path.read_bytes()
    with pytest.raises(OSError, match=f"{name} could not be written, and is as it was before"), full_disk():
        with written(path) as part:
            WRITERS[name](part)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [name]
    with written(path) as part:
        WRITERS[name](part)


def test_what_a_killed_safetensors_left_is_removed(tmp_path):
    for name in (".tmpAb12Xy", ".tmp", "a.tmpAb12Xy"):
        (tmp_path / name).write_text("left")
    sweep(tmp_path, age=60)
    assert (tmp_path / ".tmpAb12Xy").exists()
    run(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".tmp", "a.tmpAb12Xy", CHECKPOINT]


def test_a_run_whose_disk_was_full_goes_on(tmp_path, full_disk):
    want = run(tmp_path / "whole")
    with pytest.raises(OSError, match="checkpoint.pt could not be written"), full_disk():
        run(tmp_path / "full")
    assert os.listdir(tmp_path / "full") == []
    got = run(tmp_path / "full")
    for p, q in zip(got.task.parameters(), want.task.parameters()):
        assert torch.equal(p, q)


def test_outputs_are_checked_before_any_work(tmp_path):
    out = tmp_path / "out"
    check_outputs(out, tmp_path / "sub/tuned.pth", False)
    with pytest.raises(ValueError, match="must end in"):
        check_outputs(out, tmp_path / "tuned.bin", False)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written to"):
        check_outputs(tmp_path / "file/out", None, False)
    (tmp_path / "tuned.pth").write_text("another's")
    with pytest.raises(FileExistsError, match="tuned.pth exists; .*--overwrite"):
        check_outputs(out, tmp_path / "tuned.pth", False)
    check_outputs(out, tmp_path / "tuned.pth", True)
    (out / "last.safetensors").write_text("another's")
    with pytest.raises(FileExistsError, match="last.safetensors exists"):
        check_outputs(out, None, False)
    (out / CHECKPOINT).write_text("")  # of the run that goes on
    check_outputs(out, tmp_path / "tuned.pth", False)
    (out / "folder.pth").mkdir()
    with pytest.raises(IsADirectoryError):
        check_outputs(out, out / "folder.pth", True)
