"""The numbers of README and docs, each held to a result that is committed.

A claim is a piece of a page's text with fields in the place of its measured numbers, and the values that belong there:

    claim("end to end it gains {:.1f}x", case("cpu-zen5-2026-11-26", op="encoder", size="clip-l-14")["vs_eager"])

`python -m bench.pages` writes the values into the pages; tests/test_pages.py fails where a page has another number than
its result, a claim whose text is gone, or a number that is neither in a claim nor known to be no measurement. Claims
and those that are none are in claims.py. Whole pages of tables are in tables.py.
"""

import functools
import json
import re
import string
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NUMBER = r"\d[\d,]*(?:\.\d+)?|\.\d+"

# What is no measurement wherever it stands: settings, names, versions, dates, formats.
SETTINGS = "|".join((
    r"\b[A-Z] ?(?:=|<=|>=|<) ?\d[\d,]*",  # B = 4, T <= 128, M=40
    r"\b(?:CLIP-)?[A-Z]/\d+",  # L/14
    r"\b(?:Zen|FFmpeg|Python|torch|transformers|CUDA|PyAV|vLLM|SGLang|mteb|lmms-eval|torchao|peft|accelerate|SigLIP|"
    r"Vicuna|nvcc|NVRTC|exit) \d[\d.]*(?:(?:,| and| to| or) \d[\d.]*)*",
    r"\b\d+\.\d+\.\d+\b", r"\b\d{4}-\d\d-\d\d\b", r"arXiv:[\d.]+", r"\b\d+p\b", r"\b(?:8|16|32|64)[ -]bits?\b",
    r"\b\d+(?:e-?\d+)\b", r"\b[A-Za-z]+[-_]?\d[\w.-]*", r"§ ?[\d.]+",
))  # fmt: skip
PREDICTED = r"<!-- pyvidx bench predict -->.*?<!-- end -->"  # tests/test_predict.py holds it
NOT_PROSE = (
    r"^```.*?^```|^(?: {4}|\t).*?$|``.+?``|`[^`\n]*(?:\n[^`\n]+)?`|\]\([^)]*\)|<!--.*?-->|https?://\S+|^#+ .*?$|^\d+\. "
)


@dataclass(frozen=True)
class Claim:
    """Text of a page with fields for its numbers, and the numbers."""

    text: str
    values: tuple[float, ...]

    @functools.cached_property
    def pattern(self) -> re.Pattern:
        """Finds the text whatever its numbers are and wherever its lines end; a group is a number."""
        parts = []
        for literal, field, *_ in string.Formatter().parse(self.text):
            parts.append(r"\s+".join(re.escape(word) for word in re.split(r"\s+", literal)))
            parts += [rf"({NUMBER})"] if field is not None else []
        return re.compile("".join(parts))

    @property
    def numbers(self) -> list[str]:
        """The values as the fields write them."""
        fields = [spec for _, field, spec, _ in string.Formatter().parse(self.text) if field is not None]
        if len(fields) != len(self.values):
            raise ValueError(f"claim: {self.text!r} must have a value for each field, got {len(self.values)}")
        return [format(value, spec) for value, spec in zip(self.values, fields)]

    def found(self, page: str) -> re.Match:
        """Where the text stands.

        Raises:
            ValueError: not there, or more than once.
        """
        found = list(self.pattern.finditer(page))
        if len(found) != 1:
            raise ValueError(f"claim: {self.text!r} must stand in its page once, got {len(found)} times")
        return found[0]


def claim(text: str, *values: float) -> Claim:
    """A claim; see the top of this file."""
    return Claim(text, values)


def written(page: str, claims: list[Claim]) -> str:
    """The page with the numbers of its claims in it."""
    for one in claims:
        match = one.found(page)
        for i, number in reversed(list(enumerate(one.numbers, 1))):
            page = page[: match.start(i)] + number + page[match.end(i) :]
    return page


def loose(page: str, claims: list[Claim], known: list[str]) -> list[str]:
    """Line and surroundings of every number that no claim holds and that is not known to be no measurement.

    known: texts of the page whose numbers are no measurements, such as "16 slots".
    """
    held = {span for one in claims for i in range(1, len(one.values) + 1) for span in range(*one.found(page).span(i))}
    for pattern in (PREDICTED, NOT_PROSE, SETTINGS, *(r"\s+".join(map(re.escape, text.split())) for text in known)):
        for match in re.finditer(pattern, page, re.MULTILINE | re.DOTALL):
            held |= set(range(*match.span()))
    free = [m for m in re.finditer(NUMBER, page) if not held & set(range(*m.span()))]
    return [
        f"line {page.count(chr(10), 0, m.start()) + 1}: {page[max(0, m.start() - 40) : m.end() + 30]!r}" for m in free
    ]


@functools.cache
def result(name: str) -> dict:
    """A file of bench/results, by its name without the suffix."""
    return json.loads((ROOT / f"bench/results/{name}.json").read_text())


def pick(rows: list[dict], **fields) -> dict:
    """The one row with these fields; those of its shape are its own.

    Raises:
        ValueError: no such row, or several.
    """
    chosen = [row for row in rows if all({**row, **row.get("shape", {})}.get(k) == v for k, v in fields.items())]
    if len(chosen) != 1:
        raise ValueError(f"pick: one row must have {fields}, got {len(chosen)}")
    return chosen[0]


def case(name: str, **fields) -> dict:
    """The one case of a result file with these fields."""
    return pick(result(name)["cases"], **fields)
