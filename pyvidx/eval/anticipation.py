"""EPIC-Kitchens-100 action anticipation: the official metric and the submission file.

An action is a verb and a noun, number 1000 verb + noun. Numbers follow the challenge: recall among the first five,
averaged over the classes that occur, for all segments, those of unseen participants, and those of rare classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyvidx.eval.annotations.sample import need, number, table
from pyvidx.files import write_json

VERBS, NOUNS, KEPT = 97, 300, 100


class Segments(NamedTuple):
    """Annotated segments, one per row of the scores."""

    ids: list[str]
    participants: list[str]
    verb: Tensor  # int64 [n]
    noun: Tensor  # int64 [n]


class Ranked(NamedTuple):
    """The best five classes of each segment, int64 [n, 5], best first, -1 where there are fewer."""

    verb: Tensor
    noun: Tensor
    action: Tensor


def read_segments(path: str | Path) -> Segments:
    """Rows of EPIC_100_validation.csv: narration_id, participant_id, verb_class, noun_class."""
    names = ("narration_id", "participant_id", "verb_class", "noun_class")
    rows = list(table(path))
    if lacking := set(names) - set(rows[0][1] if rows else ()):
        raise ValueError(f"read_segments: {path} must have rows with {', '.join(sorted(lacking))}")
    rows = [(where, need(row, names, where)) for where, row in rows]
    verb, noun = (torch.tensor([number(row, name, where, int) for where, row in rows]) for name in names[2:])
    return Segments([r["narration_id"] for _, r in rows], [r["participant_id"] for _, r in rows], verb, noun)


def actions(verb: Tensor, noun: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest 100 actions from scores of verbs [n, 97] and nouns [n, 300], taken as independent.

    Returns:
        ids int64 [n, 100], best first, and probabilities [n, 100]: products of softmaxes over the best 100 of each.
    """
    (v, v_ids), (n, n_ids) = verb.topk(min(KEPT, verb.shape[1])), noun.topk(min(KEPT, noun.shape[1]))
    product = (v.softmax(1)[:, :, None] * n.softmax(1)[:, None]).flatten(1)
    best, index = product.topk(KEPT)
    return 1000 * v_ids.gather(1, index // n.shape[1]) + n_ids.gather(1, index % n.shape[1]), best


def class_mean_recall(top: Tensor, labels: Tensor, among: Tensor | None = None) -> float:
    """Mean over the classes that occur of the share of their segments found, in [0, 1].

    Args:
        top: int [n, k], the k best classes of each segment.
        labels: int [n].
        among: bool [n], the segments that count. None: all.
    """
    hit = (top == labels[:, None]).any(1)
    if among is not None:
        hit, labels = hit[among], labels[among]
    if not len(labels):
        return float("nan")
    classes, index = labels.unique(return_inverse=True)
    found = torch.zeros(len(classes), dtype=torch.float64).index_add_(0, index, hit.double())
    return float((found / torch.bincount(index)).mean())


def evaluate(
    verb: Tensor,
    noun: Tensor,
    segments: Segments,
    action: Tensor | None = None,
    *,
    unseen: Sequence[str] = (),
    tail_verbs: Sequence[int] = (),
    tail_nouns: Sequence[int] = (),
) -> dict[str, dict[str, float]]:
    """Accuracy and class-mean recall, in percent.

    Args:
        verb, noun: scores [n, 97] and [n, 300], a row per segment.
        action: int [n, 5 or more] ids, best first. None: `actions` of the two.
        unseen: participants who are not in the training set.
        tail_verbs, tail_nouns: rare classes. An action is rare if its verb or its noun is.

    Returns:
        for "verb", "noun" and "action": "accuracy@1", "accuracy@5" over segments, "recall@5" over classes, and the
        recall "recall@5 unseen" and "recall@5 tail", NaN without such segments.
    """
    n = len(segments.ids)
    if verb.shape != (n, VERBS) or noun.shape != (n, NOUNS):
        raise ValueError(
            f"evaluate: scores must be [{n}, {VERBS}] and [{n}, {NOUNS}], got {tuple(verb.shape)}, {tuple(noun.shape)}"
        )
    action = actions(verb, noun)[0] if action is None else action
    ranked = Ranked(verb.topk(5)[1], noun.topk(5)[1], action[:, :5])
    return evaluate_ranked(ranked, segments, unseen=unseen, tail_verbs=tail_verbs, tail_nouns=tail_nouns)


def evaluate_ranked(
    ranked: "Ranked",
    segments: Segments,
    *,
    unseen: Sequence[str] = (),
    tail_verbs: Sequence[int] = (),
    tail_nouns: Sequence[int] = (),
) -> dict[str, dict[str, float]]:
    """`evaluate` of the best five classes, as far as there are five; -1, which is no class, fills up."""
    if any(ids.shape != (len(segments.ids), 5) for ids in ranked):
        raise ValueError(
            f"evaluate: ranked classes must be [{len(segments.ids)}, 5], got {[tuple(x.shape) for x in ranked]}"
        )
    tails = (
        torch.isin(segments.verb, torch.tensor(tail_verbs, dtype=torch.long)),
        torch.isin(segments.noun, torch.tensor(tail_nouns, dtype=torch.long)),
    )
    new = torch.tensor([p in set(unseen) for p in segments.participants])
    ways = {
        "verb": (ranked.verb, segments.verb, tails[0]),
        "noun": (ranked.noun, segments.noun, tails[1]),
        "action": (ranked.action, 1000 * segments.verb + segments.noun, tails[0] | tails[1]),
    }
    return {
        name: {
            "accuracy@1": 100 * float((top[:, 0] == labels).double().mean()),
            "accuracy@5": 100 * float((top == labels[:, None]).any(1).double().mean()),
            "recall@5": 100 * class_mean_recall(top, labels),
            "recall@5 unseen": 100 * class_mean_recall(top, labels, new),
            "recall@5 tail": 100 * class_mean_recall(top, labels, tail),
        }
        for name, (top, labels, tail) in ways.items()
    }


def write_submission(
    path: str | Path,
    ids: Sequence[str],
    verb: Tensor,
    noun: Tensor,
    action: tuple[Tensor, Tensor] | None = None,
    *,
    supervision: Mapping[str, int],
) -> Path:
    """The challenge's file, version 0.2, with the 100 likeliest actions of each segment.

    Args:
        ids: narration ids of the test segments.
        verb, noun: scores [n, 97] and [n, 300].
        action: ids and scores [n, 100], best first, as `actions` returns them. None: `actions` of the two.
        supervision: the levels that the challenge asks for: sls_pt (pretraining), sls_tl (training labels), sls_td
            (training data).
    """
    if set(supervision) != {"sls_pt", "sls_tl", "sls_td"}:
        raise ValueError(f"write_submission: supervision must be sls_pt, sls_tl and sls_td, got {sorted(supervision)}")
    if verb.shape != (len(ids), VERBS) or noun.shape != (len(ids), NOUNS):
        raise ValueError(f"write_submission: scores must be [{len(ids)}, {VERBS}] and [{len(ids)}, {NOUNS}]")
    if len(set(ids)) != len(ids) or not (verb.isfinite().all() and noun.isfinite().all()):
        raise ValueError("write_submission: ids must be unique and scores finite")
    chosen, scores = actions(verb, noun) if action is None else action
    results = {}
    for i, name in enumerate(ids):
        pairs = zip(chosen[i].tolist(), scores[i].tolist())
        results[name] = {
            "verb": {str(k): x for k, x in enumerate(verb[i].tolist())},
            "noun": {str(k): x for k, x in enumerate(noun[i].tolist())},
            "action": {f"{a // 1000},{a % 1000}": p for a, p in pairs},
        }
    about = {"version": "0.2", "challenge": "action_anticipation", **supervision}
    submission = about | {"results": results}
    check_submission(submission, ids)
    return write_json(path, submission)


def check_submission(submission: Mapping, ids: Sequence[str]) -> None:
    """Raise ValueError unless a submission holds what the challenge wants for exactly these segments."""
    head = {"version": "0.2", "challenge": "action_anticipation"}
    wrong = [k for k, v in head.items() if submission.get(k) != v]
    wrong += [k for k in ("sls_pt", "sls_tl", "sls_td") if not isinstance(submission.get(k), int)]
    if wrong:
        raise ValueError(f"check_submission: {', '.join(wrong)} must be as in version 0.2 of the challenge")
    results = submission.get("results", {})
    if set(results) != set(ids):
        raise ValueError(f"check_submission: results must be of {len(set(ids))} segments, got {len(results)}")
    for name, row in results.items():
        sizes = {"verb": VERBS, "noun": NOUNS, "action": KEPT}
        if any(len(row.get(k, ())) != size for k, size in sizes.items()):
            raise ValueError(f"check_submission: {name} must have {VERBS} verbs, {NOUNS} nouns and {KEPT} actions")
        known = {"verb": {str(k) for k in range(VERBS)}, "noun": {str(k) for k in range(NOUNS)}}
        pairs = [key.split(",") for key in row["action"]]
        named = all(len(p) == 2 and p[0] in known["verb"] and p[1] in known["noun"] for p in pairs)
        if not named or any(set(row[k]) != known[k] for k in known):
            raise ValueError(f"check_submission: {name} must name classes 0 to {VERBS - 1} and 0 to {NOUNS - 1}")
