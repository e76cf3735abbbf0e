"""Which files of a folder are videos."""

from __future__ import annotations

import os
from pathlib import Path

SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".divx", ".wmv", ".asf", ".flv", ".f4v",
    ".mpg", ".mpeg", ".mpe", ".mpv", ".m1v", ".m2v", ".vob", ".ts", ".m2ts", ".mts", ".m2t", ".ogv", ".ogm", ".mxf",
    ".gif", ".mjpeg", ".mjpg", ".h264", ".264", ".h265", ".hevc", ".ivf", ".y4m", ".dv", ".nut",
)  # fmt: skip


def find_videos(folder: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """The files of a folder and its folders that are videos by their names, by path, and the others.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"video: there is no folder {folder}")
    videos: list[str] = []
    others: list[str] = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        (videos if path.suffix.lower() in SUFFIXES else others).append(str(path))
    return videos, others
