"""LVU: windows of a long video, votes over them, and the scales of its two regression tasks."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

VIEWS_MEAN, LIKES_MEAN = 11.76425435683139, 9.138220535629456  # of the training labels, so that labels have mean 0


def windows(seconds: float, *, history: int = 100, stride: int = 20) -> list[tuple[int, int]]:
    """First and last second of MA-LMM's samples of one video: `history` s long, one every `stride` s.

    A video shorter than one window is one window.
    """
    if seconds <= 0 or history < 1 or stride < 1:
        raise ValueError(f"lvu.windows: seconds, history and stride must be > 0, got {seconds}, {history}, {stride}")
    last = max(0, int(seconds) - history)
    return [(start, start + history - 1) for start in range(0, last + 1, stride)]


def vote(logits: Tensor, videos: Sequence[Hashable], labels: Sequence[int]) -> float:
    """Percent of videos whose summed softmax over their clips is largest at the label: the official protocol.

    Args:
        logits: [clips, classes].
        videos, labels: of each clip; those of one video share a label.
    """
    if len(videos) != len(logits) or len(labels) != len(logits) or not len(logits):
        raise ValueError(f"lvu.vote: a video and a label per clip, got {len(videos)}, {len(labels)} for {len(logits)}")
    sums: dict[Hashable, Tensor] = {}
    wanted = dict(zip(videos, labels))
    for video, row in zip(videos, logits.float().softmax(-1)):
        sums[video] = sums.get(video, 0) + row
    return 100.0 * sum(int(total.argmax()) == wanted[video] for video, total in sums.items()) / len(sums)


def vote_texts(predictions: Sequence[str], videos: Sequence[Hashable], answers: Sequence[str]) -> float:
    """Percent of videos whose most frequent generated text, over their windows, is the answer.

    Of texts as frequent, the one whose first window comes first in the order given. The public code has no vote:
    MA-LMM counts every window, and the official `vote` needs scores of all classes.
    """
    if not len(predictions) == len(videos) == len(answers) > 0:
        raise ValueError(
            f"lvu.vote_texts: a video and an answer per text, got {len(videos)}, {len(answers)} for {len(predictions)}"
        )
    wanted, texts = {}, {}
    for video, text, answer in zip(videos, predictions, answers):
        if wanted.setdefault(video, answer) != answer:
            raise ValueError(f"lvu.vote_texts: windows of a video share an answer, got two for {video!r}")
        texts.setdefault(video, []).append(text)
    return 100.0 * sum(Counter(t).most_common(1)[0][0] == wanted[v] for v, t in texts.items()) / len(texts)


def view_label(views: float) -> float:
    """Regression label of the number of views: ln(views), centered."""
    return math.log(views) - VIEWS_MEAN


def like_label(likes: float, dislikes: float) -> float:
    """Regression label of the share of likes: 0 to 10, centered."""
    return 10 * likes / (likes + dislikes) - LIKES_MEAN


def regression_error(predictions: Tensor, videos: Sequence[Hashable], labels: Sequence[float]) -> float:
    """Mean square error of each video's mean prediction [clips] against its label."""
    if not len(videos) == len(labels) == len(predictions) > 0:
        raise ValueError(
            f"lvu: a video and a label per prediction, got {len(videos)}, {len(labels)} for {len(predictions)}"
        )
    wanted, rows = dict(zip(videos, labels)), {}
    for video, value in zip(videos, predictions.double()):
        rows.setdefault(video, []).append(value)
    errors = [(torch.stack(values).mean() - wanted[video]) ** 2 for video, values in rows.items()]
    return float(torch.stack(errors).mean())
