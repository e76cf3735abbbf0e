"""Which tokens of a whole clip to keep, where their number is known before anything is encoded: what serving engines
ask of a pruner (vLLM, SGLang), by name. A new one is a file like evs.py with two functions, and a line in PRUNERS.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyvidx.memory.clips import check_rate
from pyvidx.memory.evs import evs, evs_count
from pyvidx.memory.vidcom2 import vidcom2, vidcom2_count
from pyvidx.ops._library import require, require_tensors

PRUNERS = {"evs": (evs_count, evs), "vidcom2": (vidcom2_count, vidcom2)}  # name: count(T, N, q), mask(frames, q)


def compute_retained_tokens_count(tokens_per_frame: int, num_frames: int, q: float, method: str = "evs") -> int:
    """How many tokens of a video are kept: what a placeholder in a prompt needs before the video is encoded.

    Args:
        tokens_per_frame: N, after the host's spatial merge. num_frames: T, after its temporal patches.
        q: the pruning rate, in [0, 1): the share that goes.
        method: a name of PRUNERS.

    Raises:
        ValueError: a number is out of range, or the method is unknown.
    """
    _check(method, q)
    fits = min(tokens_per_frame, num_frames) >= 1
    require(fits, f"{method}: a video must have tokens, got {num_frames} frames of {tokens_per_frame}")
    return PRUNERS[method][0](num_frames, tokens_per_frame, q)


def compute_retention_mask(
    video_embeds: Tensor,
    video_size_thw: Sequence[int] | Tensor,
    spatial_merge_size: int,
    q: float,
    method: str = "evs",
) -> Tensor:
    """Which tokens of one video are kept.

    Args:
        video_embeds: [T * N, C] floating, frame by frame, N = h * w / spatial_merge_size^2.
        video_size_thw: T, h, w: the grid in patches, before the spatial merge. A tensor on a GPU is waited for.
        q, method: as in compute_retained_tokens_count, whose number of tokens is kept.

    Returns:
        bool [T * N].

    Raises:
        ValueError: the sizes do not agree, q is out of range, or the method is unknown.
    """
    _check(method, q)
    require_tensors("compute_retention_mask", video_embeds=video_embeds)
    fits = len(video_size_thw) == 3 and spatial_merge_size >= 1
    text = "compute_retention_mask: video_size_thw must be T, h, w and spatial_merge_size at least 1, got {} and {}"
    require(fits, text.format(video_size_thw, spatial_merge_size))
    T, h, w = (int(n) for n in video_size_thw)
    N = (h // spatial_merge_size) * (w // spatial_merge_size)
    fits = video_embeds.dim() == 2 and min(T, N) >= 1 and len(video_embeds) == T * N
    text = "compute_retention_mask: video_embeds must be [T * N, C] with {T} frames of {N} tokens"
    require(fits, text, video_embeds, T=T, N=N)
    return PRUNERS[method][1](video_embeds.view(1, T, N, -1), q).flatten()


def _check(method: str, q: float) -> None:
    require(method in PRUNERS, f"pruning: method must be one of {', '.join(PRUNERS)}, got {method!r}")
    check_rate(method, q)
