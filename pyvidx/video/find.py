"""The videos of a folder, by the ends of their names."""

from __future__ import annotations

import os
from pathlib import Path

# Of containers that hold their own data; a playlist (.m3u8, .mpd) is not a video.
SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mj2",
    ".mkv", ".webm", ".avi", ".divx", ".amv", ".flv", ".wmv", ".asf", ".ogv", ".ogm", ".rm", ".rmvb", ".nut", ".wtv",
    ".ts", ".m2ts", ".mts", ".m2t", ".mpg", ".mpeg", ".mpe", ".mpv", ".m1v", ".m2v", ".vob", ".mxf", ".gxf", ".dv",
    ".gif", ".apng", ".mjpeg", ".mjpg", ".ivf", ".y4m", ".h264", ".264", ".h265", ".265", ".hevc", ".obu",
)  # fmt: skip


def find_videos(folder: str | os.PathLike[str]) -> tuple[list[Path], list[Path]]:
    """The videos in a folder and in those below it, sorted, and the files that were left out.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"find_videos: no such folder: {folder}")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    videos = [path for path in files if path.suffix.lower() in SUFFIXES]
    return videos, [path for path in files if path.suffix.lower() not in SUFFIXES]
