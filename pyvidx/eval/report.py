"""Tables of numbers as text, JSON and a picture."""

from collections.abc import Mapping
from pathlib import Path

from pyvidx import files
from pyvidx.pictures import drawn

Table = Mapping[str, Mapping[str, float]]


def text(result: Table) -> str:
    """One line per row of numbers, under their names; a number that a row does not have is a dash."""
    names = list(dict.fromkeys(name for row in result.values() for name in row))
    left = max(len(row) for row in result)
    wide = [max(10, len(name) + 2) for name in names]
    lines = [" " * left + "".join(name.rjust(w) for name, w in zip(names, wide))]
    for row, values in result.items():
        cells = [f"{values[name]:.2f}" if name in values else "-" for name in names]
        lines.append(row.ljust(left) + "".join(cell.rjust(w) for cell, w in zip(cells, wide)))
    return "\n".join(lines)


def write_json(path: Path, result: Table, about: Mapping | None = None) -> None:
    """The rows, and what was run under "about"."""
    files.write_json(path, dict(result) | ({"about": about} if about else {}), indent=1)


def plot(path: Path, result: Table, title: str = "") -> None:
    """A panel per number, as their scales differ, with a bar per row.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    names = list(dict.fromkeys(name for row in result.values() for name in row))
    with drawn(path, 1.2 + 1.6 * len(names), 2.6 + 0.12 * max(map(len, result)), "eval") as figure:
        for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0]):
            rows = [row for row in result if name in result[row]]
            colors = [f"C{list(result).index(row)}" for row in rows]
            bars = axes.bar(rows, [result[row][name] for row in rows], color=colors)
            axes.bar_label(bars, fmt="%.1f")
            axes.set_title(name)
            axes.margins(y=0.15)
            axes.tick_params(axis="x", rotation=90)
        figure.suptitle(title)
