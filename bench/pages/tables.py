"""docs/cases/*.md: every case that was measured on a CPU, from the files of bench/results that hold cases of ops; and
levels.md, the newest levels-*.json."""

import json
import re
from pathlib import Path

from bench.pages import ROOT
from pyvidx.bench import report

MACHINES = ("Zen 4", "Zen 5", "Xeon")


def machine(path: Path) -> str | None:
    """Which page the file belongs to; None: it holds no cases of ops.

    Raises:
        ValueError: its "cpu" names no machine that has a page.
    """
    data = json.loads(path.read_text())
    if not any("floor_share" in c for c in data.get("cases", ()) if isinstance(c, dict)):
        return None
    found = [name for name in MACHINES if name in data.get("cpu", "")]
    if len(found) != 1:
        raise ValueError(f'{path}: "cpu" must name one of {MACHINES}, got {data.get("cpu")!r}')
    return found[0]


def escaped(note: str) -> str:
    """A paragraph of Markdown that reads as the text does."""
    return re.sub(r"([*_<])", r"\\\1", note) + "\n"


def levels() -> list[str]:
    """The newest file of `python -m bench.levels` as a page: its levels, then one of them before and after."""
    data = json.loads(max((ROOT / "bench/results").glob("levels-*.json")).read_text())
    rows, level = data["rows"], data["before_level"]
    names = [name for name in data["columns"] if name != "before"]
    cell = "{ms:.2f}, {floor_share:.2f}, {vs_eager:.1f}x"
    lines = [[*report.named(row), *(cell.format(**row["at"][name]) for name in names)] for row in rows]
    parts = [
        "# Every op at every level\n", escaped(f"{data['cpu']}, 1 thread, torch {data['torch']}. {data['note']}"),
        f"    {data['command']}\n",
        "ms, share (the time of a copy of the same bytes over that of the op, in the same rounds), gain over eager:\n",
        report.piped([["op", "shape", "dtype", *names], *lines]) + "\n",
    ]  # fmt: skip
    if level is not None:
        pairs = [(report.named(row), row["at"]["before"], row["at"][level]) for row in rows if "before" in row["at"]]
        lines = [
            [*name, *(f"{at['ms']:.2f}, {at['floor_share']:.2f}" for at in (old, new)),
             f"{old['floor_share'] / new['floor_share']:.2f}"]
            for name, old, new in pairs
        ]  # fmt: skip
        head = ["op", "shape", "dtype", "before: ms, share", "now: ms, share", "now / before, each over its copy"]
        parts += [f"## {level}, before and now\n", report.piped([head, *lines]) + "\n"]
    return parts


def pages() -> dict[str, str]:
    """Name of each page and its text."""
    texts = {name: [f"# Every case on a {name}\n"] for name in MACHINES}
    for path in sorted((ROOT / "bench/results").glob("*.json")):
        name = machine(path)
        if name is not None:
            data = json.loads(path.read_text())
            commands = data.get("commands") or [data["command"]] if "command" in data or "commands" in data else []
            texts[name] += [
                f"## {path.stem}\n", f"{data['cpu']}.\n", *([escaped(data["note"])] if "note" in data else []),
                *(f"    {command}\n" for command in commands), report.markdown(report.load(path)) + "\n",
            ]  # fmt: skip
    note = "<!-- Written by python -m bench.pages. -->\n"
    texts["levels"] = levels()
    return {f"docs/cases/{name.lower().replace(' ', '')}.md": "\n".join([note, *text]) for name, text in texts.items()}
