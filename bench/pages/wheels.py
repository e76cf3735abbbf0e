"""docs/cases/wheels.md: where each wheel ran, from the newest bench/results/wheels-*.json of cmake/wheel_check.py."""

import json

from bench.pages import ROOT
from pyvidx.bench import report

TEXT = """# Where the wheels ran

`python cmake/wheel_check.py` installs each wheel of `make wheel` into fresh environments, outside of the source tree,
and runs there what a stranger would:

* **info**: `pyvidx info` finds a kernel for every op; in the pure wheel none, and says so.
* **ops**: the tests of all ops. **demo**: `pyvidx demo`.
* **hosts**: the tests of language models with that version of transformers. Before 5.20.2 they are given no encoded
  video: the towers and language models are tested, and that pyvidx refuses and names the version it needs.
* **floor**: the oldest version of every package that pyproject.toml allows.

No GPU was in this machine: a wheel with CUDA kernels ran on its CPU kernels. A dash is a step that was not run.
"""


def table(results: dict) -> str:
    """The matrix: a row for each wheel, Python and torch."""
    steps = [step for row in results["rows"] for step in row["steps"].items()]
    names = list(dict.fromkeys(name for name, done in steps if not (name.endswith("install") and done["ok"])))
    names.sort(key=lambda name: ("install", "info", "ops", "demo", "hosts", "floor").index(name.split()[0].strip(":")))

    def cell(step: dict | None) -> str:
        if step is None:
            return "-"
        said = (step["said"].splitlines() or ["ok"])[-1]
        return said if step["ok"] else f"**fails**: {said}"

    body = [
        [row["kind"], row["python"], row["torch"], *(cell(row["steps"].get(name)) for name in names)]
        for row in sorted(results["rows"], key=lambda row: (row["kind"], *map(int, row["python"].split("."))))
    ]
    return report.piped([["wheel", "Python", "torch", *names], *body], numbers=False) + "\n"


def sizes(results: dict) -> str:
    """File, size and commit of each wheel, the smallest first."""
    files = {row["wheel"]: (row["bytes"], row["commit"]) for row in results["rows"]}
    lines = ((f"`{n}`", f"{b / 2**20:.1f}", f"`{c}`") for n, (b, c) in sorted(files.items(), key=lambda f: f[1]))
    return report.piped([("file", "MiB", "commit"), *lines]) + "\n"


def pages() -> dict[str, str]:
    """Name of the page and its text."""
    newest = max((ROOT / "bench/results").glob("wheels-*.json"))
    results = json.loads(newest.read_text())
    how = f"From `bench/results/{newest.name}`"
    if results.get("sample"):
        how += f"; of every parametrized test, {results['sample']} case per environment"
    note = "<!-- Written by python -m bench.pages. -->\n"
    parts = [note, TEXT, how + ":\n", table(results), *([results["note"] + "\n"] if "note" in results else [])]
    return {"docs/cases/wheels.md": "\n".join([*parts, sizes(results)])}
