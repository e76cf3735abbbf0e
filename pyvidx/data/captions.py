"""Videos with a caption each, from a csv, a folder or tar shards; numbered, so that any row can be read at any time."""

import glob
import hashlib
import inspect
import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from pyvidx.data import tables
from pyvidx.data.tars import members as _members
from pyvidx.files import write_tensors
from pyvidx.tensor_files import note, opened
from pyvidx.video.find import find_videos


class Packed(Sequence[str]):
    """Many strings in two tensors: workers share them, where a list of millions would be copied to each."""

    def __init__(self, strings: Iterable[str]):
        parts = [s.encode("utf-8", "surrogateescape") for s in strings]  # names of files may be no UTF-8
        self.bytes = torch.frombuffer(bytearray(b"".join(parts) or b"\0"), dtype=torch.uint8)
        self.ends = torch.tensor([0, *itertools.accumulate(map(len, parts))])

    @classmethod
    def of(cls, bytes: torch.Tensor, ends: torch.Tensor) -> "Packed":
        """From the two tensors of another one."""
        packed = cls(())
        packed.bytes, packed.ends = bytes, ends
        return packed

    def sound(self) -> bool:
        """Whether tensors that came from a file are those of strings."""
        ends = self.ends
        kinds = self.bytes.dtype == torch.uint8 and self.bytes.dim() == 1 and ends.dtype == torch.int64
        if not kinds or ends.dim() != 1 or not len(ends):
            return False
        return int(ends[0]) == 0 and int(ends[-1]) <= len(self.bytes) and bool((ends.diff() >= 0).all())

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> str:
        part = self.bytes[self.ends[i] : self.ends[i + 1]].numpy().tobytes()
        return part.decode("utf-8", "surrogateescape")


class Captioned:
    """Rows of a video file and its caption.

    Args:
        names: of the videos, for people; here paths below `root`.
        texts: their captions; one that is empty is for the reader to refuse.
        left_out: rows that could not be used. They are told in a warning.

    Raises:
        ValueError: there is no row, or more were left out than there are.
    """

    def __init__(
        self,
        names: Iterable[str],
        texts: Iterable[str],
        root: str | Path = ".",
        left_out: tables.LeftOut | None = None,
    ):
        names, texts = (s if isinstance(s, Packed) else Packed(s) for s in (names, texts))
        self.names, self.texts, self.root = names, texts, Path(root)
        self.left_out = tables.LeftOut() if left_out is None else left_out
        if not len(self) or self.left_out.count > len(self):
            have = f"{len(self)} rows for {self.left_out.count} left out" if len(self) else "no row"
            why = f": {self.left_out}" if self.left_out.count else ""
            raise ValueError(f"captions: there is {have}{why}")
        if self.left_out.count:
            warnings.warn(f"captions: {self.left_out.count} rows are left out: {self.left_out}", stacklevel=3)

    def __len__(self) -> int:
        return len(self.names)

    @contextmanager
    def file(self, row: int) -> Iterator[Path]:
        """The row's video as a file, there until the block ends.

        Raises:
            FileNotFoundError: there is none.
        """
        path = self.root / self.names[row]
        if not os.path.isfile(path):
            raise FileNotFoundError(f"captions: there is no {path}")
        yield path

    def digest(self) -> str:
        """A hash of names and captions: whether two are the same rows."""
        both = hashlib.sha256()
        for packed in (self.names, self.texts):
            both.update(packed.ends.numpy().tobytes())
            both.update(packed.bytes.numpy().tobytes())
        return both.hexdigest()


def webvid(
    table: str | Path,
    root: str | Path = ".",
    *,
    caption: int | str = 1,
    video: str = "{3}/{0}.mp4",
    header: bool = False,
    outside: bool = False,
) -> Captioned:
    """Rows of a csv like WebVid's. Rows that cannot be used are left out, see Captioned.

    Args:
        table: the .csv, in UTF-8 or, with its mark, UTF-16.
        root: folder of the videos.
        caption: column of the caption, by number from 0 or, with a header, by name.
        video: path of the video below root, made of columns: "{3}/{0}.mp4", or "{page_dir}/{videoid}.mp4".
        header: the first line names the columns.
        outside: take videos that are not below root as well, by an absolute path or by "..".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: most rows cannot be used: they lack a column, hold bytes that are not UTF-8, or name a file outside.
    """
    names, texts, left = [], [], tables.LeftOut(table)
    columns = None if header else []
    for number, line in tables.csv_rows(table, left):
        if columns is None:
            columns = line
            continue
        named = dict(zip(columns, line))
        try:
            name = video.format(*line, **named)
            text = line[caption] if isinstance(caption, int) else named[caption]
            names.append(name if outside else tables.inside(name))
            texts.append(text)
        except (IndexError, KeyError) as error:
            left(number, f"has no column {error} of {video!r} or {caption!r}")
        except ValueError as error:
            left(number, str(error))
    return Captioned(names, texts, root, left)


