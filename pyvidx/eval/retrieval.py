"""Text-video retrieval: recall and ranks from a similarity matrix, with ties that neither help nor hurt."""

from collections.abc import Sequence

import torch
from torch import Tensor

TIES = ("average", "optimistic", "pessimistic")


def ranks(similarity: Tensor, target: Tensor, *, ties: str = "average") -> Tensor:
    """Place of the right column in each row, 0 = first. similarity [n, m], target int [n] -> float64 [n].

    Of columns just as similar as the right one, half ("average"), none or all stand before it.
    """
    if ties not in TIES:
        raise ValueError(f"ranks: ties must be one of {', '.join(TIES)}, got {ties!r}")
    if similarity.dim() != 2 or target.shape != similarity.shape[:1]:
        raise ValueError(
            f"ranks: similarity must be [n, m] and target [n], got {tuple(similarity.shape)}, {tuple(target.shape)}"
        )
    _require_finite(similarity)
    own = similarity.gather(1, target[:, None])
    above, equal = (similarity > own).sum(1).double(), (similarity == own).sum(1).double() - 1
    return above + {"average": 0.5, "optimistic": 0.0, "pessimistic": 1.0}[ties] * equal


def summary(places: Tensor, *, median: str = "mean") -> dict[str, float]:
    """R@1, R@5, R@10 in percent, median and mean rank (1 = first) of `ranks`.

    median: of an even number, "mean" of the middle two, or the "lower".
    """
    x = places.double()
    found = {f"R@{k}": 100 * float((x < k).double().mean()) for k in (1, 5, 10)}
    middle = x.median() if median == "lower" else x.quantile(0.5)
    return found | {"MdR": float(middle) + 1, "MnR": float(x.mean()) + 1}


def retrieval(
    similarity: Tensor,
    captions: Sequence[int] | None = None,
    *,
    ties: str = "average",
    dsl: bool = False,
    compat: str | None = None,
) -> dict[str, dict[str, float]]:
    """Both directions of one test set.

    Args:
        similarity: [texts, videos], of unit vectors.
        captions: how many texts each video has, in the order of the rows; None: one each. A text ranks its own video;
            a video is as similar to another as that one's most similar text.
        ties: as in `ranks`.
        dsl: multiply by softmax(100 similarity) over the texts first. That looks at the whole test set at once, so the
            result says so: its keys end in "(DSL)".
        compat: "clip4clip": a tie counts as one more query, as in the public code of CLIP4Clip, CLIP-ViP, BT-Adapter
            and STAN, which moves every number; only with one text per video.

    Returns:
        {"text to video": ..., "video to text": ...}, each as `summary`.
    """
    texts, videos = similarity.shape
    counts = torch.ones(videos, dtype=torch.long) if captions is None else torch.as_tensor(captions)
    if len(counts) != videos or int(counts.sum()) != texts or int(counts.min()) < 1:
        raise ValueError(
            f"retrieval: captions must count the {texts} texts of {videos} videos, got {counts.tolist()[:8]}..."
        )
    if compat not in (None, "clip4clip") or (compat and captions is not None):
        raise ValueError(f"retrieval: compat must be None, or 'clip4clip' with one text per video, got {compat!r}")
    if compat and ties != "average":
        raise ValueError(f"retrieval: compat={compat!r} counts every tie; it takes no ties={ties!r}")
    _require_finite(similarity)
    if dsl:
        similarity = similarity.double()  # in float32 weights of far videos vanish, and all those tie
        similarity = similarity * (100 * similarity).softmax(0)
    owner = torch.repeat_interleave(torch.arange(videos), counts)
    best = similarity.new_full((videos, videos), -torch.inf)  # [to video, from video]
    best = best.scatter_reduce(0, owner[:, None].expand(-1, videos), similarity, "amax")
    place = _every_tie if compat else lambda s, t: ranks(s, t, ties=ties)
    # The public code takes the lower median where a video has several texts.
    median = "mean" if captions is None else "lower"
    label = " (DSL)" if dsl else ""
    return {
        f"text to video{label}": summary(place(similarity, owner), median=median),
        f"video to text{label}": summary(place(best.T, torch.arange(videos)), median=median),
    }


def _require_finite(similarity: Tensor) -> None:
    if not similarity.isfinite().all():  # NaN is neither above nor below: it would rank first
        raise ValueError("retrieval: similarity must be finite")


def _every_tie(similarity: Tensor, target: Tensor) -> Tensor:
    """The places of all columns that are equal to the right one."""
    ordered = similarity.sort(dim=1, descending=True).values
    return (ordered == similarity.gather(1, target[:, None])).nonzero()[:, 1].double()
