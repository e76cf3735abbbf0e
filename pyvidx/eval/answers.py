"""Answers in words against the right ones: exact match, in the variants of the public evaluations."""

import re
from collections.abc import Mapping, Sequence

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


def judged(replies: Sequence[Mapping | str]) -> dict[str, float]:
    """Mean verdict of a judge (Video-ChatGPT's protocol), replies recorded or fresh; scores from 0 to 5.

    A reply is {"pred": "yes" or "no", "score": number} or that as text. accuracy = yes / (yes + no), replies with
    neither word left out; "yes" is looked for first. score = mean of int(score) over all replies, so 4.8 counts 4.

    Raises:
        ValueError: a reply without a score, or no reply says yes or no.
    """
    yes = no = 0
    scores = []
    for reply in replies:
        if isinstance(reply, str):
            score = re.search(r"""['"]score['"]\s*:\s*['"]?(-?\d+(?:\.\d+)?)""", reply)
            verdict = re.search(r"""['"]pred['"]\s*:\s*['"]([^'"]*)""", reply)
            if score is None:
                raise ValueError(f"judged: a reply must hold a 'score', got {reply!r}")
            reply = {"pred": verdict[1] if verdict else "", "score": float(score[1])}
        verdict = str(reply.get("pred", "")).lower()
        if "score" not in reply:
            raise ValueError(f"judged: a reply must hold a 'score', got {reply!r}")
        yes, no = yes + ("yes" in verdict), no + ("yes" not in verdict and "no" in verdict)
        scores.append(int(reply["score"]))
    if not yes + no:
        raise ValueError(f"judged: no reply of {len(scores)} says yes or no")
    return {"accuracy": yes / (yes + no), "score": sum(scores) / len(scores)}


def _mean(found: Sequence[bool]) -> float:
    return 100.0 * sum(found) / len(found)
