"""The study's results as JSON, tables and a picture."""

import statistics
from pathlib import Path

import torch

from bench.motion.rows import TABLES
from pyvidx.files import write_json, write_text
from pyvidx.pictures import drawn

HEAD = """| | appearance R@1 | time R@1 | time, right of two | trained parameters | seconds |
| --- | --- | --- | --- | --- | --- |
"""
NOTE = """\
Text to video, percent, clips of objects that no training had; mean of {seeds} seeds ± standard deviation. Appearance:
{looks} captions of what is to be seen, as many clips; chance is {look_chance:.1f}. Time: {events} captions of events,
as many clips, each of which has its opposite (the same frames backwards) among them; chance is {event_chance:.1f}, and
a mean of frames can not exceed 50. Right of two: whether a clip's own caption beats its
opposite's; chance is 50, and a mean of frames gets just that. "Last frame" shows how much of it is knowing which frame
is last: the CLIP has learned the words for events from photographs of their outcomes. The row BT-Adapter has the
published settings: tubes of 70 % masked, MBCA and MBTA at 0.1. Seconds: training, on one thread beside another run.
"""


def write(out: Path, plan: dict, clip: dict, runs: list[dict]) -> None:
    """study.json, table.md and study.png in the folder."""
    where = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    write_json(out / "study.json", {**where, "plan": plan, "clip": clip, "runs": runs}, indent=1)
    looks, events = runs[0]["test"]["looks"], runs[0]["test"]["events"]
    chances = {"look_chance": 100 / looks, "event_chance": 100 / events}
    text = NOTE.format(seeds=len({r["seed"] for r in runs}), looks=looks, events=events, **chances)
    for title, rows in TABLES.items():
        lines = [line(row.name, [r for r in runs if r["row"]["name"] == row.name]) for row in rows]
        if any(lines):
            text += f"\n**{title}**\n\n{HEAD}{''.join(lines)}"
    write_text(out / "table.md", text)
    draw(out / "study.png", runs)


def line(name: str, runs: list[dict]) -> str:
    if not runs:
        return ""
    cells = [spread([r["test"][key] for r in runs]) for key in ("appearance", "time", "pair")]
    seconds = statistics.mean(r["seconds"] for r in runs)
    return f"| {name} | {' | '.join(cells)} | {runs[0]['parameters']:,} | {seconds:.0f} |\n"


def spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def draw(path: Path, runs: list[dict]) -> None:
    """Right of two by kind of event, one line per row."""
    names = list(dict.fromkeys(r["row"]["name"] for r in runs))
    kinds = list(runs[0]["test"]["kinds"])
    values = [
        [statistics.mean(r["test"]["kinds"][k] for r in runs if r["row"]["name"] == name) for k in kinds]
        for name in names
    ]
    with drawn(path, 1.5 + len(kinds), 1.5 + 0.32 * len(names), "motion_study") as figure:
        axes = figure.subplots()
        axes.imshow(values, vmin=50, vmax=100, aspect="auto")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", color="white" if value < 80 else "black")
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set_yticks(range(len(names)), names)
        axes.set_title("a clip's own caption beats its opposite's, percent (chance 50)")
