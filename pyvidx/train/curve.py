"""What a run shows: one JSON line per step, a picture of the loss, TensorBoard, and a progress bar."""

import json
import sys
import warnings
from pathlib import Path

from pyvidx.train.loop import Stepped


class Curve:
    """loss.jsonl and loss.png in a folder. Lines after `step` are dropped: a resumed run takes those steps again."""

    def __init__(self, folder: Path, step: int):
        self.lines, self.picture = folder / "loss.jsonl", folder / "loss.png"
        kept = [row for row in self.rows() if row["step"] <= step]
        self.lines.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def rows(self) -> list[dict]:
        """What was written; a line cut off by a kill is left out."""
        if not self.lines.exists():
            return []
        return [json.loads(line) for line in self.lines.read_text().splitlines() if line.endswith("}")]

    def add(self, stepped: Stepped) -> None:
        self._write(stepped._asdict())

    def add_held_out(self, step: int, epoch: int, loss: float) -> None:
        self._write({"step": step, "epoch": epoch, "held_out": loss})

    def draw(self) -> None:
        """Loss and its parts over steps, held-out losses as dots, and the learning rate."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            warnings.warn("no picture of the loss: pip install 'pyvidx[cli]'", stacklevel=2)
            return
        rows = self.rows()
        steps, held = [r for r in rows if "loss" in r], [r for r in rows if "held_out" in r]
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], label="training")
        for name in steps[0].get("parts", {}) if steps else ():
            axes.plot([r["step"] for r in steps], [r["parts"][name] for r in steps], lw=0.8, label=name)
        if held:
            axes.plot([r["step"] for r in held], [r["held_out"] for r in held], "o", label="held out")
        axes.set(xlabel="step", ylabel="loss")
        axes.legend()
        right = axes.twinx()
        right.plot([r["step"] for r in steps], [r["rate"] for r in steps], color="0.7")
        right.set_ylabel("learning rate (gray)")
        figure.savefig(self.picture)

    def _write(self, row: dict) -> None:
        with self.lines.open("a") as file:
            file.write(json.dumps(row) + "\n")


class Board:
    """The same for TensorBoard, in the folder's tensorboard/; nothing but a note where that is not installed.

    Steps after `step` are taken to be void: a resumed run takes them again.
    """

    def __init__(self, folder: Path, step: int):
        self.writer = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("no TensorBoard: pip install 'pyvidx[train]'", file=sys.stderr)
            return
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def add(self, stepped: Stepped) -> None:
        values = {"loss": stepped.loss, "rate": stepped.rate, "norm": stepped.norm, **stepped.parts}
        for name, value in values.items():
            if value is not None:
                self._write(f"train/{name}", value, stepped.step)

    def add_held_out(self, step: int, loss: float) -> None:
        self._write("held_out/loss", loss, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _write(self, name: str, value: float, step: int) -> None:
        if self.writer is not None:
            self.writer.add_scalar(name, value, step)


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
