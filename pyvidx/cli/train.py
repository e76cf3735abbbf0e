"""pyvidx train malmm|chat|pretrain --config FILE"""

import argparse
import contextlib
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from pyvidx.cli import arguments
from pyvidx.files import check_output
from pyvidx.hosts.open import parse_module
from pyvidx.train import recipe as recipes
from pyvidx.train.checkpoint import CHECKPOINT
from pyvidx.train.curve import Board, Curve, held_out_row, progress
from pyvidx.train.distributed import Ranks, ranks
from pyvidx.train.loop import State, Stepped, train
from pyvidx.train.outputs import written

# Each module has a Config, build(config, device) -> Task and datasets(config, task, ranks) -> training, held out.
KINDS = {
    "malmm": "fine-tune MA-LMM on answers",
    "chat": "tune branch and projector of a chat model on answers",
    "pretrain": "pretrain an encoder on captions, or by UMT",
}


def parser() -> argparse.ArgumentParser:
    p = arguments.Parser(
        prog="pyvidx train",
        description="Train a model; on several devices with torchrun --nproc-per-node N -m pyvidx train ... . A run "
        "that was ended goes on where its last checkpoint was written, with the same command.",
        example="pyvidx train malmm --config pyvidx/train/configs/malmm-classification.json",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("what", choices=list(KINDS), help="; ".join(f"{name}: {what}" for name, what in KINDS.items()))
    p.add_argument("--config", type=arguments.existing, required=True, help=".json or .toml, see pyvidx/train/configs")
    p.add_argument("--module", type=arguments.module, help="of pretrain: the temporal module, e.g. stan:depth=2, in "
                   "place of the configuration's")  # fmt: skip
    p.add_argument("--device", choices=["cuda", "cpu"], help="default: GPUs if there are any")
    p.add_argument("--export", type=Path, help="also write the weights under the public code's names, .safetensors or"
                   " .pth as the public code does")  # fmt: skip
    arguments.add_overwrite(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(argv)
    kind = importlib.import_module(f"pyvidx.train.{options.what}")
    try:
        values = recipes.load(options.config)
        if options.module is not None:
            values["module"] = chosen(options.what, options.module)
        config = kind.Config.from_dict(values)
        check_outputs(Path(config.out), options.export, options.overwrite)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda needs a GPU that torch can use, and there is none; give --device cpu")
    except (OSError, ValueError) as error:
        p.error(str(error))
    with ranks(options.device) as alike:
        try:
            task = kind.build(config, alike.device)
            if options.export is not None and not task.exportable:
                raise ValueError("--export: the public code has no names for the weights of this run")
            if alike.first and task.said:
                print(task.said, file=sys.stderr)
            data, held_out = kind.datasets(config, task, alike)
            out = Path(config.out)
            with Shown(out, alike, config.recipe.epochs) as shown:
                state = train(
                    task, data, config.recipe, alike, out, held_out=held_out,
                    report=shown.step, after_epoch=shown.epoch, started=shown.start,
                )  # fmt: skip
            broken = {name: why for part in alike.gathered(state.broken) for name, why in part.items()}
            if alike.first:
                finish(state, broken, out, options.export)
        except (OSError, ValueError, SafetensorError) as error:
            p.error(str(error))
    return 0


def chosen(what: str, module: str) -> dict:
    """--module as a configuration has it.

    Raises:
        ValueError: it is for another kind of training.
    """
    if what != "pretrain":
        raise ValueError(f"--module is of `pyvidx train pretrain`, not of {what}")
    name, sizes = parse_module(module)
    return {"name": name} | {key: list(v) if isinstance(v, tuple) else v for key, v in sizes.items()}


def check_outputs(out: Path, export: Path | None, overwrite: bool) -> None:
    """Raise before any work is done if what a run writes cannot be written, or would be written over another's.

    Raises:
        ValueError: `export` has another suffix.
        FileExistsError: there are weights, and no checkpoint of the run that wrote them.
        OSError: a folder cannot be written to.
    """
    if export is not None and export.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"--export must end in .safetensors or .pth, got {export}")
    resumed = (out / CHECKPOINT).exists()
    check_output(out / CHECKPOINT)
    check_output(out / "last.safetensors", overwrite=overwrite or resumed)
    if export is not None:
        check_output(export, overwrite=overwrite or resumed)


def finish(state: State, broken: dict[str, str], out: Path, export: Path | None) -> None:
    """The weights and the list of what could not be read."""
    print(f"wrote {write_model(state, out / 'last.safetensors')} after {state.step} steps")
    if export is not None:
        state.task.export(export, state.epoch - 1)
        print(f"wrote {export}")
    listed = out / "broken.jsonl"
    with written(listed) as part:
        part.write_text("".join(json.dumps({"video": v, "error": why}) + "\n" for v, why in sorted(broken.items())))
    if broken:
        print(f"{len(broken)} videos could not be read, see {listed}", file=sys.stderr)


def write_model(state: State, path: Path) -> Path:
    model = state.task.model
    model.is_random = False
    return model.save(path)


class Shown(contextlib.AbstractContextManager):
    """Progress bar, loss curves and best weights of the first process; the others show nothing."""

    def __init__(self, out: Path, alike: Ranks, epochs: int):
        self.out, self.first, self.epochs = out, alike.first, epochs
        self.bar = self.curve = self.board = None

    def start(self, state: State, steps: int) -> None:
        if not self.first:
            return
        self.curve = Curve(self.out, state.step, state.epoch)
        self.board = Board(self.out, self.curve.kept)
        if state.step:
            print(f"going on after step {state.step}, epoch {state.epoch}", file=sys.stderr)
        self.bar = progress(steps * self.epochs, state.step)

    def step(self, stepped: Stepped) -> None:
        if not self.first:
            return
        self._note(stepped._asdict())
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix(epoch=stepped.epoch, loss=f"{stepped.loss:.4f}", lr=f"{stepped.rate:.2e}")

    def epoch(self, state: State, loss: float | None, best: bool) -> None:
        if not self.first:
            return
        if loss is not None:
            self._note(held_out_row(state.step, state.epoch - 1, loss))
            if best:
                write_model(state, self.out / "best.safetensors")
        self.curve.draw()

    def _note(self, row: dict) -> None:
        self.curve.add(row)
        self.board.add(row)

    def __exit__(self, *exception) -> None:
        for part in (self.bar, self.board):
            if part is not None:
                part.close()
