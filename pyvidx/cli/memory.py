"""pyvidx memory VIDEO --out slots.png"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvidx import memory
from pyvidx.cli import arguments
from pyvidx.files import printable
from pyvidx.spec import parse
from pyvidx.video import stream

GRID, CELL = 4, 8  # "colors": a frame is 4 x 4 positions of 8 x 8 mean colors


def parser() -> argparse.ArgumentParser:
    p = arguments.Parser(
        prog="pyvidx memory",
        description="Stream a video of any length through a memory bank, in constant memory (but for the policies that "
        "grow, see pyvidx.memory), and draw which frames each slot holds.",
        example="pyvidx memory video.mp4 --policy merge --capacity 12 --out slots.png",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("video", type=arguments.there, help="a video file, or a folder of frames, whose rate is --fps")
    p.add_argument("--policy", default="merge", type=named_policy, metavar="NAME[:OPTION=VALUE,...]",
                   help="what is kept of the frames, e.g. merge:unit=frame or tome:axis=space; of "
                   f"{', '.join(memory.names())}, see pyvidx.memory")  # fmt: skip
    p.add_argument("--capacity", type=arguments.count, help="entries kept, anchors included; default: the policy's own")
    p.add_argument("--anchors", type=arguments.whole_number(0, 10**9), help="keep the first frames as they are")
    p.add_argument("--fps", type=arguments.positive, help="frames per second to take; default: all")
    p.add_argument(
        "--features",
        choices=["colors", "model"],
        help="what is remembered: colors, 4 x 4 positions of 8 x 8 mean colors (no model involved), or model, the "
        "patch tokens of the last layer of a model's tower; default: colors without --model",
    )
    p.add_argument("--model", type=arguments.model, help="whose tower, see `pyvidx encode`; without: a small one")
    p.add_argument("--position", type=arguments.whole_number(0, 10**9), default=0,
                   help="position whose slots are drawn over time")  # fmt: skip
    p.add_argument("--out", type=arguments.picture, default="slots.png", help="the picture")
    p.add_argument("--save", type=Path, help="write the bank as well, as .safetensors")
    arguments.add_device(p)
    arguments.add_overwrite(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(argv)
    options.features = options.features or ("colors" if options.model is None else "model")
    if options.features == "colors" and options.model is not None:
        p.error("--model must not be given with --features colors, which are no model's")
    if options.save is not None and options.save.suffix != ".safetensors":
        p.error(f"--save must end in .safetensors, got {options.save}")
    inputs = [options.video, options.model]
    arguments.check_outputs(p, options.overwrite, options.out, options.save, inputs=inputs)
    try:
        policy = policy_of(options)
        features = colors if options.features == "colors" else model_features(options.model, options.device)
        bank, history, thumbnails = watch(policy, features, options)
    except (FileNotFoundError, ValueError) as error:
        p.error(str(error))
    except RuntimeError as error:
        print(f"FAILED {printable(options.video)}: {printable(str(error))}", file=sys.stderr)
        return 1
    what = ", ".join(f"{k} {v}" for k, v in policy.spec().items() if k != "name" and v)
    what = f"policy {policy.name} ({what}), features: {options.features}"
    title = f"{printable(options.video.name)}: {int(bank.frames)} frames, {what}"
    memory.plot(history, options.out, title=title, thumbnails=thumbnails)
    print(title)
    print(table(bank, options.position))
    print(f"wrote {options.out}")
    if options.save is not None:
        print(f"wrote {memory.save(options.save, policy, bank)}")
    return 0


def watch(policy: memory.Policy, features: Callable[[Tensor], Tensor], options: argparse.Namespace):
    """The bank after the whole video, its history, and a few (seconds, picture) spread over the video."""
    pictures = memory.create("uniform", capacity=12)
    bank = shown = None
    history = memory.History(position=options.position)
    for clip in stream(options.video, chunk=8, fps=options.fps):
        rows = features(clip.frames.to(options.device))  # [T, N, C]
        small = F.interpolate(clip.frames.permute(0, 3, 1, 2).float(), size=thumbnail_size(clip.frames), mode="area")
        if bank is None:
            bank = policy.new(1, *rows.shape[1:], device=options.device)
            shown = pictures.new(1, 1, small[0].numel())
            if not 0 <= options.position < bank.positions:
                raise ValueError(f"memory: position must be in [0, {bank.positions}), got {options.position}")
        for row, picture, second in zip(rows, small, clip.seconds):
            bank = policy.push(bank, row[None], second[None].to(options.device))
            shown = pictures.push(shown, picture.reshape(1, 1, -1), second[None])
            history.record(bank)
    kept = shown.entries()
    thumbnails = [
        (second.item(), row.reshape(small.shape[1:]).permute(1, 2, 0).round().byte().numpy())
        for row, second in zip(kept.rows[0], kept.first[0, :, 0])
    ]
    return bank, history, thumbnails


def named_policy(text: str) -> tuple[str, dict]:
    """The name of a policy, and its options."""
    try:
        name, options = parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if name not in memory.names():
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(memory.names())}, got {name!r:.100}")
    return name, options


def policy_of(options: argparse.Namespace) -> memory.Policy:
    name, chosen = options.policy
    given = {"capacity": options.capacity, "anchors": options.anchors}
    given = {option: value for option, value in given.items() if value is not None}
    if twice := given.keys() & chosen.keys():
        raise ValueError(f"--policy {name} has a {min(twice)} already, --{min(twice)} is another")
    return memory.create(name, **chosen, **given)


def colors(frames: Tensor) -> Tensor:
    """Mean colors about mid-gray, in [-0.5, 0.5]: frames uint8 [T, H, W, 3] -> [T, 16 positions, 8*8*3]."""
    x = F.interpolate(frames.permute(0, 3, 1, 2).float(), size=(GRID * CELL, GRID * CELL), mode="area") / 255 - 0.5
    x = x.unfold(2, CELL, CELL).unfold(3, CELL, CELL)  # [T, 3, 4, 4, 8, 8]
    return x.permute(0, 2, 3, 4, 5, 1).reshape(len(frames), GRID * GRID, -1)


def model_features(source: str | None, device: str) -> Callable[[Tensor], Tensor]:
    """Frames uint8 [T, H, W, 3] -> patch tokens [T, P, C] of the last layer of a model's tower, float32."""
    from pyvidx.cli.models import load
    from pyvidx.corpus.encode import sized
    from pyvidx.preprocess import preprocess

    model, name = load(source)
    tower, preset, last = model.tower.to(device), sized(name, model), model.tower.layers[-1]

    @torch.inference_mode()
    def features(frames: Tensor) -> Tensor:
        (tokens,) = tower(preprocess(frames, preset), [last])
        return tokens[:, 1:].float()

    return features


def thumbnail_size(frames: Tensor) -> tuple[int, int]:
    """96 pixels wide at most, in the shape of the frames [T, H, W, 3]."""
    H, W = frames.shape[1:3]
    width = min(96, W)
    return max(1, round(H * width / W)), width


def table(bank: memory.Bank, position: int) -> str:
    """The entries of one position, in time order."""
    entries = bank.entries()
    lines = [f"position {position} of {bank.positions}:", "slot    size   first s    last s"]
    columns = [x[0, :, position].tolist() for x in (entries.sizes, entries.first, entries.last)]
    shown = list(enumerate(zip(*columns)))
    for i, (size, first, last) in shown[:40]:
        lines.append(f"{i:4} {size:7} {first:9.2f} {last:9.2f}")
    return "\n".join(lines + ([f"... and {len(shown) - 40} more"] if len(shown) > 40 else []))
