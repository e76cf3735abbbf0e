"""pyvidx encode VIDEO... --out FILE or FOLDER"""

import argparse
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from pyvidx.cli import arguments
from pyvidx.cli.models import load
from pyvidx.corpus import embeddings, engines, stores
from pyvidx.corpus.encode import Encoded, Timing, encode_videos, widths
from pyvidx.corpus.folder import DTYPES, Corpus, Manifest, check, made_of
from pyvidx.files import printable
from pyvidx.models import VideoEncoder
from pyvidx.models.fold import PRECISIONS
from pyvidx.preprocess import PRESETS
from pyvidx.video import find_videos, sampling
from pyvidx.video.pool import shared

FOR_FOLDERS = ("store", "resume", "retry_errors", "engine", "part_rows")


def parser() -> argparse.ArgumentParser:
    p = arguments.Parser(
        prog="pyvidx encode",
        description="Encode video files with any tower and any temporal module. Files that fail are named and do "
        "not stop the rest.",
        epilog="Exit code: 0, 1 if videos failed, 2 for arguments that do not fit. Nothing is read from a network.",
        example="pyvidx encode videos/ --model clip-vit-large-patch14/ --module stan --frames 8 --out embeddings",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("videos", nargs="+", type=arguments.file, help="video files, or folders that are searched for them")
    p.add_argument("--out", type=arguments.out, help="where the embeddings go: a folder (NAME/ if it has a dot), which "
                   "takes a corpus of any size part by part and can be resumed, or a file: "
                   f"{', '.join(embeddings.FORMATS)}")  # fmt: skip
    add_job(p)
    p.add_argument("--workers", type=arguments.workers, default=1,
                   help="how many read ahead; with --engine ray, on all machines together")  # fmt: skip
    arguments.add_overwrite(p)
    f = p.add_argument_group("if --out is a folder")
    f.add_argument("--resume", action="store_true", help="go on: videos that have a row there are left out")
    f.add_argument("--retry-errors", action="store_true", help="the same, and encode again what failed")
    f.add_argument("--store", choices=list(stores.STORES), default="parquet", help="format of its parts")
    f.add_argument("--part-rows", type=arguments.count, default=1000, help="rows of a part at most; of large "
                   "embeddings it has fewer, 64 MB, and one is written at least every 5 minutes")  # fmt: skip
    f.add_argument("--engine", choices=list(engines.ENGINES), default="local",
                   help="local: this machine; ray: Ray Data, on this machine or the cluster it is part of")  # fmt: skip
    return p


def add_job(p: argparse.ArgumentParser) -> None:
    """The model, and what is done to every video."""
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
    p.add_argument("--preset", choices=list(PRESETS), help="preprocessing; default: what the tower was trained with")
    p.add_argument("--outputs", type=arguments.outputs, help="pooled (video embedding), tokens (for a language model); "
                   "default: what the model has")  # fmt: skip
    p.add_argument("--batch", type=arguments.count, default=1, help="videos encoded together")
    arguments.add_device(p)
    p.add_argument("--dtype", choices=list(DTYPES), help="default: float16 on a GPU, float32 on a CPU")
    p.add_argument("--precision", choices=PRECISIONS, default="float", help="int8: linear layers in 8 bits, on a CPU, "
                   "the rest in float32; 0.37 of the time of CLIP-B on a Zen 4")  # fmt: skip
    p.add_argument("--dtype-out", choices=list(DTYPES), default="float32", help="of the embeddings that are written")


def job_of(options: argparse.Namespace) -> engines.Job:
    names = ("frames", "sampler", "reader", "preset", "start", "end", "outputs", "batch")
    return engines.Job(**{n: getattr(options, n) for n in names}, dtype=DTYPES[options.dtype_out])


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(argv)
    options.resume |= options.retry_errors
    arguments.check_span(p, options.start, options.end)
    arguments.check_reader(p, options.reader)
    folder = _is_folder(options.out)
    try:
        _check_output(p, options, folder)
        engine = engines.named(options.engine)
        paths, left_out = find(options.videos)
        if options.engine == "local":
            shared(options.workers)  # they start while the model is loaded
        loaded = opened(options)
        random, made = loaded.is_random, made_of(loaded) if folder else {}
        model = folded(loaded, options.device, options.dtype, options.precision)
        corpus = _corpus(options, model, made, random) if folder else None
    except (OSError, RuntimeError, ValueError) as error:
        p.error(str(error))
    if left_out:
        print(f"NOTE: {left_out}", file=sys.stderr)
    job, timing = job_of(options), Timing()
    if corpus is not None:
        _into_folder(options, corpus, engine, model, job, paths, timing)
    else:
        encoded = encode_videos(paths, model, **vars(job), workers=options.workers, timing=timing)
        kept = [result for result in told(encoded, len(paths), timing) if options.out is not None]
        _into_file(options, kept, random, timing)
    print(timing)
    return 1 if timing.failed else 0


def opened(options: argparse.Namespace) -> VideoEncoder:
    """The model of `add_job`, and where options do not say, its preset and outputs.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: see pyvidx.cli.models.load; it does not give what is asked for.
    """
    if options.precision == "int8" and (options.device != "cpu" or options.dtype not in (None, "float32")):
        raise ValueError("--precision int8 is for --device cpu and float32")
    loaded, preset = load(options.model, options.module, compat=options.compat)
    options.preset = options.preset or preset
    if not hasattr(loaded.tower, "patch"):
        raise ValueError(f"--model must read pixels, {options.model} reads stored features")
    options.outputs = options.outputs or list(loaded.outputs)
    if lacking := [name for name in options.outputs if name not in loaded.outputs]:
        raise ValueError(f"--outputs must be {','.join(loaded.outputs)} with this model, got {','.join(lacking)}")
    return loaded


def _is_folder(out: str | None) -> bool:
    """A name without a suffix, one that ends in a slash, or a folder that is there."""
    return out is not None and (out.endswith(os.sep) or os.path.isdir(out) or not Path(out).suffix)


def _check_output(p: argparse.ArgumentParser, options: argparse.Namespace, folder: bool) -> None:
    """Raise, before anything is loaded, if what is asked for cannot be written."""
    if not folder and (given := [n for n in FOR_FOLDERS if getattr(options, n) != p.get_default(n)]):
        flags = ", ".join(f"--{n.replace('_', '-')}" for n in given)
        raise ValueError(f"{flags}: --out must be a folder, got {options.out}")
    if options.resume and options.overwrite:
        raise ValueError("--resume keeps what is there, --overwrite does not: give one of them")
    if options.out is None:
        return
    store = stores.named(options.store) if folder else stores.of_suffix(Path(options.out))
    if DTYPES[options.dtype_out] not in store.dtypes:
        raise ValueError(f"--dtype-out {options.dtype_out} cannot be kept in {store.suffix}")
    if folder:
        check(options.out, options.store, _made(options), resume=options.resume, overwrite=options.overwrite)
    else:
        inputs = [*options.videos, options.model]
        arguments.check_outputs(p, options.overwrite, Path(options.out), inputs=inputs)


def _made(options: argparse.Namespace) -> dict[str, str | None]:
    """What embeddings depend on, but for the weights; a model's own preset and outputs are not there before it is."""
    names = ("module", "compat", "frames", "sampler", "start", "end", "reader", "precision", "dtype_out", "preset")
    made = {name: getattr(options, name) for name in names}
    made |= {"outputs": options.outputs and ",".join(sorted(options.outputs))}
    made |= {"dtype": str(dtype_of(options.device, options.dtype)).removeprefix("torch.")}
    made = {name: None if value is None else str(value) for name, value in made.items()}
    return {name: value for name, value in made.items() if value or name not in ("preset", "outputs")}


def _corpus(options: argparse.Namespace, model: VideoEncoder, made: dict[str, str], random: bool) -> Corpus:
    notes = {"model": str(options.model), "is_random": str(random), "device": options.device}
    manifest = Manifest(
        options.store,
        widths(model, options.frames, options.outputs),
        options.dtype_out,
        {name: value for name, value in _made(options).items() if value is not None} | made,
        {name: value for name, value in notes.items() if value != "None"},
    )
    return Corpus(
        options.out,
        manifest,
        resume=options.resume,
        overwrite=options.overwrite,
        retry_errors=options.retry_errors,
        rows=options.part_rows,
    )


def _into_folder(
    options: argparse.Namespace,
    corpus: Corpus,
    engine: engines.Engine,
    model: VideoEncoder,
    job: engines.Job,
    paths: list[str],
    timing: Timing,
) -> None:
    out = printable(options.out)
    with corpus:
        before, failed = len(corpus.done), corpus.failed
        paths = [path for path in dict.fromkeys(paths) if path not in corpus.done]
        if before:
            which = f", {failed} of them errors, which --retry-errors tries again" if failed else ""
            print(f"{out} has {before} rows{which}; {len(paths)} videos to do", file=sys.stderr)
        for result in told(engine.run(paths, model, job, options.workers, timing), len(paths), timing):
            with timing.of("write"):
                corpus.add(result)
        with timing.of("write"):
            corpus.flush()
    print(f"wrote {len(paths)} rows to {out}")


def _into_file(options: argparse.Namespace, results: list[Encoded], random: bool, timing: Timing) -> None:
    if options.out is None:
        return
    out = printable(options.out)
    if not timing.videos:
        print(f"nothing to write to {out}: no video could be encoded", file=sys.stderr)
        return
    about = {k: str(v) for k, v in vars(options).items() if k not in (*FOR_FOLDERS, "videos", "out", "overwrite")}
    about = {k: v for k, v in about.items() if v != "None"} | {"outputs": ",".join(options.outputs)}
    with timing.of("write"):
        embeddings.save(options.out, results, about | {"is_random": random})
    print(f"wrote {out}")


def told(encoded: Iterator[Encoded], total: int, timing: Timing) -> Iterator[Encoded]:
    """The results, with a progress bar, and a line on stderr for every video that failed or is damaged."""
    shown = progress(encoded, total)
    for result in shown:
        if result.error:
            _say(f"FAILED {printable(result.path)}: {printable(result.error)}", shown)
        elif result.damaged:
            _say(f"DAMAGED {printable(result.path)}: {printable(str(result.damaged))}", shown)
        if timing.failed and shown is not encoded:
            shown.set_postfix(failed=timing.failed, refresh=False)
        yield result


def _say(line: str, shown) -> None:
    """On stderr, above a progress bar."""
    getattr(shown, "write", print)(line, file=sys.stderr)


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


def folded(model: VideoEncoder, device: str, dtype: str | None, precision: str = "float") -> VideoEncoder:
    """The model ready for inference."""
    return model.to(device).fold(dtype_of(device, dtype), precision=precision)


def dtype_of(device: str, dtype: str | None) -> torch.dtype:
    return DTYPES[dtype] if dtype else (torch.float16 if device.startswith("cuda") else torch.float32)


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
