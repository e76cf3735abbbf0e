"""Videos with a caption each, from a csv, a folder or tar shards; numbered, so that any row can be read at any time."""

import csv
import glob
import hashlib
import inspect
import itertools
import json
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from pyvidx.video.reader import SUFFIXES


class Packed(Sequence[str]):
    """Many strings in two tensors: workers share them, where a list of millions would be copied to each."""

    def __init__(self, strings: Iterable[str]):
        parts = [s.encode() for s in strings]
        self.bytes = torch.frombuffer(bytearray(b"".join(parts) or b"\0"), dtype=torch.uint8)
        self.ends = torch.tensor([0, *itertools.accumulate(map(len, parts))])

    @classmethod
    def of(cls, bytes: torch.Tensor, ends: torch.Tensor) -> "Packed":
        """From the two tensors of another one."""
        packed = cls(())
        packed.bytes, packed.ends = bytes, ends
        return packed

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> str:
        return self.bytes[self.ends[i] : self.ends[i + 1]].numpy().tobytes().decode()


class Captioned:
    """Rows of a video file and its caption.

    Args:
        names: of the videos, for people; here paths below `root`.
        texts: their captions; one that is empty is for the reader to refuse.
    """

    def __init__(self, names: Iterable[str], texts: Iterable[str], root: str | Path = "."):
        names, texts = (s if isinstance(s, Packed) else Packed(s) for s in (names, texts))
        self.names, self.texts, self.root = names, texts, Path(root)
        if not len(self):
            raise ValueError("captions: there is no row")

    def __len__(self) -> int:
        return len(self.names)

    @contextmanager
    def file(self, row: int) -> Iterator[Path]:
        """The row's video as a file, there until the block ends.

        Raises:
            FileNotFoundError: there is none.
        """
        path = self.root / self.names[row]
        if not path.is_file():
            raise FileNotFoundError(f"captions: there is no {path}")
        yield path

    def digest(self) -> str:
        """A hash of names and captions: whether two are the same rows."""
        both = hashlib.sha256()
        for packed in (self.names, self.texts):
            both.update(packed.ends.numpy().tobytes())
            both.update(packed.bytes.numpy().tobytes())
        return both.hexdigest()


class Shards(Captioned):
    """Rows in plain .tar files, of which the videos are read at their offsets: no order is given by the shards.

    Args:
        names: SHARD/KEY.
        texts: as in Captioned.
        paths: the shards.
        places: int64 [rows, 3] of shard, offset and bytes; offset -1: there is no video.
    """

    def __init__(self, names: Iterable[str], texts: Iterable[str], paths: Sequence[Path], places: torch.Tensor):
        super().__init__(names, texts)
        self.paths, self.places = list(paths), places

    @contextmanager
    def file(self, row: int) -> Iterator[Path]:
        shard, offset, size = self.places[row].tolist()
        if offset < 0:
            raise FileNotFoundError(f"captions: {self.names[row]} has a caption and no video")
        # Readers open paths, some of them by seeking in C.
        with tempfile.NamedTemporaryFile(suffix=".mp4") as copy:
            with open(self.paths[shard], "rb") as tar:
                tar.seek(offset)
                copy.write(tar.read(size))
            copy.flush()
            yield Path(copy.name)


def webvid(
    table: str | Path,
    root: str | Path = ".",
    *,
    caption: int | str = 1,
    video: str = "{3}/{0}.mp4",
    header: bool = False,
) -> Captioned:
    """Rows of a csv like WebVid's.

    Args:
        table: the .csv.
        root: folder of the videos.
        caption: column of the caption, by number from 0 or, with a header, by name.
        video: path of the video below root, made of columns: "{3}/{0}.mp4", or "{page_dir}/{videoid}.mp4".
        header: the first line names the columns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line lacks a column.
    """
    names, texts = [], []
    with Path(table).open(newline="") as file:
        lines = csv.reader(file)
        columns = next(lines, []) if header else []
        for line in lines:
            if not line:
                continue
            named = dict(zip(columns, line))
            try:
                names.append(video.format(*line, **named))
                texts.append(line[caption] if isinstance(caption, int) else named[caption])
            except (IndexError, KeyError) as error:
                raise ValueError(
                    f"captions: line {lines.line_num} of {table} has no column {error} of {video!r} or {caption!r}"
                ) from error
    return Captioned(names, texts, root)


