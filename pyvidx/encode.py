"""Video files to embeddings: read, preprocess, encode, with reading ahead of encoding and errors kept per file."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from pyvidx.models import BTAdapter, Encoding
from pyvidx.preprocess import PRESETS, Preset, preprocess
from pyvidx.video import Clip, read
from pyvidx.video.clip import Damage


@dataclass(frozen=True)
class Encoded:
    """What became of one video file.

    Args:
        path: the file.
        encoding: batch of one, on the CPU in float32; None if it failed.
        seconds: [T] float64, times of the frames that were encoded.
        error: why it failed, or None.
        damaged: what is wrong with a file that was encoded all the same, as pyvidx.video.Clip has it.
    """

    path: str
    encoding: Encoding | None = None
    seconds: torch.Tensor | None = None
    error: str | None = None
    damaged: Damage = Damage()


PARTS = ("read", "preprocess", "encode", "write")


@dataclass
class Timing:
    """Where the time went, in seconds. `read` runs ahead in its own threads, so the parts may exceed the wall time."""

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
        workers: threads that read ahead.
        timing: filled while iterating.

    Yields:
        Encoded, one per path.

    Raises:
        ValueError: batch or workers is below 1, or a preset is unknown.
    """
    if batch < 1 or workers < 1:
        raise ValueError(f"encode_videos: batch and workers must be at least 1, got {batch} and {workers}")
    timing = timing if timing is not None else Timing()
    chosen = _sized(preset, model.config.vision.image_size)
    weight = next(model.parameters())

    def load(path: str) -> Clip:
        with timing.of("read"):
            return read(path, frames=frames, sampler=sampler, reader=reader, start=start, end=end)

    def run(group: list[tuple[str, Clip]]) -> Iterator[Encoded]:
        try:
            with timing.of("preprocess"):
                clips = [preprocess(c.frames.to(weight.device), chosen, dtype=weight.dtype) for _, c in group]
                pixels = torch.stack(clips)  # [B, T, 3, h, w]
            with timing.of("encode"), torch.inference_mode():
                result = model(pixels, outputs=outputs)
                tokens, pooled = (x if x is None else x.float().cpu() for x in (result.tokens, result.pooled))
        except (ValueError, RuntimeError) as error:
            yield from (failure(path, error) for path, _ in group)
            return
        for i, (path, clip) in enumerate(group):
            timing.videos, timing.frames = timing.videos + 1, timing.frames + len(clip)
            one = Encoding(*(x if x is None else x[i : i + 1] for x in (tokens, pooled)), clip.seconds[None])
            yield Encoded(path, one, clip.seconds, damaged=clip.damaged)

    def failure(path: str, error: Exception) -> Encoded:
        timing.failed += 1
        return Encoded(path, error=f"{type(error).__name__}: {error}")

    began = time.perf_counter()
    group: list[tuple[str, Clip]] = []
    for path, future in _ahead(load, paths, workers, depth=workers + batch):
        try:
            clip = future.result()
        except Exception as error:  # whatever a damaged file makes a decoder raise
            yield from run(group) if group else ()
            group = []
            yield failure(path, error)
            continue
        if group and len(clip) != len(group[0][1]):
            yield from run(group)
            group = []
        group.append((path, clip))
        if len(group) == batch:
            yield from run(group)
            group = []
        timing.wall = time.perf_counter() - began
    if group:
        yield from run(group)
    timing.wall = time.perf_counter() - began


def _sized(preset: str | Preset, size: int) -> Preset:
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"encode_videos: preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        preset = PRESETS[preset]
    # A preset that resizes a little larger before it crops keeps its margin.
    return replace(preset, size=round(preset.size * size / (preset.crop or preset.size)), crop=size)


def _ahead(load: Callable, paths: Iterable[str], workers: int, depth: int) -> Iterator[tuple[str, Future]]:
    """(path, future of load(path)) in order, with at most `depth` loads under way or waiting to be taken."""
    with ThreadPoolExecutor(workers, thread_name_prefix="pyvidx-read") as pool:
        queue: list[tuple[str, Future]] = []
        for path in paths:
            queue.append((path, pool.submit(load, path)))
            if len(queue) >= depth:
                yield queue.pop(0)
        yield from queue