def folder(root: str | Path, *, outside: bool = False) -> Captioned:
    """Videos of a folder with captions in captions.json ({"a.mp4": "text"}), in captions.csv (video, caption), or in a
    NAME.txt beside every NAME.mp4, also in folders of it. Rows that cannot be used are left out, see Captioned.

    Args:
        outside: captions.json and captions.csv may name videos that are not below root.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no video, or a file of captions is not like that.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"captions: there is no folder {root}")
    if (root / "captions.csv").is_file() and not (root / "captions.json").is_file():
        named = {"caption": "caption", "video": "{video}", "header": True}
        return webvid(root / "captions.csv", root, outside=outside, **named)
    names, texts, left = [], [], tables.LeftOut(root)

    def take(name: str, text) -> None:
        try:
            if not isinstance(text, str) or tables.flaw(text):
                raise ValueError(f"has no caption that is a text, got {type(text).__name__}")
            Packed([name])
            names.append(name if outside else tables.inside(name))
            texts.append(text)
        except ValueError as error:
            left.add(f"{name!r} of {root} {error}")

    if (root / "captions.json").is_file():
        try:
            values = tables.read_json(root / "captions.json", dict)
        except ValueError as error:
            raise ValueError(f'captions: {root / "captions.json"} must be {{"a.mp4": "text", ...}}: {error}') from error
        for name, text in values.items():
            take(name, text)
        return Captioned(names, texts, root, left)
    for path in find_videos(root)[0]:
        side = path.with_suffix(".txt")
        try:  # a caption is short: a file that is not is none
            text = tables.read_text(side, tables.FIELD).strip() if side.is_file() else ""
        except (OSError, ValueError) as error:
            left.add(str(error))
            continue
        take(path.relative_to(root).as_posix(), text)
    return Captioned(names, texts, root, left)


class Shards(Captioned):
    """Rows in plain .tar files, of which the videos are read at their offsets: no order is given by the shards.

    Args:
        names: SHARD/KEY.
        texts: as in Captioned.
        paths: the shards.
        places: int64 [rows, 3] of shard, offset and bytes; offset -1: there is no video.
        left_out: as in Captioned.
    """

    def __init__(
        self,
        names: Iterable[str],
        texts: Iterable[str],
        paths: Sequence[Path],
        places: torch.Tensor,
        left_out: tables.LeftOut | None = None,
    ):
        super().__init__(names, texts, left_out=left_out)
        self.paths, self.places = list(paths), places

    @contextmanager
    def file(self, row: int) -> Iterator[Path]:
        """The row's video as a file, there until the block ends.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the shard is shorter than it was.
        """
        shard, offset, size = self.places[row].tolist()
        if offset < 0:
            raise FileNotFoundError(f"captions: {self.names[row]} has a caption and no video")
        # Readers open paths, some of them by seeking in C.
        with tempfile.NamedTemporaryFile(suffix=".mp4") as copy:
            with open(self.paths[shard], "rb") as tar:
                tar.seek(offset)
                while size and (part := tar.read(min(size, 1 << 20))):
                    size -= copy.write(part)
            if size:
                raise ValueError(f"captions: {self.paths[shard]} ends before the video {self.names[row]} does")
            copy.flush()
            yield Path(copy.name)


def shards(files: str | Sequence[str], index: str | Path | None = None) -> Shards:
    """WebDataset shards: .tar files in which KEY.mp4 is beside KEY.txt, or beside KEY.json with a "caption".

    The headers of all files are read, by seeking from one to the next: 0.2 ms per video. What cannot be used is left
    out, see Captioned; of a shard that is cut, what comes before the cut is taken.

    Args:
        files: paths, or patterns with * and ?.
        index: file to keep what was found in; it is made again where a shard is another or was changed, or where it
            is damaged.

    Raises:
        FileNotFoundError: a pattern matches nothing.
        ValueError: a file is not a plain .tar, or index is a file of something else.
    """
    paths = []
    for pattern in [files] if isinstance(files, str) else files:
        found = sorted(glob.glob(pattern))
        if not found:
            raise FileNotFoundError(f"captions: there is no {pattern}")
        paths += map(Path, found)
    state = [[os.fsdecode(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
    if index is not None and (kept := _read_index(Path(index), state)):
        names, texts, places, left = kept
        return Shards(names, texts, paths, places, left)
    names, texts, places, left = [], [], [], tables.LeftOut("shards")
    for number, path in enumerate(paths):
        for key, (text, offset, size) in _members(path, left).items():
            names.append(f"{path.name}/{key}")
            texts.append(text)
            places.append((number, offset, size))
    found = Shards(names, texts, paths, torch.tensor(places, dtype=torch.int64).view(-1, 3), left)
    if index is not None:
        about = {"shards": state, "left_out": [left.count, left.reasons]}
        tensors = {"places": found.places, "names": found.names.bytes, "names_ends": found.names.ends}
        tensors |= {"texts": found.texts.bytes, "texts_ends": found.texts.ends}
        write_tensors(index, tensors, {"pyvidx_shards": json.dumps(about)})
    return found


def _read_index(path: Path, state: list) -> tuple[Packed, Packed, torch.Tensor, tables.LeftOut] | None:
    """What an index holds of shards in this state; None where it is to be made."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        start = file.read(24)
    # Before it was safetensors, an index was torch.save's: a zip.
    if start and start[8:24] != b'{"__metadata__":' and not start.startswith(b"PK"):
        raise ValueError(f"captions: index {path} must be a new file or an index, it is a file of something else")
    try:
        with opened(path, "captions") as file:
            about = note(file, path, "pyvidx_shards")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        names, texts = (Packed.of(tensors[name], tensors[f"{name}_ends"]) for name in ("names", "texts"))
        places, left = tensors["places"], tables.LeftOut("shards")
        left.count, left.reasons = int(about["left_out"][0]), list(map(str, about["left_out"][1]))
        good = about["shards"] == state and names.sound() and texts.sound() and left.count >= 0
        good = good and places.dtype == torch.int64 and places.shape == (len(names), 3) and len(texts) == len(names)
        good = good and bool(((places[:, 0] >= 0) & (places[:, 0] < len(state)) & (places[:, 2] >= 0)).all())
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    return (names, texts, places, left) if good else None


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
