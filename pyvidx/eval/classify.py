"""Zero-shot classification: a video belongs to the class whose name its embedding is nearest to."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pyvidx.eval.retrieval import ranks


def prompts(names: Sequence[str], templates: Sequence[str] = ("{}",)) -> list[str]:
    """The texts to embed, all templates of the first class first. The public configurations use the bare names."""
    if bad := [t for t in templates if t.count("{}") != 1] or not templates:
        raise ValueError(f"classify: a template must hold {{}} once, got {bad}")
    return [t.replace("{}", name) for name in names for t in templates]


def class_embeddings(texts: Tensor, templates: int = 1) -> Tensor:
    """Texts of `prompts` embedded, [classes * templates, E] -> unit vectors [classes, E].

    Those of one class are normalized, averaged and normalized again.
    """
    if texts.dim() != 2 or templates < 1 or len(texts) % templates:
        raise ValueError(f"classify: texts must be [classes * {templates}, E], got {tuple(texts.shape)}")
    return normalize(normalize(texts, dim=1).unflatten(0, (-1, templates)).mean(1), dim=1)


def classification(
    videos: Tensor, classes: Tensor, labels: Sequence[int], *, top: Sequence[int] = (1, 5), ties: str = "average"
) -> dict[str, float]:
    """Percent of videos with the right class among the nearest k.

    Args:
        videos: [n, E], any length.
        classes: [c, E], any length.
        labels: of the videos, 0 to c - 1.
        top: the k; those above c are left out.
        ties: see pyvidx.eval.retrieval.ranks.

    Returns:
        {"top-1": ..., "top-5": ..., "mean class": top-1 averaged over the classes that occur}.
    """
    target = torch.as_tensor(labels)
    if len(target) != len(videos) or not len(target) or int(target.min()) < 0 or int(target.max()) >= len(classes):
        raise ValueError(f"classify: {len(videos)} videos must have labels from 0 to {len(classes) - 1}")
    places = ranks(normalize(videos, dim=1) @ normalize(classes, dim=1).T, target, ties=ties)
    found = {f"top-{k}": 100 * float((places < k).double().mean()) for k in top if k <= len(classes)}
    each = [float((places[target == c] < 1).double().mean()) for c in target.unique()]
    return found | {"mean class": 100 * sum(each) / len(each)}
