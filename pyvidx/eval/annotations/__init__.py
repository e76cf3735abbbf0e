"""Annotation files of the public benchmarks, which are the user's, to one kind of value: Sample."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

from pyvidx.eval.annotations import captions, classes, questions
from pyvidx.eval.annotations.sample import Sample, absent, labels, truth, write_rows

__all__ = ["FORMATS", "Sample", "absent", "labels", "parse", "truth", "write_rows"]

FORMATS: dict[str, Callable[..., list[Sample]]] = {
    f.__name__: f
    for f in (
        captions.msrvtt_csv, captions.msrvtt_json, captions.bt_adapter, captions.didemo, captions.activitynet,
        captions.lsmdc, captions.msvd, captions.ma_lmm_captions,
        questions.ma_lmm_qa, questions.official_qa, questions.video_chatgpt,
        classes.lvu, classes.lvu_official, classes.breakfast, classes.coin, classes.epic_kitchens, classes.video_list,
    )
}  # fmt: skip


def parse(format: str, files: str | Path | Sequence[str | Path], **options) -> list[Sample]:
    """The samples of an annotation file, or of the two of official_qa, by the name of their format.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown format or option, or a row that is not as the format has it; file and row are named.
    """
    if format not in FORMATS:
        raise ValueError(f"annotations: the format must be one of {', '.join(FORMATS)}, got {format!r}")
    reader = FORMATS[format]
    files = [files] if isinstance(files, str | Path) else list(files)
    parameters = inspect.signature(reader).parameters.values()
    count = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    required = {name for name, default in known.items() if default is inspect.Parameter.empty}
    if len(files) != count or not required <= set(options) <= set(known):
        raise ValueError(
            f"annotations: {format} takes {count} file(s) and the options {sorted(known)}, {sorted(required)} of them "
            f"always, got {len(files)} and {sorted(options)}"
        )
    try:
        return reader(*files, **options)
    except (AttributeError, KeyError, TypeError, OverflowError, RecursionError) as error:
        # A value of another kind, e.g. a number where a list stands: too many places to ask at each.
        named = ", ".join(map(str, files))
        raise ValueError(f"annotations: {named} must be as {format} has it: {type(error).__name__}: {error}") from error
