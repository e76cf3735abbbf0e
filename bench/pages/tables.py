"""docs/cases/*.md: every case that was measured on a CPU, from the files of bench/results that hold cases of ops."""

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
    return {f"docs/cases/{name.lower().replace(' ', '')}.md": "\n".join([note, *text]) for name, text in texts.items()}
