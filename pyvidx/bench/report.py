"""A table and a plot of what the benches measured."""

from pathlib import Path

from pyvidx.data.tables import read_json
from pyvidx.files import whole

COLUMNS = ("op", "shape", "dtype", "ms", "spread", "GB/s", "copy GB/s", "floor", "vs eager", "vs compile")


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
            row(case)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"report: {path} must hold cases of pyvidx's benches, got {error!r}") from error
    if not cases:
        raise ValueError(f"report: {path} must hold cases of pyvidx's benches, got none")
    return cases


def row(case: dict) -> tuple[str, ...]:
    """The cells of one case."""
    shape = " ".join(v if isinstance(v, str) else f"{k}{v}" for k, v in case["shape"].items())
    over_compile = case.get("vs_compile")
    return (
        case["op"],
        shape,
        case["dtype"],
        f"{case['ms']:.3f}",
        f"{case['spread']:.0%}",
        f"{case['gbps']:.1f}",
        f"{case['copy_gbps']:.1f}",
        f"{case['floor_share']:.2f}",
        f"{case['vs_eager']:.2f}x",
        f"{over_compile:.2f}x" if over_compile else "-",
    )


def table(cases: list[dict]) -> str:
    """One aligned line per case, under one line that says where it ran."""
    where = sorted({f"{c['device']}, {c['threads']} threads, torch {c['torch']}" for c in cases})
    rows = [COLUMNS, *(row(c) for c in cases)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(COLUMNS))]
    left = {0, 1, 2}
    lines = [
        "  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(r, widths))).rstrip()
        for r in rows
    ]
    note = "ms: median; spread: quartiles apart / median; floor: copy of the same bytes / ours, in the same rounds"
    return "\n".join([*where, *lines, note])


def plot(cases: list[dict], path: Path) -> None:
    """Bars of floor share per case, with the ratio to eager written beside each."""
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("report: the plot needs matplotlib: pip install 'pyvidx[cli]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [" ".join(row(c)[:3]) for c in cases]
    shares = [c["floor_share"] for c in cases]
    colors = {op: f"C{i}" for i, op in enumerate(dict.fromkeys(c["op"] for c in cases))}
    figure, axis = plt.subplots(figsize=(11, 1 + 0.26 * len(cases)))
    axis.barh(range(len(cases)), shares, color=[colors[c["op"]] for c in cases])
    for i, c in enumerate(cases):
        axis.text(shares[i], i, f" {c['vs_eager']:.1f}x eager", va="center", fontsize=7)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(cases)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("share of the floor: a copy of the same bytes = 1")
    axis.set_title(f"pyvidx {cases[0]['device']}, {cases[0]['threads']} threads", fontsize=9)
    figure.tight_layout()
    with whole(path) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)
