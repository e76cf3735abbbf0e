"""Tables of predictions, for a terminal and for docs/predictions.md."""

from pyvidx.bench import known, model, predict
from pyvidx.bench.report import aligned, named, piped

COLUMNS = ("op", "shape", "dtype", "GPU", "us", "of copy", "limit", "registers", "warps", "rounds", "per 16 B")
COMPARED = ("op", "shape", "dtype", "GPU", "us", "known us", "of copy", "known", "error", "limit")
MISSED = ("op", "shape", "dtype", "GPU", "of copy", "wanted", "limit", "launches", *(f"{x}, us" for x in model.LIMITS))
MEMORY_BOUND, SHORT, LONG = {70: 0.80, 90: 0.85}, 0.75, 0.65
# Why ops miss a goal, in words: what numbers there are stand in the table.
REASONS = {
    "gated_fusion_backward": "a second launch adds up what blocks have found, in a fixed order. One "
    "launch would need a counter that is 0 before it, which another launch would have to clear.",
    "temporal_scale_backward": "as gated_fusion_backward.",
    "token_gather": "rows are named by an index that is loaded before them: two rounds of memory, which "
    "the few bytes of one clip do not hide.",
    "st_pool": "a block has 16 bytes of channels, so that its sums are whole, and sectors of 32 bytes come from L2 "
    "twice.",
    "resize_normalize": "weights have 23 bits and levels 8, so that four taps of three channels are nine dot products. "
    "What is around them comes on top.",
}
NOTE = (
    "us: all launches of the case; of copy: a copy of the same bytes / ours; limit, registers, warps (on a "
    "multiprocessor) and rounds (how often a warp waits for memory): of the longest launch; per 16 B: instructions of "
    "a lane per 16 bytes moved"
)
MARKS = ("<!-- pyvidx bench predict -->", "<!-- end -->")


def cells(row: dict) -> tuple[str, ...]:
    return (*named(row), row["gpu"], f"{row['us']:.1f}", f"{row['share']:.2f}", row["limit"], str(row["registers"]),
            str(row["warps"]), str(row["rounds"]), f"{row['per_16_bytes']:.1f}")  # fmt: skip


def compared(found: list[dict]) -> list[tuple[str, ...]]:
    """Cells of predicted against known; the error is that of the share of copy."""
    return [
        (*named(r), r["gpu"], f"{r['us']:.1f}", f"{r['known_us']:.1f}", f"{r['share']:.2f}", f"{r['known_share']:.2f}",
         f"{r['share'] / r['known_share'] - 1:+.0%}", r["limit"])
        for r in found
    ]  # fmt: skip


def against(traces: list[dict]) -> dict[str, list[tuple[str, ...]]]:
    """Title -> rows with their head, of what there is to compare with."""
    found = {
        "Against the simulator": known.against_simulation(traces),
        "Against measurements": known.against_measurements(traces, known.measurements()),
    }
    return {title: [COMPARED, *compared(rows)] for title, rows in found.items() if rows}


def wanted(op: str, shape: dict, arch: int) -> float | None:
    """The share of copy that a case should reach; None where there is no goal: other ops bound by arithmetic, sm_80."""
    if op == "temporal_attention":
        return (SHORT if shape["T"] <= 16 else LONG) if arch == 90 else None
    return None if op.startswith(("bank_attention", "temporal_attention")) else MEMORY_BOUND.get(arch)


def goals(traces: list[dict], gpus: list[model.Gpu]) -> str:
    """How many of the goals hold, and of the others what takes their time."""
    arch = {gpu.name: gpu.arch for gpu in gpus}
    asked = [(row, wanted(row["op"], row["shape"], arch[row["gpu"]])) for row in predict.rows(traces, gpus)]
    asked = [(row, share) for row, share in asked if share is not None]
    missed = [
        (*named(row), row["gpu"], f"{row['share']:.2f}", f"{share:.2f}", row["limit"], str(row["launches"]),
         *(f"{row['limits_us'][name]:.1f}" for name in model.LIMITS))
        for row, share in asked if row["share"] < share
    ]  # fmt: skip
    said = (
        f"Wanted of a copy's speed: {MEMORY_BOUND[70]:.2f} on sm_70 and {MEMORY_BOUND[90]:.2f} on sm_90 where memory "
        f"is the floor; of temporal_attention on sm_90 {SHORT:.2f} up to T = 16 and {LONG:.2f} beyond. "
        f"{len(asked) - len(missed)} of {len(asked)} hold."
    )
    if not missed:
        return said
    ops = {cells[0].split()[0] for cells in missed}
    reasons = "\n".join(f"* `{op}`: {why}" for op, why in REASONS.items() if op in ops)
    told = f"{said} These do not; the last columns are what limits the longest launch:\n\n{piped([MISSED, *missed])}"
    return f"{told}\n\nWhat stands between some of them and a copy:\n\n{reasons}" if reasons else told


def text(traces: list[dict], gpus: list[model.Gpu]) -> str:
    """All tables, for a terminal."""
    blocks = ["predicted, not measured:", aligned([COLUMNS, *map(cells, predict.rows(traces, gpus))]), NOTE]
    for title, rows in against(traces).items():
        about = known.simulated()[0] if "simulator" in title else "of bench/results"
        blocks += ["", f"{title} ({about}):", aligned(rows)]
    return "\n".join(blocks)


def markdown(traces: list[dict], gpus: list[model.Gpu]) -> str:
    """The tables of docs/predictions.md: a row for each case, a column for each GPU."""
    rows = [("op", "shape", "dtype", *(gpu.name for gpu in gpus))]
    for trace in traces:
        if mine := predict.rows([trace], gpus):
            shown = (f"{r['us']:.1f} us, {r['share']:.2f}, {r['limit']}" for r in mine)
            rows.append((*named(trace), *shown))
    blocks = [piped(rows), goals(traces, gpus)]
    blocks += [f"{title}:\n\n{piped(rows)}" for title, rows in against(traces).items()]
    return "\n\n".join(blocks)


def filled(page: str, tables: str) -> str:
    """A page with the tables between its marks.

    Raises:
        ValueError: it has no marks.
    """
    before, start, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not start or not end:
        raise ValueError(f"predict: the page must have the lines {MARKS[0]} and {MARKS[1]}, got a page without")
    return f"{before}{start}\n{tables}\n{end}{after}"
