"""Videos and their classes: LVU, Breakfast, COIN, EPIC-Kitchens-100, and plain lists."""

import re
from pathlib import Path

from pyvidx.data import tables
from pyvidx.eval import lvu as windows_of
from pyvidx.eval.annotations.sample import Sample, checked, entries, lines, load, need, number, seconds, table

LVU_LABELS = ("director", "genre", "relationship", "scene", "way_speaking", "writer", "year")
LVU_LONGEST = 1e6  # seconds of a video
LVU_REGRESSIONS = ("like_ratio", "view_count")
# Named in MA-LMM's loaders: their videos could not be read there.
BREAKFAST_BROKEN = ("P28-cam01-P28_cereals", "P27-stereo-P27_milk_ch0", "P28-cam02-P28_cereals")
BREAKFAST_TEST = range(47, 55)  # persons; the others, 3 to 46, are for training
COIN_BROKEN = ("AfiVmAjfTNs", "cjwtcDKTQM8")


def lvu(path: str | Path, *, task: str, history: int = 100, stride: int = 20) -> list[Sample]:
    """MA-LMM's LVU file: every window of `history` s, one each `stride` s, of the videos that have the task's label.

    The id is VIDEO_START. The public code takes frames at 10 fps, up to the one at the window's last second.
    """
    if task not in LVU_LABELS:
        raise ValueError(f"annotations: the LVU task must be one of {', '.join(LVU_LABELS)}, got {task!r}")
    made = []
    for where, video, row in entries(path, ("duration",)):
        if task not in row:
            continue
        length = number(row, "duration", where)
        if not 0 < length <= LVU_LONGEST:
            raise ValueError(f"annotations: {where} must have seconds as duration, got {row['duration']!r}")
        for start, last in windows_of.windows(length, history=history, stride=stride):
            made.append(Sample(f"{video}_{start}", video, answer=str(row[task]), start=start, end=last + 0.1))
    return checked(made, path)


def lvu_official(path: str | Path, *, task: str) -> list[Sample]:
    """The benchmark's own lists: separated by spaces, the label first, the video id second to last.

    answer is the label; the two regressions have extra["target"], see pyvidx.eval.lvu: like_ratio starts with likes
    and dislikes, view_count with views.
    """
    if task not in LVU_LABELS + LVU_REGRESSIONS:
        known = ", ".join(LVU_LABELS + LVU_REGRESSIONS)
        raise ValueError(f"annotations: the LVU task must be one of {known}, got {task!r}")
    made = []
    for where, line in lines(path):
        row, first = line.split(), 2 if task == "like_ratio" else 1
        if len(row) < first + 2:
            raise ValueError(f"annotations: {where} must have a label, a video id and one more column, got {line!r}")
        values = [number({"label": v}, "label", where, int if task in LVU_LABELS else float) for v in row[:first]]
        video = row[-2]
        if task in LVU_LABELS:
            made.append(Sample(video, video, answer=str(values[0]), extra={"label": values[0]}))
            continue
        try:
            target = (windows_of.like_label if first == 2 else windows_of.view_label)(*values)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"annotations: {where} must have counts above 0, got {row[:first]}") from None
        made.append(Sample(video, video, extra={"target": target}))
    return checked(made, path)


def breakfast(path: str | Path, *, split: str | None = None, keep_broken: bool = False) -> list[Sample]:
    """MA-LMM's Breakfast file {id: {"class_name"}}: all of it, or the persons of a split, "train" or "test".

    Three ids that its code names as broken are left out unless keep_broken.
    """
    if split not in (None, "train", "test"):
        raise ValueError(f"annotations: split must be train or test, got {split!r}")
    made = []
    for where, key, row in entries(path, ("class_name",)):
        person = re.match(r"P(\d+)", key)
        if person is None:
            raise ValueError(f"annotations: {where} must be named after its person, P03 to P54")
        if key in BREAKFAST_BROKEN and not keep_broken:
            continue
        part = "test" if int(person[1]) in BREAKFAST_TEST else "train"
        if split in (None, part):
            made.append(Sample(key, key, answer=row["class_name"], extra={"split": part}))
    return checked(made, path)


def coin(
    path: str | Path, *, subset: str = "testing", label: str = "target", keep_broken: bool = False
) -> list[Sample]:
    """COIN.json {id: {"subset", "target"}}, bare or under "database": one subset, "training" or "testing".

    Two ids that MA-LMM's code names as broken and, as there, entries without num_frames_actual are left out unless
    keep_broken.
    """
    rows = load(path, dict)
    made = []
    for key, row in rows.get("database", rows).items():
        need(row, ("subset", label), f"{path}, entry {key!r}")
        if not keep_broken and (key in COIN_BROKEN or "num_frames_actual" not in row):
            continue
        if row["subset"] == subset:
            made.append(Sample(key, key, answer=str(row[label])))
    return checked(made, path)


def epic_kitchens(path: str | Path, *, gap: float = 1.0, observed: float = 10.0) -> list[Sample]:
    """EPIC_100_*.csv for anticipation: what is seen ends `gap` s (1 in the challenge) before the action starts.

    observed: seconds that are seen; nothing public says how many MA-LMM took. A test file has no classes, and so no
        answer. An action that starts before `gap` leaves nothing to see: end is then the first tenth of a second.
    """
    made = []
    for where, row in table(path, ("narration_id", "participant_id", "video_id", "start_timestamp")):
        end = max(seconds(row["start_timestamp"], where) - gap, 0.1)
        names = ("verb_class", "noun_class")
        classes = {k: number(row, k, where, int) for k in names if k in row}
        answer = f"{row['verb']} {row['noun']}" if {"verb", "noun"} <= set(row) else None
        made.append(
            Sample(row["narration_id"], row["video_id"], answer=answer, start=max(0.0, end - observed), end=end,
                   extra={"participant_id": row["participant_id"], **classes})
        )  # fmt: skip
    return checked(made, path)


def video_list(path: str | Path, *, classes: str | Path | None = None) -> list[Sample]:
    """Lines of "file number", as in mmaction2: the class number, or its name in the file `classes` (one a line)."""
    names = None if classes is None else class_names(classes)
    made = []
    for where, line in lines(path):
        row = line.rsplit(maxsplit=1)
        if len(row) != 2:
            raise ValueError(f"annotations: {where} must be a file and a class number, got {line!r}")
        index = number({"class": row[1]}, "class", where, int)
        if index < 0 or (names is not None and index >= len(names)):
            raise ValueError(f"annotations: {where} must name a class of the {len(names or ())}, got {index}")
        answer = str(index) if names is None else names[index]
        made.append(Sample(row[0], row[0], answer=answer, extra={"label": index}))
    return checked(made, path)


def class_names(path: str | Path) -> list[str]:
    """Class names, one a line, in the order of their numbers."""
    try:
        names = [line.strip() for line in tables.read_text(path).split("\n")]
    except ValueError as error:
        raise ValueError(f"annotations: {error}") from error
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        raise ValueError(f"annotations: {path} must have a class name on every line")
    return names
