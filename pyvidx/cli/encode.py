"""pyvidx encode VIDEO... --out FILE"""

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from pyvidx.cli import arguments
from pyvidx.cli.models import load
from pyvidx.corpus import embeddings
from pyvidx.corpus.encode import Timing, encode_videos
from pyvidx.files import printable
from pyvidx.models import VideoEncoder
from pyvidx.preprocess import PRESETS
from pyvidx.video import find_videos, sampling
from pyvidx.video.pool import shared

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parser() -> argparse.ArgumentParser:
    p = arguments.Parser(
        prog="pyvidx encode",
        description="Encode video files with any tower and any temporal module. Files that fail are named and do "
        "not stop the rest.",
        epilog="Exit code: 0, 1 if videos failed, 2 for arguments that do not fit. Nothing is read from a network.",
        example="pyvidx encode videos/ --model clip-vit-large-patch14/ --module stan --frames 8 --out out.parquet",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("videos", nargs="+", type=arguments.file, help="video files, or folders that are searched for them")
    p.add_argument("--out", type=Path, help=f"where the embeddings go: {', '.join(embeddings.FORMATS)}")
    arguments.add_model(p)
    p.add_argument("--compat", choices=["official", "paper"], help="compute as the public code does, or as the paper "
                   "says; default: as saved, published weights as the public code")  # fmt: skip
    p.add_argument("--frames", type=arguments.frames, default=8, help="frames per video")
    p.add_argument("--sampler", default="uniform", choices=sampling.names(aliases=True), metavar="NAME",
                   help=f"which frames: {', '.join(sampling.names())}")  # fmt: skip
    p.add_argument("--start", type=arguments.seconds, help="second of every video to take frames from")
    p.add_argument("--end", type=arguments.seconds, help="second of every video to take frames up to, e.g. 30 for"
                   " DiDeMo")  # fmt: skip
    p.add_argument("--reader", default="auto", choices=["auto", "decord", "pyav", "torchcodec"],
                   help="what decodes")  # fmt: skip
    p.add_argument("--preset", default="clip", choices=list(PRESETS), help="preprocessing")
    p.add_argument("--outputs", type=arguments.outputs, default="pooled,tokens",
                   help="pooled (video embedding), tokens (for a language model)")  # fmt: skip
    p.add_argument("--batch", type=arguments.count, default=1, help="videos encoded together")
    p.add_argument("--workers", type=arguments.workers, default=1, help="how many read ahead")
    arguments.add_device(p)
    p.add_argument("--dtype", choices=list(DTYPES), help="default: float16 on a GPU, float32 on a CPU")
    arguments.add_overwrite(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(argv)
    arguments.check_span(p, options.start, options.end)
    arguments.check_reader(p, options.reader)
    try:
        if options.out is not None:
            embeddings.check_format(options.out)
        arguments.check_outputs(p, options.overwrite, options.out, inputs=[*options.videos, options.model])
        paths, left_out = find(options.videos)
        shared(options.workers)  # they start while the model is loaded
        model = load_model(options.model, options.device, options.dtype, options.compat, options.module)
        if model.config.part == "features":
            raise ValueError(f"--model must read pixels, {options.model} reads stored features")
        if lacking := [name for name in options.outputs if name not in model.outputs]:
            raise ValueError(f"--outputs must be {','.join(model.outputs)} with this model, got {','.join(lacking)}")
    except (OSError, RuntimeError, ValueError) as error:
        p.error(str(error))
    if left_out:
        print(f"NOTE: {left_out}", file=sys.stderr)
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
        outputs=options.outputs,
        batch=options.batch,
        workers=options.workers,
        timing=timing,
    )
    for result in progress(encoded, len(paths)):
        results.append(result)
        if result.error:
            print(f"FAILED {printable(result.path)}: {printable(result.error)}", file=sys.stderr)
        elif result.damaged:
            print(f"DAMAGED {printable(result.path)}: {printable(str(result.damaged))}", file=sys.stderr)
    if options.out is not None and timing.videos:
        about = {k: str(v) for k, v in vars(options).items() if k not in ("videos", "out", "overwrite", "outputs")}
        about = {k: v for k, v in about.items() if v != "None"} | {"outputs": ",".join(options.outputs)}
        with timing.of("write"):
            embeddings.save(options.out, results, about | {"is_random": model.is_random})
        print(f"wrote {printable(options.out)}")
    elif options.out is not None:
        print(f"nothing to write to {printable(options.out)}: no video could be encoded", file=sys.stderr)
    print(timing)
    return 1 if timing.failed else 0


def find(given: Sequence[Path]) -> tuple[list[str], str]:
    """The files, those of folders in name order, and what to say of files in folders that are no videos.

    Raises:
        FileNotFoundError: one of those given is not there.
        ValueError: there is no video among them.
    """
    missing = [path for path in given if not path.exists()]
    if missing:
        more = f", nor {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileNotFoundError(f"there is no {missing[0]}{more}")
    videos, others = [], []
    for path in given:
        found, rest = find_videos(path) if path.is_dir() else ([path], [])
        videos, others = videos + found, others + rest
    if not videos:
        raise ValueError("no video files in " + ", ".join(map(str, given)))
    kinds = Counter(p.suffix.lower() or "without suffix" for p in others)
    kinds = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    names = ", ".join(printable(p) for p in others[:5]) + (", ..." if len(others) > 5 else "")
    said = f"left out {len(others)} files that are no videos ({kinds}): {names}" if others else ""
    return list(map(str, videos)), said


def load_model(
    model: str | None, device: str, dtype: str | None, compat: str | None = None, module: str | None = None
) -> VideoEncoder:
    """The model folded for inference, see pyvidx.cli.models.load."""
    encoder = load(model, module, **({} if compat is None else {"compat": compat}))
    wanted = DTYPES[dtype] if dtype else (torch.float16 if device.startswith("cuda") else torch.float32)
    return encoder.to(device).fold(wanted)


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
