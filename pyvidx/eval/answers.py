"""Answers in words against the right ones: exact match, in the variants of the public evaluations."""

from collections.abc import Sequence

Beams = Sequence[str]  # of one question, best first


def exact_match(
    predictions: Sequence[str | Beams], answers: Sequence[str], *, top: int = 1, first_word: bool = False
) -> float:
    """Percent of questions with the right answer among the first `top`: strings are equal or they are not.

    Args:
        predictions: a text, or texts with the best first, per question.
        first_word: compare only what stands before the first space of a prediction, as MA-LMM does for MSVD-QA and
            MSRVTT-QA, whose answers are single words.

    Raises:
        ValueError: not as many predictions as answers, or none.
    """
    return _mean(correct(predictions, answers, top=top, first_word=first_word))


def correct(
    predictions: Sequence[str | Beams], answers: Sequence[str], *, top: int = 1, first_word: bool = False
) -> list[bool]:
    """The same question by question."""
    if len(predictions) != len(answers) or not answers:
        raise ValueError(f"exact_match: one prediction per answer, got {len(predictions)} for {len(answers)}")
    found = []
    for predicted, answer in zip(predictions, answers):
        beams = [predicted] if isinstance(predicted, str) else list(predicted)
        found.append(answer in [p.split(" ")[0] if first_word else p for p in beams[:top]])
    return found


def by_type(
    predictions: Sequence[str], answers: Sequence[str], types: Sequence[int], *, compat: str | None = None
) -> dict[str, float]:
    """ActivityNet-QA: accuracy in [0, 1] over all questions, over each type, and over the free ones (types 3 to 8).

    compat: "official" divides the right free answers by the questions of all types but the first three that the file
        happens to begin with, as the published script does; on its own test file that is 1.39 times too much.
    """
    if compat not in (None, "official"):
        raise ValueError(f"by_type: compat must be None or 'official', got {compat!r}")
    right, count = dict.fromkeys(types, 0), dict.fromkeys(types, 0)
    for t, ok in zip(types, correct(predictions, answers)):
        right[t] += ok
        count[t] += 1
    free = [t for t in count if t >= 3]
    asked = list(count)[3:] if compat == "official" else free
    total = sum(count[t] for t in asked)
    result = {f"type {t}": right[t] / count[t] for t in sorted(count)}
    result["free"] = sum(right[t] for t in free) / total if total else float("nan")
    return result | {"all": sum(right.values()) / sum(count.values())}


def _mean(found: Sequence[bool]) -> float:
    return 100.0 * sum(found) / len(found)
