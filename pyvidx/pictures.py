"""The pictures of all commands: one style, drawn without a screen, there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pyvidx.files import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5d5d5d", "#8c510a", "#6a3d9a", "#b8b000")
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "figure.titlesize": 11, "legend.fontsize": 8, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.color": "0.9",
    "lines.linewidth": 1.2, "lines.markersize": 4, "image.cmap": "viridis", "savefig.dpi": 100,
}  # fmt: skip


@contextmanager
def drawn(path: str | Path, width: float, height: float, what: str) -> Iterator[Figure]:
    """An empty figure to draw on, which is written to the path when the block ends.

    Args:
        path: .png or whatever matplotlib writes.
        width, height: inches, of 100 pixels.
        what: who draws, the first word of an error.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"{what}: the picture needs matplotlib: pip install 'pyvidx[cli]'") from error
    with matplotlib.rc_context({**STYLE, "axes.prop_cycle": matplotlib.cycler(color=COLORS)}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with whole(path) as part:
            figure.savefig(part)
