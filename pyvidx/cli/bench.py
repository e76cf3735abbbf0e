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
    r.add_argument("files", nargs="+", metavar="file", type=existing,
                   help="what pytest bench --benchmark-json wrote, or of bench/results")  # fmt: skip
    r.add_argument("--plot", type=picture, help="where the picture goes (default: beside the first file, .png)")
    r.add_argument("--markdown", action="store_true", help="print Markdown, and plot with --plot alone")
    add_overwrite(r)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    p = parser()
    options = p.parse_args(argv)
    {"report": run_report}[options.command](p, options)


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
