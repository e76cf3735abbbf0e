"""python -m pyvidx encode VIDEO... --out FILE"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from pyvidx import embeddings
from pyvidx.encode import Timing, encode_videos
from pyvidx.models import BTAdapter
from pyvidx.preprocess import PRESETS
from pyvidx.video import sampling
from pyvidx.video.reader import SUFFIXES

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m pyvidx encode",
        description="Encode video files with BT-Adapter. Files that fail are named and do not stop the rest.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("videos", nargs="+", type=Path, help="video files, or folders that are searched for them")
    p.add_argument("--out", type=Path, help=f"where the embeddings go: {', '.join(embeddings.FORMATS)}")
    p.add_argument("--model", type=Path, help="weights written by BTAdapter.save; without: a small built-in model")
    p.add_argument("--frames", type=int, default=8, help="frames per video")
    p.add_argument("--sampler", default="uniform", choices=sampling.names(aliases=True), metavar="NAME",
                   help=f"which frames: {', '.join(sampling.names())}")  # fmt: skip
    p.add_argument("--start", type=float, help="second of every video to take frames from")
    p.add_argument("--end", type=float, help="second of every video to take frames up to, e.g. 30 for DiDeMo")
    p.add_argument("--reader", default="auto", choices=["auto", "decord", "pyav", "torchcodec"])
    p.add_argument("--preset", default="clip", choices=list(PRESETS), help="preprocessing")
    p.add_argument("--outputs", default="pooled,tokens", help="pooled (video embedding), tokens (for a language model)")
    p.add_argument("--batch", type=int, default=1, help="videos encoded together")
    p.add_argument("--workers", type=int, default=1, help="threads that read ahead")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=list(DTYPES), help="default: float16 on a GPU, float32 on a CPU")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(argv)
    if options.out is not None:
        try:
            embeddings.check_format(options.out)
        except (ValueError, RuntimeError) as error:
            p.error(str(error))
    paths = list(find(options.videos))
    if not paths:
        p.error("no video files in " + ", ".join(map(str, options.videos)))
    try:
        model = load_model(options.model, options.device, options.dtype)
    except (FileNotFoundError, ValueError) as error:
        p.error(str(error))
    timing = Timing()
    results = []
    encoded = encode_videos(
        paths,
        model,
        frames=options.frames,
        sampler=options.sampler,
        start=options.start,
        end=options.end,
        reader=options.reader,
        preset=options.preset,
        outputs=[o for o in options.outputs.split(",") if o],
        batch=options.batch,
        workers=options.workers,
        timing=timing,
    )
    for result in progress(encoded, len(paths)):
        results.append(result)
        if result.error:
            print(f"FAILED {result.path}: {result.error}", file=sys.stderr)
    if options.out is not None and timing.videos:
        about = {k: str(v) for k, v in vars(options).items() if k not in ("videos", "out") and v is not None}
        with timing.of("write"):
            embeddings.save(options.out, results, about | {"is_random": model.is_random})
        print(f"wrote {options.out}")
    print(timing)
    return 1 if timing.failed else 0


def find(videos: Sequence[Path]):
    """Files as they are, folders searched for video files in name order."""
    for path in videos:
        if path.is_dir():
            yield from (str(p) for p in sorted(path.rglob("*")) if p.suffix.lower() in SUFFIXES)
        else:
            yield str(path)


def load_model(path: Path | None, device: str, dtype: str | None) -> BTAdapter:
    """The model folded for inference, and a note where its embeddings say little about a video."""
    model = BTAdapter.default() if path is None else BTAdapter.from_pretrained(path)
    if path is None:
        print(
            "NOTE: the built-in model knows a small world of moving shapes (pyvidx.data.motion). For other videos the "
            "embeddings show that and how fast everything runs, not what is in them. Give weights with --model.",
            file=sys.stderr,
        )
    elif model.is_random:
        print("NOTE: these weights were never trained: the embeddings do not show what is in a video.", file=sys.stderr)
    wanted = DTYPES[dtype] if dtype else (torch.float16 if device.startswith("cuda") else torch.float32)
    return model.to(device).fold(wanted)


def progress(items, total: int):
    """A progress bar on the terminal; plain iteration without tqdm or without a terminal."""
    if not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        warnings.warn("no progress bar: pip install 'pyvidx[cli]'", stacklevel=2)
        return items
    return tqdm(items, total=total, unit="video")
