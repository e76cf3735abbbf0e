"""EPIC-Kitchens-100 from ranked texts, such as a language model's beams.

MA-LMM reports this benchmark, but its public code holds no loader, prompt or ranking for it. What stands here is
pyvidx's own: each text is read as "VERB NOUN", the order of the texts is the order of the actions, and a verb or noun
ranks where it is first named.
"""

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pyvidx.data import tables
from pyvidx.eval.annotations.sample import table
from pyvidx.eval.anticipation import KEPT, NOUNS, VERBS, Ranked, actions


def read_classes(path: str | Path) -> dict[str, int]:
    """EPIC_100_verb_classes.csv or EPIC_100_noun_classes.csv: names and their instances -> class.

    Names are lower-case with spaces; "tap:kitchen" also counts as "kitchen tap".
    """
    found: dict[str, int] = {}
    for where, row in table(path):
        if not {"id", "key"} <= set(row):
            raise ValueError(f"read_classes: {path} must have the columns id and key, got {', '.join(row)}")
        try:
            index, instances = int(row["id"]), ast.literal_eval(row.get("instances") or "[]")
            names = [row["key"], *instances]
            spellings = [spelled for name in names for spelled in _spellings(name)]
        except (ValueError, SyntaxError, TypeError, AttributeError, MemoryError, RecursionError) as error:
            raise ValueError(f"read_classes: {where} must have a number and a list: {error}") from error
        for spelled in spellings:
            found.setdefault(spelled, index)
    if not found:
        raise ValueError(f"read_classes: {path} must hold a class")
    return found


def read_ids(path: str | Path, column: str) -> list[str]:
    """One column of a list of unseen participants or tail classes; a file of one column may do without its header."""
    rows = [row for _, row in tables.csv_rows(path, tables.strict(path, "read_ids"))]
    if rows and column in rows[0]:
        at = rows[0].index(column)
        return [row[at] for row in rows[1:]]
    if not rows or any(len(row) != 1 for row in rows):
        raise ValueError(f"read_ids: {path} must have the column {column}")
    return [row[0] for row in rows]


def named(text: str, verbs: Mapping[str, int], nouns: Mapping[str, int]) -> tuple[int, int]:
    """Verb and noun of "VERB NOUN": the longest verb that the text starts with, and the noun that is the rest.

    -1 for what is not a class. "the", "a" and "an" before the noun, case and a final period do not count.
    """
    words = text.lower().rstrip(" .").replace("-", " ").split()
    for length in range(len(words), 0, -1):
        if (verb := verbs.get(" ".join(words[:length]))) is not None:
            rest = words[length:]
            rest = rest[1:] if rest[:1] and rest[0] in ("the", "a", "an") else rest
            return verb, nouns.get(" ".join(rest), -1)
    return -1, -1


def rank_texts(texts: Sequence[Sequence[str]], verbs: Mapping[str, int], nouns: Mapping[str, int]) -> Ranked:
    """The first five verbs, nouns and actions that each segment's texts name."""
    rows: tuple[list, list, list] = ([], [], [])
    for segment in texts:
        pairs = [named(text, verbs, nouns) for text in segment]
        acts = [1000 * v + n if v >= 0 and n >= 0 else -1 for v, n in pairs]
        for row, ids in zip(rows, ([v for v, _ in pairs], [n for _, n in pairs], acts)):
            first = list(dict.fromkeys(i for i in ids if i >= 0))[:5]
            row.append(first + [-1] * (5 - len(first)))
    return Ranked(*(torch.tensor(row, dtype=torch.long).reshape(len(texts), 5) for row in rows))


def scores(ranked: Ranked) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Verbs, nouns and actions as write_submission takes them.

    The class at place k = 1 to 5 has the score 1 / k, and one that is not named 0. The named actions come first; the
    likeliest others of `actions` fill up to 100, below them.
    """
    weight = 1.0 / torch.arange(1, 6)
    verb, noun = torch.zeros(len(ranked.verb), VERBS), torch.zeros(len(ranked.noun), NOUNS)
    for weights, ids in ((verb, ranked.verb), (noun, ranked.noun)):
        # Empty places add 0 to class 0.
        weights.scatter_add_(1, ids.clamp(min=0), torch.where(ids >= 0, weight, 0.0))
    fill, likely = actions(verb, noun)
    ids, values = torch.empty_like(fill), torch.empty_like(likely)
    for i, row in enumerate(ranked.action):
        first = row[row >= 0]
        rest = ~torch.isin(fill[i], first)
        ids[i] = torch.cat([first, fill[i][rest]])[:KEPT]
        values[i] = torch.cat([weight[: len(first)], 0.1 * likely[i][rest]])[:KEPT]
    return verb, noun, (ids, values)


def _spellings(name: str) -> list[str]:
    parts = name.lower().replace("-", " ").replace("_", " ").split(":")
    return list(dict.fromkeys([" ".join(parts), " ".join(parts[1:] + parts[:1])]))
