"""What a run shows: one JSON line per step, a picture of the loss, TensorBoard, and a progress bar."""

import importlib.util
import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from pyvidx.pictures import drawn
from pyvidx.train.outputs import written


def held_out_row(step: int, epoch: int, loss: float) -> dict:
    """The line of an epoch's held-out loss; JSON has no NaN."""
    return {"step": step, "epoch": epoch, "held_out": loss if math.isfinite(loss) else None}


class Curve:
    """loss.jsonl and loss.png in a folder.

    Args:
        folder: of the run.
        step, epoch: where the run goes on. Lines of later steps, and of the end of this epoch and later ones, are
            dropped: they are taken again.
    """

    def __init__(self, folder: Path, step: int, epoch: int):
        self.lines, self.picture = folder / "loss.jsonl", folder / "loss.png"
        # Of two lines of the same the latter.
        rows = {(held := "held_out" in row, row["epoch" if held else "step"]): row for row in self.rows()}
        self.kept = [row for (held, at), row in rows.items() if (at < epoch if held else at <= step)]
        with written(self.lines) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in self.kept))

    def rows(self) -> list[dict]:
        """What was written; what a kill or a power cut left of a line is left out."""
        if not self.lines.exists():
            return []
        return [row for line in self.lines.read_bytes().splitlines() if (row := _row(line)) is not None]

    def add(self, row: dict) -> None:
        with self.lines.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def draw(self) -> None:
        """Loss and its parts over steps, held-out losses as dots, and the learning rate."""
        if importlib.util.find_spec("matplotlib") is None:
            warnings.warn("no picture of the loss: pip install 'pyvidx[cli]'", stacklevel=2)
            return
        rows = self.rows()
        steps, held = [r for r in rows if "loss" in r], [r for r in rows if r.get("held_out") is not None]
        with written(self.picture) as part, drawn(part, 8, 4, "train") as figure:
            axes = figure.subplots()
            axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], label="training")
            for name in steps[0]["parts"] if steps else ():
                axes.plot([r["step"] for r in steps], [r["parts"].get(name) for r in steps], lw=0.8, label=name)
            if held:
                axes.plot([r["step"] for r in held], [r["held_out"] for r in held], "o", label="held out")
            axes.set(xlabel="step", ylabel="loss")
            axes.legend()
            right = axes.twinx()
            right.plot([r["step"] for r in steps], [r["rate"] for r in steps], color="0.7")
            right.set_ylabel("learning rate (gray)")


class Board:
    """The same for TensorBoard, in the folder's tensorboard/; nothing but a note where that is not installed.

    Its events are written in batches and never changed, so a kill loses some and the steps taken again would be there
    twice: they are made anew from the lines that were kept.
    """

    def __init__(self, folder: Path, kept: Sequence[dict]):
        self.writer = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("no TensorBoard: pip install 'pyvidx[train]'", file=sys.stderr)
            return
        for events in (folder / "tensorboard").glob("events.out.tfevents.*"):
            events.unlink()
        self.writer = SummaryWriter(folder / "tensorboard")
        for row in kept:
            self.add(row)

    def add(self, row: dict) -> None:
        if "held_out" in row:
            values = {"held_out/loss": row["held_out"]}
        else:
            own = {name: row[name] for name in ("loss", "rate", "norm")}
            values = {f"train/{name}": value for name, value in (own | row["parts"]).items()}
        for name, value in values.items():
            if value is not None and self.writer is not None:
                self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def progress(total: int, initial: int = 0, unit: str = "step"):
    """tqdm's bar on a terminal; None elsewhere, and with a note where it is not installed."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        print("no progress bar: pip install 'pyvidx[cli]'", file=sys.stderr)
        return None
    return tqdm(total=total, initial=initial, unit=unit)


def _row(line: bytes) -> dict | None:
    """A line of a step or an epoch; None: it is none, or not all of it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not all(type(row.get(name)) is int for name in ("step", "epoch")):
        return None
    if "held_out" in row:
        return row if row["held_out"] is None or _is_number(row["held_out"]) else None
    parts, norm = row.get("parts"), row.get("norm")
    numbers = [row.get("loss"), row.get("rate"), *([] if norm is None else [norm])]
    whole = isinstance(parts, dict) and all(map(_is_number, [*numbers, *parts.values()]))
    return row | {"norm": norm} if whole else None


def _is_number(value: object) -> bool:
    return type(value) in (int, float)
