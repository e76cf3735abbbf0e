"""pyvidx plan encode SAMPLE... --videos 1e6"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from pyvidx.cli import arguments
from pyvidx.cli.encode import add_job, find, folded, job_of, opened
from pyvidx.corpus import stores
from pyvidx.corpus.folder import DTYPES
from pyvidx.corpus.rates import Rates, measure, report
from pyvidx.corpus.stores.registry import check_dtype
from pyvidx.files import write_json


def add_to(jobs) -> None:
    """The arguments, as a subparser of `pyvidx plan`."""
    p = jobs.add_parser(
        "encode",
        help="the embeddings of a corpus",
        description="Predict the hours of cores and the storage that `pyvidx encode` takes for a corpus, from what it "
        "takes for a few of its videos, measured here, or from the rates in a file.",
        example="pyvidx plan encode some_videos/ --model clip-vit-large-patch14/ --module stan --videos 1e6 --cores 32",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("samples", nargs="*", type=arguments.file, help="videos of the corpus, or folders of them")
    p.add_argument("--rates", type=arguments.existing, help="in place of samples, a file of bench.corpus_run or --json")
    p.add_argument("--videos", type=arguments.amount, default=1e6, help="of the corpus")
    p.add_argument("--most", type=arguments.count, default=50, help="samples to measure on, from all over those given")
    p.add_argument("--cores", type=arguments.count, default=os.cpu_count(), help="all machines together")
    p.add_argument("--devices", type=arguments.count, default=1, help="GPUs, all machines together")
    p.add_argument("--store", choices=list(stores.STORES), default="parquet", help="format of the parts")
    p.add_argument("--json", type=Path, help="write what was measured")
    arguments.add_overwrite(p)
    add_job(p)


def run(p: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    arguments.check_span(p, options.start, options.end)
    arguments.check_reader(p, options.reader)
    arguments.check_outputs(p, options.overwrite, options.json, inputs=[*options.samples, options.rates, options.model])
    try:
        if bool(options.samples) == (options.rates is not None):
            raise ValueError("there must be videos to measure on, or --rates, one of the two")
        rates = _from_file(options.rates) if options.rates else _measured(options)
    except (OSError, RuntimeError, ValueError) as error:
        p.error(str(error))
    if options.json:
        write_json(options.json, {"rates": asdict(rates)}, indent=1)
    print(report(rates, options.videos, options.cores, options.devices))
    return 0


def _measured(options: argparse.Namespace) -> Rates:
    paths, left_out = find(options.samples)
    if left_out:
        print(f"NOTE: {left_out}", file=sys.stderr)
    paths = paths[:: -(-len(paths) // options.most)]
    check_dtype(stores.named(options.store), DTYPES[options.dtype_out])
    model = folded(opened(options), options.device, options.dtype, options.precision)
    return measure(paths, model, job_of(options), options.store)


def _from_file(path: Path) -> Rates:
    try:
        return Rates(**json.loads(path.read_text(encoding="utf-8"))["rates"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"--rates: {path} must hold rates as bench.corpus_run writes them, got {error}") from error
