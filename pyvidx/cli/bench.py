"""pyvidx bench, also as python -m pyvidx.bench: what the benches measured, and what the CUDA kernels would take."""

import sys
from collections.abc import Sequence
from pathlib import Path

from pyvidx.bench import report
from pyvidx.cli.arguments import Parser, add_overwrite, check_outputs, count, existing, file, picture
from pyvidx.files import printable, write_json, write_text


def parser() -> Parser:
    p = Parser(prog="pyvidx bench", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    r = commands.add_parser(
        "report",
        help="print a table and draw a plot",
        example="pyvidx bench report bench.json --plot bench.png",
    )
    r.add_argument("files", nargs="+", metavar="file", type=existing,
                   help="what pytest bench --benchmark-json wrote, or of bench/results")  # fmt: skip
    r.add_argument("--plot", type=picture, help="where the picture goes (default: beside the first file, .png)")
    r.add_argument("--markdown", action="store_true", help="print Markdown, and plot with --plot alone")
    add_overwrite(r)
    add_predict(commands)
    return p


def add_predict(commands) -> None:
    r = commands.add_parser(
        "predict",
        help="predict times of the CUDA kernels on V100, A100, H100 and H200 from their machine code, without a GPU",
        example="pyvidx bench predict --arch 70 90 --cases token_gather 'temporal_attention T=8' --json predicted.json",
    )
    r.add_argument("--arch", type=int, nargs="+", choices=[70, 80, 90], default=[70, 80, 90],
                   help="of V100, A100, H100 and H200 (default: all)")  # fmt: skip
    r.add_argument("--cases", nargs="+", default=[], metavar="WORDS",
                   help="only cases that have all these words in their name, as in 'st_pool T=8'")  # fmt: skip
    r.add_argument("--samples", type=count, help="blocks of a launch that are run (default 3); not with --read")
    r.add_argument(
        "--read", type=existing, metavar="FILE", help="what --json wrote: nothing is compiled, the model runs anew"
    )
    r.add_argument("--json", type=file, metavar="FILE", help="where what the kernels do goes, for --read")
    r.add_argument("--markdown", type=file, metavar="PAGE", help="write the tables into a page, between its two marks")
    add_overwrite(r)


def main(argv: Sequence[str] | None = None) -> None:
    p = parser()
    options = p.parse_args(argv)
    {"report": run_report, "predict": run_predict}[options.command](p, options)


def run_report(p: Parser, options) -> None:
    drawn = options.plot or (None if options.markdown else options.files[0].with_suffix(".png"))
    try:
        cases = [case for file in options.files for case in report.load(file)]
    except (OSError, ValueError) as error:
        p.error(str(error))
    check_outputs(p, options.overwrite, drawn, inputs=options.files)
    print(report.markdown(cases) if options.markdown else report.table(cases))
    if drawn is not None:
        report.plot(cases, drawn)
    if not options.markdown:
        print(f"plot: {drawn}")


def run_predict(p: Parser, options) -> None:
    from pyvidx.bench import known, model, predict, tables

    if options.read and options.samples:
        p.error("--samples is of blocks that are run, and --read runs none: give one of them")
    errors = []
    check_outputs(p, options.overwrite, options.json, inputs=[options.read, options.markdown])
    try:
        page = options.markdown and Path(options.markdown).read_text(encoding="utf-8")
        if page is not None:
            tables.filled(page, "")
        if options.read:
            traces = predict.load(options.read, options.cases)
        else:
            told = lambda name: print(f"traced {printable(name)}", file=sys.stderr)  # noqa: E731
            there = [*predict.PAPERS, *(known.simulated_cases() if 70 in options.arch else [])]
            cases = predict.chosen(options.cases, there)
            samples = options.samples or predict.SAMPLES
            traces, errors = predict.traced(cases, sorted({*options.arch}), samples=samples, seen=told)
    except (OSError, ValueError) as error:
        p.error(str(error))
    gpus = model.gpus(options.arch)
    print(tables.text(traces, gpus))
    if options.json:
        write_json(options.json, {"about": predict.ABOUT, "traces": traces}, indent=1)
        print(f"wrote {options.json}")
    if page is not None:
        write_text(options.markdown, tables.filled(page, tables.markdown(traces, gpus)))
        print(f"wrote {options.markdown}")
    if errors:
        sys.exit("\n".join(["pyvidx bench: not predicted, and not in what was written:", *errors]))
