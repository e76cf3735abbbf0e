"""A table and a plot of what the benches measured."""

from collections.abc import Sequence
from pathlib import Path

from pyvidx.data.tables import read_json
from pyvidx.pictures import drawn

COLUMNS = ("op", "shape", "dtype", "ms", "spread", "GB/s", "copy GB/s", "floor", "vs eager", "vs compile")
GRAPH_COLUMNS = ("graph ms", "graph floor")  # of cases that a GPU has run: the call as a CUDA graph
NOTE = "ms: median; spread: quartiles apart / median; floor: copy of the same bytes / ours, in the same rounds"


def load(path: Path) -> list[dict]:
    """The cases of a pytest-benchmark file, or of one of bench/results, in the order they ran.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file.
    """
    data = read_json(path, dict)
    try:
        cases = [b["extra_info"] for b in data["benchmarks"]] if "benchmarks" in data else data["cases"]
        cases = [case for case in cases if "floor_share" in case]
        for case in cases:
            row(case, graph=True)
            float(case["bytes"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"report: {path} must hold cases of pyvidx's benches, got {error!r}") from error
    if not cases:
        raise ValueError(f"report: {path} must hold cases of pyvidx's benches, got none")
    return cases


def named(case: dict) -> tuple[str, str, str]:
    """The cells that say which case it is: op, shape, dtype."""
    shape = " ".join(v if isinstance(v, str) else f"{k}{v}" for k, v in case["shape"].items())
    return case["op"], shape, case["dtype"]


def row(case: dict, graph: bool = False) -> tuple[str, ...]:
    """The cells of one case; graph: with those of its CUDA graph."""
    over_compile, replayed = case.get("vs_compile"), case.get("graph_ms")
    cells = (
        *named(case),
        f"{case['ms']:.3f}",
        f"{case['spread']:.0%}",
        f"{case['gbps']:.1f}",
        f"{case['copy_gbps']:.1f}",
        f"{case['floor_share']:.2f}",
        f"{case['vs_eager']:.2f}x",
        f"{over_compile:.2f}x" if over_compile else "-",
    )
    if not graph:
        return cells
    return *cells, *((f"{replayed:.3f}", f"{case['copy_ms'] / replayed:.2f}") if replayed else ("-", "-"))


def table(cases: list[dict]) -> str:
    """One aligned line per case, under one line that says where it ran."""
    where = sorted(set(map(_where, cases)))
    return "\n".join([*where, aligned(_rows(cases)), NOTE])


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Rows for a terminal; the first three columns begin at the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = (
        "  ".join(cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(r, widths))).rstrip()
        for r in rows
    )
    return "\n".join(lines)


def markdown(cases: list[dict]) -> str:
    """A table of Markdown under each line that says where its cases ran."""
    blocks = []
    for where in dict.fromkeys(map(_where, cases)):
        head, *rows = _rows([c for c in cases if _where(c) == where])
        blocks.append(f"{where}:\n\n{piped([head, *rows])}")
    return "\n\n".join([*blocks, f"{NOTE}."])


def piped(rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """Rows for Markdown, the first the head. With numbers the columns from the fourth on end at the right."""
    rule = ["---"] * 3 + ["---:" if numbers else "---"] * (len(rows[0]) - 3)
    rows = [rows[0], rule, *rows[1:]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def _rows(cases: list[dict]) -> list[tuple[str, ...]]:
    """The head and the cells of every case."""
    graph = any(c.get("graph_ms") for c in cases)
    return [COLUMNS + GRAPH_COLUMNS if graph else COLUMNS, *(row(c, graph) for c in cases)]


def _where(case: dict) -> str:
    threads = "1 thread" if case["threads"] == 1 else f"{case['threads']} threads"
    return f"{case['device']}, {threads}, torch {case['torch']}"


def plot(cases: list[dict], path: Path) -> None:
    """The roofline: each case's share of the floor, and how many times eager it is, over the bytes that it must move.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    ops = list(dict.fromkeys(c["op"] for c in cases))
    fills = {"float32": "full", "bfloat16": "none", "float16": "left"}
    with drawn(path, 11, 4.5, "report") as figure:
        from matplotlib.ticker import LogFormatter

        axes = figure.subplots(1, 2)
        for i, c in enumerate(cases):
            style = {
                "color": f"C{ops.index(c['op']) % 10}", "marker": "os^Dv"[ops.index(c["op"]) // 10 % 5], "ls": "",
                "fillstyle": fills.get(c["dtype"], "full"),
            }  # fmt: skip
            first = not any(c["op"] == other["op"] for other in cases[:i])
            for axis, key in zip(axes, ("floor_share", "vs_eager")):
                axis.plot(c["bytes"] / 2**20, c[key], **style, label=c["op"] if first else None)
        for axis, label in zip(axes, ("share of a copy's speed", "times the speed of eager torch")):
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set(xscale="log", yscale="log", xlabel="MiB that must be moved", ylabel=label)
            axis.grid(True)
            for one in (axis.xaxis, axis.yaxis):
                one.set_major_formatter("{x:g}")
                one.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
        axes[0].set_title("\n".join(dict.fromkeys(map(_where, cases))), loc="left")
        axes[1].set_title("full: float32, hollow: bfloat16, half: float16", loc="left")
