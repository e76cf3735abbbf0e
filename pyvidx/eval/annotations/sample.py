"""What every annotation file becomes, and the checks its readers share."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyvidx.data import tables
from pyvidx.files import write_text


@dataclass(frozen=True)
class Sample:
    """One question to a video, one label of it, or the texts that describe it.

    Attributes:
        id: unique in its file; what predictions are keyed by.
        video: as the file names it, without folder, and without suffix where the file has none.
        question: what is asked, for tasks whose prompt takes a question.
        answer: the right text.
        captions: texts of the video, for retrieval.
        start, end: seconds of the video that count, start <= t < end; None: from the beginning, to the end.
        extra: what else the file says (answer_type, verb_class, ...).
    """

    id: str
    video: str
    question: str | None = None
    answer: str | None = None
    captions: tuple[str, ...] = ()
    start: float | None = None
    end: float | None = None
    extra: Mapping = field(default_factory=dict)


def truth(samples: Sequence[Sample]) -> dict[str, dict]:
    """The annotations that Task.score takes: id -> {"answer": text, and what `extra` holds}."""
    lacking = [s.id for s in samples if s.answer is None]
    if lacking:
        raise ValueError(f"annotations: {len(lacking)} samples have no answer, e.g. {lacking[:3]}")
    return {s.id: {**s.extra, "answer": s.answer} for s in samples}


def labels(samples: Sequence[Sample]) -> list[str]:
    """The answers that occur, sorted: the label set of a classification task is what its annotations name."""
    return sorted({s.answer for s in samples if s.answer is not None})


def absent(samples: Sequence[Sample], reference: Sequence[Sample]) -> list[Sample]:
    """Samples of `reference` whose id is not among `samples`, as the 40 questions that MA-LMM's ActivityNet lacks.

    Raises:
        ValueError: the two have no id in common, so one of them is not of this benchmark.
    """
    have = {s.id for s in samples}
    missing = [s for s in reference if s.id not in have]
    if len(missing) == len(reference):
        raise ValueError(f"annotations: the reference shares no id, e.g. {reference[0].id!r}, {samples[0].id!r}")
    return missing


def write_rows(path: str | Path, samples: Sequence[Sample], ask, *, suffix: str = "") -> Path:
    """The rows that `pyvidx train` reads, JSON lines of video, prompt, answer, start and end.

    Args:
        samples: with an answer, or with captions, each of which becomes a row.
        ask: a sample's question (or None) -> prompt, as Task.ask.
        suffix: put after the video's name, e.g. ".mp4".
    """
    rows = []
    for s in samples:
        answers = (s.answer,) if s.answer is not None else s.captions
        if not answers:
            raise ValueError(f"annotations: sample {s.id} has neither an answer nor captions to train on")
        times = {name: value for name, value in (("start", s.start), ("end", s.end)) if value is not None}
        prompt = ask(s.question)
        rows += [{"video": s.video + suffix, "prompt": prompt, "answer": text, **times} for text in answers]
    return write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def checked(samples: Iterable[Sample], path: str | Path) -> list[Sample]:
    """The samples, if there are any, their ids differ and they hold what Sample says."""
    found, seen = list(samples), set()
    if not found:
        raise ValueError(f"annotations: {path} must hold at least one sample of what was asked for")
    for s in found:
        known = [s.id, s.video, *(text for text in (s.question, s.answer) if text is not None), *s.captions]
        if not all(isinstance(text, str) and not tables.flaw(text) for text in known) or not s.video:
            raise ValueError(f"annotations: id, video and texts in {path} must be texts, got {known}")
        if s.id in seen:
            raise ValueError(f"annotations: ids in {path} must be unique, got {s.id!r} twice")
        seen.add(s.id)
    return found


def load(path: str | Path, kind: type | tuple[type, ...]):
    """A JSON file whose outermost value is an object (dict), a list, or either."""
    try:
        return tables.read_json(path, kind)
    except ValueError as error:
        raise ValueError(f"annotations: {error}") from error


def lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """(where, line) of the lines of a text file that are not empty."""
    for number, line in tables.lines(path, tables.strict(path, "annotations")):
        yield f"{path}, line {number}", line


def entries(path: str | Path, names: Sequence[str] = ()) -> Iterator[tuple[str, str, dict]]:
    """(where, key, row) of a JSON object of objects; every row must have `names`."""
    for key, row in load(path, dict).items():
        where = f"{path}, entry {key!r}"
        yield where, key, need(row, names, where)


def items(path: str | Path, names: Sequence[str] = ()) -> Iterator[tuple[str, dict]]:
    """(where, row) of a JSON list of objects; every row must have `names`."""
    for number, row in enumerate(load(path, list), 1):
        where = f"{path}, row {number}"
        yield where, need(row, names, where)


def table(path: str | Path, names: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, str]]]:
    """(where, row) of a CSV file with a header; every row must have `names`."""
    for number, row in tables.csv_dicts(path, tables.strict(path, "annotations")):
        where = f"{path}, line {number}"
        yield where, need(row, names, where)


def need(row, names: Sequence[str], where: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"annotations: {where} must be an object, got {type(row).__name__}")
    lacking = [name for name in names if row.get(name) is None]
    if lacking:
        raise ValueError(f"annotations: {where} must have {', '.join(lacking)}, got {', '.join(map(str, row))}")
    return row


def number(row: Mapping, name: str, where: str, kind: type = float):
    """row[name] as an int or a finite float."""
    try:
        value = kind(row[name])
        int(value)  # neither NaN nor infinite
        return value
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"annotations: {where} must have a number as {name}, got {row[name]!r}") from None


def seconds(text: str, where: str) -> float:
    """Seconds of "HH:MM:SS.fff", or of a number."""
    try:
        total = 0.0
        for part in text.split(":"):
            total = 60 * total + float(part)
        int(total)  # neither NaN nor infinite
        return total
    except (ValueError, OverflowError):
        raise ValueError(f"annotations: {where} must have times as HH:MM:SS.fff, got {text!r}") from None


def texts(value, where: str) -> tuple[str, ...]:
    """One text or a list of them, none empty."""
    found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else ()
    if not found or not all(isinstance(t, str) and t.strip() for t in found):
        raise ValueError(f"annotations: {where} must hold a text or a list of texts, got {value!r}")
    return found
