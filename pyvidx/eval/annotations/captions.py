"""Videos and the texts that describe them: MSR-VTT, DiDeMo, ActivityNet, LSMDC, MSVD, and MA-LMM's captions.

A paragraph benchmark has one text per video, all its sentences joined by spaces.
"""

import csv
from collections.abc import Iterable
from pathlib import Path

from pyvidx.data import tables
from pyvidx.eval.annotations.sample import Sample, checked, entries, items, lines, load, need, number, table, texts

DIDEMO_SECONDS = 30.0  # the part of a video that was annotated


def msrvtt_csv(path: str | Path) -> list[Sample]:
    """MSR-VTT's test pairs (1k-A) as CLIP4Clip has them: columns video_id and sentence."""
    return _grouped(((row["video_id"], row["sentence"]) for _, row in table(path, ("video_id", "sentence"))), path)


def msrvtt_json(path: str | Path, *, videos: str | Path | None = None, split: str | None = None) -> list[Sample]:
    """MSRVTT_data.json: all sentences of each video, of those in a CSV with a column video_id, or of a split."""
    data = need(load(path, dict), ("videos", "sentences"), str(path))
    wanted = None
    if videos is not None:
        wanted = {row["video_id"] for _, row in table(videos, ("video_id",))}
    if split is not None:
        rows = [need(v, ("video_id", "split"), f"{path}, video {n}") for n, v in enumerate(data["videos"], 1)]
        of_split = {row["video_id"] for row in rows if row["split"] == split}
        wanted = of_split if wanted is None else wanted & of_split
    pairs = []
    for n, row in enumerate(data["sentences"], 1):
        need(row, ("video_id", "caption"), f"{path}, sentence {n}")
        if wanted is None or row["video_id"] in wanted:
            pairs.append((row["video_id"], row["caption"]))
    lacking = sorted((wanted or set()) - {video for video, _ in pairs})
    if lacking:
        raise ValueError(f"annotations: {path} must have sentences of {len(lacking)} more videos, e.g. {lacking[:3]}")
    return _grouped(pairs, path)


def bt_adapter(path: str | Path, *, paragraph: bool = False) -> list[Sample]:
    """BT-Adapter's lists: {file: [captions]}, or [{"video", "caption": [sentences]}], there joined if `paragraph`."""
    value = load(path, (dict, list))
    if isinstance(value, dict):
        pairs = [(file, texts(found, f"{path}, entry {file!r}")) for file, found in value.items()]
    else:
        pairs = [(row["video"], texts(row["caption"], where)) for where, row in items(path, ("video", "caption"))]
    made = (Sample(video, video, captions=(_paragraph(found),) if paragraph else found) for video, found in pairs)
    return checked(made, path)


def didemo(path: str | Path) -> list[Sample]:
    """DiDeMo's list of moments {"video", "description"}: a paragraph per video, and its first 30 seconds."""
    found: dict[str, list[str]] = {}
    for where, row in items(path, ("video", "description")):
        found.setdefault(row["video"], []).extend(texts(row["description"], where))
    made = (Sample(v, v, captions=(_paragraph(t),), start=0.0, end=DIDEMO_SECONDS) for v, t in found.items())
    return checked(made, path)


def activitynet(path: str | Path) -> list[Sample]:
    """ActivityNet Captions (val_1.json): {video: {"sentences": [...]}}, a paragraph per video."""
    made = (
        Sample(video, video, captions=(_paragraph(texts(row["sentences"], where)),),
               extra={"duration": row["duration"]} if "duration" in row else {})
        for where, video, row in entries(path, ("sentences",))
    )  # fmt: skip
    return checked(made, path)


def lsmdc(path: str | Path) -> list[Sample]:
    """LSMDC's six tab-separated columns: clip, start and end aligned, start and end extracted, sentence; no header.

    A clip is a file of its own, so its times in the movie are only kept in `extra`.
    """
    made = []
    refuse = tables.strict(path, "annotations")
    # Sentences hold quotation marks that quote nothing.
    for n, row in tables.csv_rows(path, refuse, delimiter="\t", quoting=csv.QUOTE_NONE):
        if len(row) != 6:
            refuse(n, f"must have 6 tab-separated columns, got {len(row)}")
        times = dict(zip(("start_aligned", "end_aligned", "start_extracted", "end_extracted"), row[1:5]))
        made.append(Sample(row[0], row[0], captions=texts(row[5], f"{path}, line {n}"), extra=times))
    return checked(made, path)


def msvd(path: str | Path, *, videos: str | Path | None = None) -> list[Sample]:
    """MSVD with many texts per video: .json of {video: [captions]}, or lines of "video caption" (# is a comment).

    videos: a file with a video per line, those of a split. CLIP4Clip's raw-captions.pkl runs code when it is loaded;
        write it as .json first.
    """
    path = Path(path)
    if path.suffix == ".pkl":
        raise ValueError(f"annotations: {path} is a pickle, which runs code when loaded; write it as .json first")
    if path.suffix == ".json":
        pairs = [
            (video, " ".join(t) if isinstance(t, list) else t)  # CLIP4Clip's captions are lists of words
            for video, found in load(path, dict).items()
            for t in (found if isinstance(found, list) else [found])
        ]
    else:
        pairs = []
        for where, line in lines(path):
            pair = tuple(line.split(maxsplit=1))
            if not pair[0].startswith("#"):
                if len(pair) < 2:
                    raise ValueError(f"annotations: {where} must be a video and a caption")
                pairs.append(pair)
    if videos is not None:
        wanted = [name for _, line in lines(videos) for name in line.split()]
        lacking = sorted(set(wanted) - {video for video, _ in pairs})
        if lacking:
            raise ValueError(f"annotations: {path} must have captions of {len(lacking)} more, e.g. {lacking[:3]}")
        pairs = [pair for pair in pairs if pair[0] in set(wanted)]
    return _grouped(pairs, path)


def ma_lmm_captions(path: str | Path) -> list[Sample]:
    """MA-LMM's caption files: {id: {"video", "caption"}}, and for YouCook2 start_time and end_time of a segment."""
    made = []
    for where, key, row in entries(path, ("video", "caption")):
        times = {k[:-5]: number(row, k, where) for k in ("start_time", "end_time") if k in row}
        made.append(Sample(key, row["video"], captions=texts(row["caption"], where), **times))
    return checked(made, path)


def _grouped(pairs: Iterable[tuple[str, str]], path: str | Path) -> list[Sample]:
    """One sample per video, in the order of first sight."""
    found: dict[str, list[str]] = {}
    for video, text in pairs:
        found.setdefault(video, []).append(text)
    return checked((Sample(v, v, captions=texts(t, f"{path}, video {v!r}")) for v, t in found.items()), path)


def _paragraph(sentences: Iterable[str]) -> str:
    return " ".join(s.strip() for s in sentences)
