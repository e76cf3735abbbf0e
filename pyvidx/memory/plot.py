"""Pictures of a memory bank: which frames each slot holds, at the end and over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyvidx.memory.bank import Bank
from pyvidx.ops._library import require
from pyvidx.pictures import drawn


class History:
    """What the slots of one position held after each push, for a picture. Its memory is bounded: when it is full, every
    second record goes and only every second push is recorded from then on.

    Args:
        video, position: which of the bank's.
        limit: entries kept, over all records.
    """

    def __init__(self, video: int = 0, position: int = 0, limit: int = 20_000) -> None:
        self.video, self.position, self.limit = video, position, limit
        self.records: list[np.ndarray] = []  # [L, 3] each: first second, last second, size
        self._stride, self._calls, self._entries = 1, 0, 0

    def record(self, bank: Bank) -> None:
        """Call it after each push."""
        self.state = bank
        if self._calls % self._stride == 0:
            spans = spans_of(bank, self.video, self.position)[:, 0]
            self.records.append(spans[~np.isnan(spans[:, 0])])
            self._entries += len(self.records[-1])
        self._calls += 1
        while self._entries > self.limit and len(self.records) > 1:
            self.records = self.records[::2]
            self._stride *= 2
            self._entries = sum(map(len, self.records))


def spans_of(bank: Bank, video: int, position: int | None = None) -> np.ndarray:
    """[L, N, 3] float64, or [L, 1, 3] for one position: first second, last second and size of each entry of a video;
    NaN where nothing is stored."""
    require(bank.first is not None, "memory.plot: the bank must keep times; make it with times=True")
    spans = []
    for part in (bank.head, bank):
        if part is None:
            continue
        # [G, S] each
        order, *columns = (x[video].cpu() for x in (part.order, part.first, part.last, part.sizes))
        if position is not None:
            chosen = slice(position, position + 1) if len(order) > 1 else slice(1)
            order, *columns = (x[chosen] for x in (order, *columns))
        columns = [x.gather(1, order[:, : part.bound].long()).double() for x in columns]
        columns = [x.where(columns[-1] > 0, torch.nan).T for x in columns]  # the size of a free slot is 0
        spans.append(torch.stack([x.expand(-1, bank.positions if position is None else 1) for x in columns], dim=2))
    return torch.cat(spans).numpy()


def plot(
    source: Bank | History,
    path: str | Path,
    *,
    video: int = 0,
    title: str = "",
    thumbnails: Sequence[tuple[float, np.ndarray]] = (),
) -> Path:
    """Draw which source frames each slot holds.

    Left to right is source time in seconds; a box is a slot from its first to its last frame, colored by the number of
    frames merged into it. Where a slot keeps one frame and stands for several (uniform), the box is what it stands for.
    Below: the bank now, one row per position. Above it, for a History: the slots of one position as the video went by,
    one row per recorded push, top to bottom.

    Args:
        source: a bank, or the History of one.
        path: the picture, .png or whatever matplotlib writes.
        video: which of a bank's videos; a History has its own.
        thumbnails: (seconds, uint8 [H, W, 3]) pictures to show along the time axis.

    Raises:
        ValueError: there is nothing to draw.
        RuntimeError: matplotlib is not installed.
    """
    history = source if isinstance(source, History) else None
    require(history is None or history.records, "memory.plot: the history must hold a record, got none")
    bank, video = (source, video) if history is None else (history.state, history.video)
    now = spans_of(bank, video)
    require(not np.isnan(now[..., 0]).all(), "memory.plot: the bank must hold a frame, got an empty one")
    frames = int(bank.frames[video])
    begin, end = np.nanmin(now[..., 0]), np.nanmax(now[..., 1])
    if history is not None:
        begin = min(begin, min(r[:, 0].min() for r in history.records if len(r)))
    step = (end - begin) / max(frames - 1, 1) or 1.0  # how long a frame lasts
    heights = [1.1] * bool(thumbnails) + [5] * (history is not None) + [2.6 if now.shape[1] > 1 else 0.8]
    with drawn(path, 11, 1 + sum(heights), "memory.plot") as figure:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LogNorm

        norm = LogNorm(1, max(2.0, np.nanmax(now[..., 2])))
        axes = list(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        figure.suptitle(title or f"{frames} frames in {now.shape[0]} slots")
        if thumbnails:
            _thumbnails(axes.pop(0), thumbnails, begin, end + step)
        if history is not None:
            axis = axes.pop(0)
            seen = np.array([r[:, 1].max() if len(r) else begin for r in history.records])
            edges = np.append(seen, seen[-1] + (np.diff(seen).mean() if len(seen) > 1 else step))
            _boxes(axis, [(r, low, high) for r, low, high in zip(history.records, edges[:-1], edges[1:])], step, norm)
            axis.set(ylabel=f"when the video had reached (s)\nposition {history.position}", ylim=(edges[-1], edges[0]))
            axis.set_xlim(begin, end + step)
            axis.sharex(axes[0])
        _boxes(axes[0], [(now[:, n], n, n + 1) for n in range(now.shape[1])], step, norm)
        axes[0].set(xlabel="source time (s)", ylabel="position", xlim=(begin, end + step), ylim=(now.shape[1], 0))
        places = range(0, now.shape[1], -(-now.shape[1] // 16))
        axes[0].set_yticks([n + 0.5 for n in places], map(str, places))
        figure.colorbar(
            ScalarMappable(norm, "viridis_r"),
            ax=figure.axes[bool(thumbnails) :],
            label="frames in the slot",
            format="%d",
        )
    return Path(path)


def _boxes(axis: Any, rows: Sequence[tuple[np.ndarray, float, float]], step: float, norm: Any) -> None:
    """rows: (spans [L, 3], low, high); long ones first, so that overlapping short ones stay visible."""
    from matplotlib.collections import LineCollection, PolyCollection

    corners, sizes = [], []
    for spans, low, high in rows:
        for first, last, size in spans[np.argsort(spans[:, 0] - spans[:, 1], kind="stable")]:
            if not np.isnan(first):
                corners.append([(first, low), (last + step, low), (last + step, high), (first, high)])
                sizes.append(size)
    boxes = PolyCollection(corners, cmap="viridis_r", norm=norm, edgecolors="none", antialiaseds=False)
    boxes.set_array(np.array(sizes))
    axis.add_collection(boxes)
    axis.add_collection(LineCollection([(c[0], c[3]) for c in corners], colors="white", linewidths=0.5))


def _thumbnails(axis: Any, thumbnails: Sequence[tuple[float, np.ndarray]], begin: float, end: float) -> None:
    axis.axis("off")
    width = 1 / max(len(thumbnails), 1)
    for i, (seconds, picture) in enumerate(thumbnails):
        inset = axis.inset_axes((i * width, 0, width * 0.96, 0.85))
        inset.imshow(picture)
        inset.set_title(f"{seconds:.1f} s", fontsize=7)
        inset.axis("off")
