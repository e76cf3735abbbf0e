"""Texts and tables that others wrote: their encoding, bounds on their size, and what becomes of a bad row.

UTF-8 is read with or without a byte-order mark, UTF-16 and UTF-32 with theirs. Other encodings are not guessed: a row
with bytes that are not UTF-8 is a bad one.

A reader passes each bad row on as refuse(line number, why). `strict` makes it an error; a LeftOut counts it, keeps the
reason, and the reader goes on.
"""

import codecs
import csv
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

FIELD = 1 << 20  # characters of a field of a table, and bytes of a caption's file
LINE = 16 << 20  # characters of a line
WHOLE = 2 << 30  # bytes of a file that is read as a whole
MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
NOT_UTF8 = "holds bytes that are not UTF-8; save the file as UTF-8"

Refuse = Callable[[int, str], None]


def strict(path: str | os.PathLike[str], op: str) -> Refuse:
    """A bad row is an error: raises ValueError that names file and line."""

    def refuse(line: int, why: str) -> None:
        raise ValueError(f"{op}: {path}, line {line} {why}")

    return refuse


class LeftOut:
    """Bad rows that a reader went on behind: how many, and the reasons of the first hundred.

    Args:
        what: the file or files, for people.
    """

    LISTED = 100

    def __init__(self, what: str | os.PathLike[str] = ""):
        self.what, self.count, self.reasons = str(what), 0, []

    def __call__(self, line: int, why: str) -> None:
        self.add(f"line {line} of {self.what} {why}")

    def add(self, why: str) -> None:
        """Of what has no lines."""
        self.count += 1
        if len(self.reasons) < self.LISTED:
            self.reasons.append(why)

    def __str__(self) -> str:
        more = f" (and {self.count - 1} more)" if self.count > 1 else ""
        return (self.reasons[0] if self.reasons else "nothing was left out") + more


class Lines:
    """The lines of a text file, as an iterator; `number` is that of the last one. Bytes that are not UTF-8 come as
    surrogates, which `flaw` finds.

    Raises, from its iteration:
        ValueError: a line is longer than LINE (it goes on behind it), or a UTF-16 or UTF-32 file is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]):
        with open(path, "rb") as file:
            encoding = _encoding(file.read(4))
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
        self.file, self.number = open(path, encoding=encoding, errors=errors, newline=""), 0

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> str:
        line = self.file.readline(LINE)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) == LINE and line[-1] not in "\r\n":
            while (rest := self.file.readline(LINE)) and rest[-1] not in "\r\n":
                pass
            raise ValueError(f"is longer than {LINE} characters")
        return line


def lines(path: str | os.PathLike[str], refuse: Refuse) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that are not empty, without their ends.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is a damaged UTF-16 or UTF-32 file; and what `refuse` raises.
    """
    with Lines(path) as file:
        for text in _going_on(file, file, refuse):
            text = text.rstrip("\r\n")
            if why := flaw(text):
                refuse(file.number, why)
            elif text.strip():
                yield file.number, text


def csv_rows(
    path: str | os.PathLike[str], refuse: Refuse, *, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL
) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, fields) of the rows that are not empty; a field has at most FIELD characters.

    Raises:
        OSError, ValueError: as in `lines`.
    """
    csv.field_size_limit(max(csv.field_size_limit(), FIELD))  # of all of csv; 131,072 is less than some captions have
    with Lines(path) as file:
        for row in _going_on(csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True), file, refuse):
            if why := next(filter(None, map(flaw, row)), None):
                refuse(file.number, why)
            elif row:
                yield file.number, row


def csv_dicts(
    path: str | os.PathLike[str], refuse: Refuse, *, delimiter: str = ","
) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of its last line, fields by column) of the rows below the first, which names the columns.

    Raises:
        OSError, ValueError: as in `lines`.
    """
    columns = None
    for number, row in csv_rows(path, refuse, delimiter=delimiter):
        if columns is None:
            columns = row
        else:
            yield number, dict(zip(columns, row))


def json_objects(path: str | os.PathLike[str], refuse: Refuse) -> Iterator[tuple[int, dict]]:
    """(number, object) of a .jsonl file.

    Raises:
        OSError, ValueError: as in `lines`.
    """
    for number, text in lines(path, refuse):
        try:
            value = parse_json(text)
        except ValueError as error:
            refuse(number, f"must be JSON: {error}")
            continue
        if isinstance(value, dict):
            yield number, value
        else:
            refuse(number, f"must be an object, got {type(value).__name__}")


def read_text(path: str | os.PathLike[str], limit: int = WHOLE) -> str:
    """A whole text file.

    Raises:
        OSError: it cannot be opened.
        ValueError: it has more than `limit` bytes, or others than its encoding has.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise ValueError(f"{path} must have at most {limit} bytes")
        content = file.read(limit + 1)  # of a pipe no size is known before
    if len(content) > limit:
        raise ValueError(f"{path} must have at most {limit} bytes")
    return decode(content, str(path))


def decode(content: bytes, where: str) -> str:
    """The text, without its byte-order mark.

    Raises:
        ValueError: bytes that its encoding has not, or a NUL character.
    """
    try:
        text = content.decode(_encoding(content))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{where}, line {line} {NOT_UTF8}") from error
    if "\0" in text:
        raise ValueError(f"{where}, line {text.count(chr(10), 0, text.index(chr(0))) + 1} holds a NUL character")
    return text


def read_json(path: str | os.PathLike[str], kind: type | tuple[type, ...] = (dict, list)):
    """A JSON file whose outermost value is an object (dict), a list, or either.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no such JSON.
    """
    try:
        value = parse_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join({dict: "an object", list: "a list"}[k] for k in kinds)
        raise ValueError(f"{path} must hold {wanted}, got {type(value).__name__}")
    return value


def parse_json(text: str):
    """Raises ValueError for whatever is no JSON, also where it is nested too deep to read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def flaw(text: str) -> str | None:
    """What makes a text unusable: bytes that were not UTF-8, or a NUL character."""
    if "\0" in text:
        return "holds a NUL character"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return NOT_UTF8
    return None


def inside(name: str) -> str:
    """The name of a file below a folder, if it stays there as it is written: not absolute and without "..".

    Links are followed, as data sets are often linked together.

    Raises:
        ValueError: it leaves the folder.
    """
    path = Path(name)
    if not name or "\0" in name or path.is_absolute() or path.drive or ".." in path.parts:
        raise ValueError(f"names {name!r}, which is not below the folder of the videos; outside=True allows that")
    return name


def _encoding(start: bytes) -> str:
    return next((name for mark, name in MARKS if start.startswith(mark)), "utf-8")


def _going_on(items: Iterator, file: Lines, refuse: Refuse) -> Iterator:
    """The items; one that is refused does not end it."""
    while True:
        first = file.number + 1
        try:
            item = next(items)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file.file.name}, behind line {file.number}: not {file.file.encoding}: {error}"
            ) from error
        except (csv.Error, ValueError) as error:
            upto = f" (up to line {file.number})" if file.number > first else ""  # quotes that are not closed
            refuse(first, f"cannot be read: {error}{upto}")
            continue
        yield item
