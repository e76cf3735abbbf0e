"""Video files to embeddings: read ahead in other processes, preprocess, encode, with errors kept per file."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from pyvidx.models import BTAdapter, Encoding
from pyvidx.preprocess import PRESETS, Preset, preprocess
from pyvidx.video import Clip, Damage
from pyvidx.video.pool import Decoded, Decoders, shared


@dataclass(frozen=True)
class Encoded:
    """What became of one video file.

    Args:
        path: the file.
        encoding: batch of one, on the CPU in float32; None if it failed.
        seconds: [T] float64, times of the frames that were encoded.
        error: why it failed, or None.
        damaged: what the file turned out to lack although it could be read, as Clip says it.
    """

    path: str
    encoding: Encoding | None = None
    seconds: torch.Tensor | None = None
    error: str | None = None
    damaged: Damage = Damage()


PARTS = ("read", "preprocess", "encode", "write")


@dataclass
class Timing:
    """Where the time went, in seconds. `read` runs ahead in other processes, so the parts may exceed the wall time."""

    videos: int = 0
    frames: int = 0
    failed: int = 0
    wall: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.parts[part] += time.perf_counter() - start

    def __str__(self) -> str:
        rate = self.frames / self.wall if self.wall else 0.0
        parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.parts.items() if seconds)
        failed = f", {self.failed} FAILED" if self.failed else ""
        return f"{self.videos} videos{failed}, {self.frames} frames in {self.wall:.2f} s: {rate:.1f} frames/s ({parts})"


def encode_videos(
    paths: Iterable[str],
    model: BTAdapter,
    *,
    frames: int = 8,
    sampler: str = "uniform",
    reader: str = "auto",
    preset: str | Preset = "clip",
    start: float | None = None,
    end: float | None = None,
    outputs: Sequence[str] | None = None,
    batch: int = 1,
    workers: int = 1,
    decoders: Decoders | None = None,
    timing: Timing | None = None,
) -> Iterator[Encoded]:
    """Encode video files one after another; a file that fails yields its error and does not stop the rest.

    Args:
        paths: video files, in the order the results come in.
        model: in eval mode, on its device and in its dtype; the frames are preprocessed there.
        frames, sampler, reader, start, end: as in pyvidx.video.read.
        preset: as in pyvidx.preprocess; its crop is set to the model's image size.
        outputs: "tokens", "pooled" or both; None: what the model has.
        batch: videos of equal frame count that are encoded together.
        workers: processes that read ahead.
        decoders: those processes, where a timeout or a bound on their memory is wanted; None: pyvidx.video.pool.shared.
        timing: filled while iterating.

    Returns:
        Iterator of Encoded, one per path. An embedding that is not finite is an error of its video. Where the model
        fails on a batch, its videos are encoded one by one.

    Raises:
        ValueError: batch or workers is below 1, or a preset is unknown.
    """
    if batch < 1 or workers < 1:
        raise ValueError(f"encode_videos: batch and workers must be at least 1, got {batch} and {workers}")
    chosen = _sized(preset, model.config.vision.image_size)
    decoders = shared(workers) if decoders is None else decoders
    decoders.start(workers)
    clips = decoders.map(paths, frames, sampler, reader, start=start, end=end, workers=workers, ahead=workers + batch)
    return _encoded(clips, model, chosen, outputs, batch, timing if timing is not None else Timing())


def _encoded(
    clips: Iterator[Decoded],
    model: BTAdapter,
    preset: Preset,
    outputs: Sequence[str] | None,
    batch: int,
    timing: Timing,
) -> Iterator[Encoded]:
    weight = next(model.parameters())

    def embed(clips: list[Clip]) -> list[Encoding]:
        with timing.of("preprocess"):
            pixels = [preprocess(clip.frames.to(weight.device), preset, dtype=weight.dtype) for clip in clips]
            pixels = torch.stack(pixels)  # [B, T, 3, h, w]
        with timing.of("encode"), torch.inference_mode():
            result = model(pixels, outputs=outputs)
            found = [x if x is None else x.float().cpu() for x in (result.tokens, result.pooled)]
        return [
            Encoding(*(x if x is None else x[i : i + 1] for x in found), clip.seconds[None])
            for i, clip in enumerate(clips)
        ]

    def together(group: list[tuple[str, Clip]]) -> list[Encoded]:
        try:
            found = embed([clip for _, clip in group])
        except Exception as error:
            if len(group) == 1:
                return [failed(group[0][0], error)]
            found = None
        if found is None:  # one of them is to blame, or together they are too large; the error no longer holds memory
            return [one for member in group for one in together([member])]
        return [finite(path, clip, encoding) for (path, clip), encoding in zip(group, found)]

    def finite(path: str, clip: Clip, encoding: Encoding) -> Encoded:
        for name in ("tokens", "pooled"):
            value = getattr(encoding, name)
            if value is not None and not value.isfinite().all():
                why = f"the weights hold some too, or {weight.dtype} is too narrow for them"
                return failed(path, RuntimeError(f"encode_videos: {name} must be finite, got NaN or Inf: {why}"))
        timing.videos, timing.frames = timing.videos + 1, timing.frames + len(clip)
        return Encoded(path, encoding, clip.seconds, damaged=clip.damaged)

    def failed(path: str, error: Exception) -> Encoded:
        timing.failed += 1
        return Encoded(path, error=f"{type(error).__name__}: {error}")

    began = time.perf_counter()
    group: list[tuple[str, Clip]] = []
    for path, clip, error, seconds in clips:
        timing.parts["read"] += seconds
        if group and (clip is None or len(clip) != len(group[0][1])):
            yield from together(group)
            group = []
        if clip is None:
            yield failed(path, error)
            continue
        group.append((path, clip))
        if len(group) == batch:
            yield from together(group)
            group = []
        timing.wall = time.perf_counter() - began
    if group:
        yield from together(group)
    timing.wall = time.perf_counter() - began


def _sized(preset: str | Preset, size: int) -> Preset:
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"encode_videos: preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        preset = PRESETS[preset]
    # A preset that resizes a little larger before it crops keeps its margin.
    return replace(preset, size=round(preset.size * size / (preset.crop or preset.size)), crop=size)
