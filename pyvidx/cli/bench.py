"""pyvidx bench, also as python -m pyvidx.bench: what the benches measured."""

from collections.abc import Sequence

from pyvidx.bench import report
from pyvidx.cli.arguments import Parser, add_overwrite, check_outputs, existing, picture


def parser() -> Parser:
    p = Parser(prog="pyvidx bench", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    r = commands.add_parser(
        "report",
        help="print a table and draw a plot",
        example="pyvidx bench report bench.json --plot bench.png",
    )
    r.add_argument("file", type=existing, help="what pytest bench --benchmark-json wrote, or one of bench/results")
    r.add_argument("--plot", type=picture, help="where the picture goes (default: beside the file, .png)")
    add_overwrite(r)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    p = parser()
    options = p.parse_args(argv)
    {"report": run_report}[options.command](p, options)


def run_report(p: Parser, options) -> None:
    drawn = options.plot or options.file.with_suffix(".png")
    try:
        cases = report.load(options.file)
    except (OSError, ValueError) as error:
        p.error(str(error))
    check_outputs(p, options.overwrite, drawn, inputs=[options.file])
    print(report.table(cases))
    report.plot(cases, drawn)
    print(f"plot: {drawn}")
