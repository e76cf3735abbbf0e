"""Which frames to take: the exact rules of the public systems, by name.

Results move with the rule, so each is reproduced to the frame. A rule is a pure function of (num_frames, wanted, fps,
generator) giving int64 indices [T], ascending, each in [0, num_frames). N is num_frames, n is wanted; round is half to
even, as in NumPy and Python. Each rule states what it does with a video shorter than wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .arguments import integer

Rule = Callable[[int, int, float, "torch.Generator | None"], Tensor]


def uniform(num_frames: int, wanted: int, fps: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """round(s i) + int(s / 2), s = (N - 1) / n. A short video repeats frames."""
    segment = (num_frames - 1) / wanted
    return _int64(np.round(segment * np.arange(wanted)) + int(segment / 2))


def midpoint(num_frames: int, wanted: int, fps: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """(round(s i) + round(s (i + 1))) // 2, s = (N - 1) / n with n at most N: a short video gives fewer frames."""
    wanted = min(num_frames, wanted)
    edges = np.round((num_frames - 1) / wanted * np.arange(wanted + 1))
    return _int64((edges[:-1] + edges[1:]) // 2)


def arange(num_frames: int, wanted: int, fps: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """int(i N / n) with n at most N: a short video gives fewer frames.

    The sources step through np.arange(0, N, N / n), which by rounding yields one frame too many for some N (100 of
    113); that frame is left out here.
    """
    wanted = min(num_frames, wanted)
    return _int64(np.arange(0, num_frames, num_frames / wanted)[:wanted])


def linspace(num_frames: int, wanted: int, fps: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """int(i (N - 1) / (n - 1)): first and last frame included. A short video repeats frames."""
    return _int64(np.linspace(0, num_frames - 1, wanted, dtype=np.int64))


def linspace_round(num_frames: int, wanted: int, fps: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """round(i (N - 1) / (n - 1)): first and last frame included. A short video repeats frames."""
    return _int64(np.rint(np.linspace(0, num_frames - 1, wanted)))


def random_segment(num_frames: int, wanted: int, fps: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """One random frame of each of n segments [round(s i), round(s (i + 1))], s = (N - 1) / n, both ends included.

    Neighboring segments share a frame, so frames may repeat; a short video repeats frames.
    """
    edges = _int64(np.round((num_frames - 1) / wanted * np.arange(wanted + 1)))
    return _draw(edges[:-1], edges[1:] + 1, generator)


def random_interval(num_frames: int, wanted: int, fps: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """One random frame of each of the n disjoint intervals between int(i N / n). A short video repeats frames."""
    edges = _int64(np.linspace(0, num_frames, wanted + 1, dtype=np.int64))
    return _draw(edges[:-1], torch.maximum(edges[1:], edges[:-1] + 1), generator)


def fps2_even(num_frames: int, wanted: int, fps: float, generator: torch.Generator | None = None) -> Tensor:
    """2 frames per second, an even number of at least 4 and at most `wanted`, placed by a rounded linspace.

    A video of fewer than 4 frames gives the even number below N; one of 1 frame is refused, as in the source.
    """
    _need_rate("fps2_even", fps)
    most = min(wanted // 2 * 2, num_frames)
    count = math.floor(min(max(num_frames / fps * 2.0, 4), most) / 2) * 2
    if count < 2:
        raise ValueError(f"fps2_even: num_frames and wanted must be at least 2, got {num_frames} and {wanted}")
    # In float32, as the source does it: ties fall differently in float64.
    return torch.linspace(0, num_frames - 1, count, dtype=torch.float32).round().long()


def fps1(num_frames: int, wanted: int, fps: float, generator: torch.Generator | None = None) -> Tensor:
    """Every round(fps)-th frame from the first; if that is more than `wanted`, `linspace` instead."""
    _need_rate("fps1", fps)
    indices = torch.arange(0, num_frames, max(round(fps), 1))
    return indices if len(indices) <= wanted else linspace(num_frames, wanted)


@dataclass(frozen=True)
class Named:
    """A rule under its name.

    Args:
        rule: the function.
        frames: how many frames it takes if none are asked for: the number, or the cap of a rule by frame rate.
        aliases: other names, after the systems that use the rule.
        note: who uses it.
    """

    rule: Rule
    frames: int
    aliases: tuple[str, ...]
    note: str


RULES: dict[str, Named] = {
    "uniform": Named(
        uniform, 8, ("bt_adapter_retrieval", "videochat"),
        "BT-Adapter retrieval and zero-shot (8 to 64 frames), mmaction2 UniformSample in test, VideoChat, InternVideo",
    ),
    "midpoint": Named(
        midpoint, 8, ("bt_adapter_chat", "video_chatgpt"),
        "Video-ChatGPT (100 frames), BT-Adapter chat (64 in its scripts, 100 by default and for stored features)",
    ),
    "arange": Named(arange, 8, ("lavis", "video_llama"), "LAVIS, Video-LLaMA, transformers up to 5.22"),
    "linspace": Named(linspace, 8, ("llava_next", "lmms_eval", "vllm"), "LLaVA-NeXT (force_sample), lmms-eval, vLLM"),
    "linspace_round": Named(linspace_round, 8, ("ma_lmm_eval",), "MA-LMM evaluation (20, 80 or 100 frames) and demo"),
    "random_segment": Named(
        random_segment, 8, ("bt_adapter_train",), "BT-Adapter pretraining, mmaction2 UniformSample in training"
    ),
    "random_interval": Named(random_interval, 8, ("ma_lmm_train",), "MA-LMM training"),
    "fps2_even": Named(fps2_even, 768, ("qwen2_vl",), "Qwen2-VL and later: 2 fps, 4 to 768 frames, even"),
    "fps1": Named(fps1, 64, ("llava_video",), "LLaVA-Video: 1 fps, at most 64 frames"),
}  # fmt: skip


def names(aliases: bool = False) -> list[str]:
    """The names `sample` takes, without or with their aliases."""
    return list(RULES) + [alias for named in RULES.values() for alias in named.aliases if aliases]


def sample(
    sampler: str | Rule,
    num_frames: int,
    wanted: int | None = None,
    fps: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Indices of the frames to take from a video, by the name of a rule or by a function like one.

    Args:
        sampler: one of `names(aliases=True)`, or a function of (num_frames, wanted, fps, generator).
        num_frames: frames in the video.
        wanted: frames wanted, or at most wanted by "fps1" and "fps2_even"; None: the rule's own number.
        fps: frames per second of the video, needed by the same two.
        generator: random state, needed by the rules that draw.

    Returns:
        [T] int64, each in [0, num_frames).

    Raises:
        ValueError: an unknown name, a number below 1, a missing fps or generator, or indices that do not fit.
    """
    if callable(sampler):
        rule, wanted = sampler, 8 if wanted is None else wanted
    else:
        named = RULES.get(sampler) or next((n for n in RULES.values() if sampler in n.aliases), None)
        if named is None:
            raise ValueError(f"sample: sampler must be one of {names(aliases=True)} or a function, got {sampler!r}")
        rule, wanted = named.rule, named.frames if wanted is None else wanted
    num_frames, wanted = integer("sample", "num_frames", num_frames), integer("sample", "wanted", wanted)
    if num_frames < 1 or wanted < 1:
        raise ValueError(f"sample: num_frames and wanted must be at least 1, got {num_frames} and {wanted}")
    indices = rule(num_frames, wanted, fps, generator)
    if not isinstance(indices, Tensor):
        indices = np.asarray(indices)
        if indices.dtype.kind in "USO":  # text
            indices = np.array([integer("sample", "an index", i) for i in indices.ravel()], dtype=np.int64)
        indices = torch.as_tensor(indices)
    if indices.dim() != 1 or not len(indices) or indices.is_floating_point():
        raise ValueError(f"sample: indices must be integers [T], T > 0, got {indices.dtype} {tuple(indices.shape)}")
    if indices.min() < 0 or indices.max() >= num_frames:
        raise ValueError(f"sample: indices must be in [0, {num_frames}), got {indices.tolist()}")
    return indices.long()


def _int64(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _draw(low: Tensor, high: Tensor, generator: torch.Generator | None) -> Tensor:
    """An integer of each [low, high), all equally likely."""
    if generator is None:
        raise ValueError("sample: a rule that draws frames at random needs a torch.Generator, got None")
    # float64: in float32 the last frames of an interval of many frames would be drawn too rarely.
    position = torch.rand(len(low), generator=generator, dtype=torch.float64, device=generator.device).cpu()
    return low + torch.minimum((position * (high - low)).long(), high - low - 1)


def _need_rate(name: str, fps: float) -> None:
    if not fps > 0:
        raise ValueError(f"{name}: fps must be above 0, got {fps}")
