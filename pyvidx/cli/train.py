"""python -m pyvidx train malmm --config FILE"""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from pyvidx.train import recipe as recipes
from pyvidx.train.curve import Curve
from pyvidx.train.data import Videos, rows
from pyvidx.train.distributed import Ranks, ranks
from pyvidx.train.loop import State, Stepped, train


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m pyvidx train",
        description="Train a model; on several devices with torchrun --nproc-per-node N -m pyvidx train ... . A run "
        "that was ended goes on where its last checkpoint was written, with the same command.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("what", choices=["malmm"], help="malmm: fine-tune MA-LMM on answers")
    p.add_argument("--config", type=Path, required=True, help=".json or .toml, see pyvidx/train/configs")
    p.add_argument("--device", choices=["cuda", "cpu"], help="default: GPUs if there are any")
    p.add_argument("--export", type=Path, help="also write the trained part under the public code's names, .safetensors"
                   " or .pth as the public code does")  # fmt: skip
    return p


def main(argv: Sequence[str] | None = None) -> int:
    from pyvidx.train.malmm import Config, build

    p = parser()
    options = p.parse_args(argv)
    if options.export is not None and options.export.suffix not in (".safetensors", ".pth"):
        p.error(f"--export must end in .safetensors or .pth, got {options.export}")
    with ranks(options.device) as alike:
        try:
            config = Config.from_dict(recipes.load(options.config))
            task = build(config, alike.device)
            make = {
                "root": config.root, "frames": config.frames, "size": task.model.config.vision.image_size,
                "preset": config.preset, "seed": config.recipe.seed, "reader": config.reader,
            }  # fmt: skip
            data = Videos(rows(config.train), **make)
            held_out = None if config.held_out is None else Videos(rows(config.held_out), train=False, **make)
            out = Path(config.out)
            with Shown(out, alike, config.recipe.epochs) as shown:
                state = train(
                    task, data, config.recipe, alike, out, held_out=held_out,
                    report=shown.step, after_epoch=shown.epoch, started=shown.start,
                )  # fmt: skip
        except (FileNotFoundError, ValueError) as error:
            p.error(str(error))
        broken = {name: why for part in alike.gathered(state.broken) for name, why in part.items()}
        if alike.first:
            finish(state, broken, out, options.export)
    return 0


def finish(state: State, broken: dict[str, str], out: Path, export: Path | None) -> None:
    """The weights and the list of what could not be read."""
    print(f"wrote {write_model(state, out / 'last.safetensors')} after {state.step} steps")
    if export is not None:
        write_export(state, export)
        print(f"wrote {export}")
    listed = out / "broken.jsonl"
    listed.write_text("".join(json.dumps({"video": v, "error": why}) + "\n" for v, why in sorted(broken.items())))
    if broken:
        print(f"{len(broken)} videos could not be read, see {listed}", file=sys.stderr)


def write_model(state: State, path: Path) -> Path:
    model = state.task.model
    model.is_random = False
    return model.save(path)


def write_export(state: State, path: Path) -> None:
    """What was trained, as the public code's fine-tuned file has it."""
    from pyvidx.integrations.malmm_checkpoints import export_malmm

    weights = {n: w.cpu() for n, w in export_malmm(state.task.model, "lavis").items() if not n.startswith("visual_")}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"model": weights, "epoch": state.epoch - 1}, path)


class Shown(contextlib.AbstractContextManager):
    """Progress bar, loss curve and best weights of the first process; the others show nothing."""

    def __init__(self, out: Path, alike: Ranks, epochs: int):
        self.out, self.first, self.epochs = out, alike.first, epochs
        self.bar = self.curve = None

    def start(self, state: State, steps: int) -> None:
        if not self.first:
            return
        self.curve = Curve(self.out, state.step)
        if state.step:
            print(f"going on after step {state.step}, epoch {state.epoch}", file=sys.stderr)
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                print("no progress bar: pip install 'pyvidx[cli]'", file=sys.stderr)
                return
            self.bar = tqdm(total=steps * self.epochs, initial=state.step, unit="step")

    def step(self, stepped: Stepped) -> None:
        if not self.first:
            return
        self.curve.add(stepped)
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix(epoch=stepped.epoch, loss=f"{stepped.loss:.4f}", lr=f"{stepped.rate:.2e}")

    def epoch(self, state: State, loss: float | None, best: bool) -> None:
        if not self.first:
            return
        if loss is not None:
            self.curve.add_held_out(state.step, state.epoch - 1, loss)
            if best:
                write_model(state, self.out / "best.safetensors")
        self.curve.draw()

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.close()