def folder(root: str | Path) -> Captioned:
    """Videos of a folder with captions in captions.json ({"a.mp4": "text"}), in captions.csv (video, caption), or in a
    NAME.txt beside every NAME.mp4, also in folders of it.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no video, or a file of captions is not like that.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"captions: there is no folder {root}")
    if (root / "captions.json").exists():
        values = json.loads((root / "captions.json").read_text())
        if not isinstance(values, dict) or not all(isinstance(text, str) for text in values.values()):
            raise ValueError(f'captions: {root / "captions.json"} must be {{"a.mp4": "text", ...}}')
        return Captioned(values.keys(), values.values(), root)
    if (root / "captions.csv").exists():
        return webvid(root / "captions.csv", root, caption="caption", video="{video}", header=True)
    videos = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
    sides = [p.with_suffix(".txt") for p in videos]
    texts = [side.read_text().strip() if side.exists() else "" for side in sides]
    return Captioned([p.relative_to(root).as_posix() for p in videos], texts, root)


def shards(files: str | Sequence[str], index: str | Path | None = None) -> Shards:
    """WebDataset shards: .tar files in which KEY.mp4 is beside KEY.txt, or beside KEY.json with a "caption".

    The headers of all files are read, by seeking from one to the next: 0.2 ms per video.

    Args:
        files: paths, or patterns with * and ?.
        index: file to keep what was found in; it is made again where a shard is another or was changed.

    Raises:
        FileNotFoundError: a pattern matches nothing.
        ValueError: a file is not a plain .tar, or damaged.
    """
    paths = []
    for pattern in [files] if isinstance(files, str) else files:
        found = sorted(glob.glob(pattern))
        if not found:
            raise FileNotFoundError(f"captions: there is no {pattern}")
        paths += map(Path, found)
    state = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
    if index is not None and Path(index).exists():
        kept = torch.load(index, weights_only=True)
        if kept["shards"] == state:
            return Shards(*(Packed.of(*kept[name]) for name in ("names", "texts")), paths, kept["places"])
    names, texts, places = [], [], []
    for number, path in enumerate(paths):
        for key, (text, offset, size) in _members(path).items():
            names.append(f"{path.name}/{key}")
            texts.append(text)
            places.append((number, offset, size))
    found = Shards(names, texts, paths, torch.tensor(places, dtype=torch.int64))
    if index is not None:
        part = Path(f"{index}.{os.getpid()}.part")  # several processes may do this at once
        columns = {name: (p.bytes, p.ends) for name, p in (("names", found.names), ("texts", found.texts))}
        torch.save({"shards": state, "places": found.places, **columns}, part)
        os.replace(part, index)
    return found


def _members(path: Path) -> dict[str, tuple[str, int, int]]:
    """KEY -> caption, offset and bytes of the video."""
    found: dict[str, tuple[str, int, int]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")  # WebDataset's rule: the key ends at the first dot
                key = f"{folder}/{stem}".lstrip("/")
                text, offset, size = found.get(key, ("", -1, 0))
                if f".{kind.lower()}" in SUFFIXES:
                    offset, size = member.offset_data, member.size
                elif kind in ("txt", "json"):
                    content = tar.extractfile(member).read().decode()
                    text = content.strip() if kind == "txt" else json.loads(content).get("caption", text)
                else:
                    continue
                found[key] = (text, offset, size)
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"captions: {path} is not a plain .tar of videos and captions: {error}") from error
    return found


KINDS = {"webvid": webvid, "folder": folder, "shards": shards}


def captioned(source: dict) -> Captioned:
    """Rows from {"kind": "webvid", "folder" or "shards", ...arguments of the function of that name}.

    Raises:
        ValueError: another kind, or arguments that do not fit it.
    """
    arguments = dict(source)
    kind = KINDS.get(arguments.pop("kind", None))
    if kind is None:
        raise ValueError(f"captions: kind must be one of {', '.join(KINDS)}, got {source.get('kind')!r}")
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"captions: {kind.__name__}: {error}") from error
    return kind(**arguments)
