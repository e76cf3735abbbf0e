"""Video files to embeddings: read ahead in other processes, preprocess, encode, with errors kept per file."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyvidx.preprocess import Preset, as_preset, preprocess
from pyvidx.temporal.encoding import Encoding
from pyvidx.video import Damage
from pyvidx.video.pool import Decoded, Decoders, shared


@dataclass(frozen=True)
class Encoded:
    """What became of one video file.

    Args:
        path: the file.
        encoding: batch of one, on the CPU; None if it failed.
        seconds: [T] float64, times of the frames that were encoded.
        error: why it failed, or None.
        damaged: what the file turned out to lack although it could be read, as Clip says it.
    """

    path: str
    encoding: Encoding | None = None
    seconds: Tensor | None = None
    error: str | None = None
    damaged: Damage = Damage()


PARTS = ("read", "wait", "preprocess", "encode", "write")


@dataclass
class Timing:
    """Where the time went, in seconds.

    `read` runs ahead in other processes, so the parts may exceed the wall time; `wait` is what encoding lost because
    no frames were there. With `wait` near zero the model is the bottleneck; else more workers help, if there are cores.

    Attributes:
        videos, frames, failed: counted while iterating.
        wall: from the start to the latest result.
        parts: by name.
        clock: that measures them.
    """

    videos: int = 0
    frames: int = 0
    failed: int = 0
    wall: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    clock: Callable[[], float] = time.perf_counter

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count what happens inside to this part, in seconds."""
        start = self.clock()
        try:
            yield
        finally:
            self.parts[part] += self.clock() - start

    def __str__(self) -> str:
        rate = self.frames / self.wall if self.wall else 0.0
        parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.parts.items() if seconds)
        failed = f", {self.failed} FAILED" if self.failed else ""
        return f"{self.videos} videos{failed}, {self.frames} frames in {self.wall:.2f} s: {rate:.1f} frames/s ({parts})"


def encode_videos(
    paths: Iterable[str],
    model: nn.Module,
    *,
    frames: int = 8,
    sampler: str = "uniform",
    reader: str = "auto",
    preset: str | Preset = "clip",
    start: float | None = None,
    end: float | None = None,
    outputs: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    workers: int = 1,
    ordered: bool = True,
    decoders: Decoders | None = None,
    timing: Timing | None = None,
) -> Iterator[Encoded]:
    """Encode video files as they are decoded; a file that fails yields its error and does not stop the rest.

    Args:
        paths: video files; taken one by one, as many as are read ahead.
        model: any encoder in eval mode, on its device and in its dtype; the frames are preprocessed there.
        frames, sampler, reader, start, end: as in pyvidx.video.read.
        preset: as in pyvidx.preprocess; its crop is set to the model's image size.
        outputs: "tokens", "pooled" or both; None: what the model has.
        dtype: of the results.
        batch: videos of equal frame count that are encoded together.
        workers: processes that read ahead.
        ordered: results in the order of the paths, so that only neighbors are encoded together; False: as they come.
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
    chosen = sized(preset, model)
    decoders = shared(workers) if decoders is None else decoders
    decoders.start(workers)
    clips = decoders.map(
        paths, frames, sampler, reader, start=start, end=end, workers=workers, ahead=workers + batch, ordered=ordered
    )
    timing = timing if timing is not None else Timing()
    return encode_clips(clips, model, chosen, outputs=outputs, dtype=dtype, batch=batch, ordered=ordered, timing=timing)


class Held(NamedTuple):
    """A video that waits for others to be encoded with."""

    path: str
    pixels: Tensor  # [T, 3, h, w]
    seconds: Tensor
    damaged: Damage


def encode_clips(
    clips: Iterable[Decoded],
    model: nn.Module,
    preset: Preset,
    *,
    outputs: Sequence[str] | None,
    dtype: torch.dtype,
    batch: int,
    ordered: bool,
    timing: Timing,
) -> Iterator[Encoded]:
    """The part of `encode_videos` after decoding. preset: of `sized`.

    Without an order, videos of other frame counts do not part those of one; four batches wait at most.
    """
    weight = next(model.parameters())
    held: dict[int, list[Held]] = {}  # by their frame count

    def embed(group: list[Held]) -> list[Encoding]:
        with timing.of("encode"), torch.inference_mode():
            result = model(torch.stack([one.pixels for one in group]), outputs=outputs)
            found = [x if x is None else x.to(dtype).cpu() for x in (result.tokens, result.pooled)]
        # Copies: a view would keep the whole batch for as long as one row of it is kept.
        return [
            Encoding(*(x if x is None else x[i : i + 1].clone() for x in found), one.seconds[None])
            for i, one in enumerate(group)
        ]

    def together(group: list[Held]) -> list[Encoded]:
        try:
            found = embed(group)
        except Exception as error:
            if len(group) == 1:
                return [failed(group[0].path, error)]
            found = None
        if found is None:  # one of them is to blame, or together they are too large; the error no longer holds memory
            return [one for member in group for one in together([member])]
        return [finite(one, encoding) for one, encoding in zip(group, found)]

    def finite(one: Held, encoding: Encoding) -> Encoded:
        for name in ("tokens", "pooled"):
            value = getattr(encoding, name)
            if value is not None and not value.isfinite().all():
                narrow = " or ".join(dict.fromkeys(map(str, (weight.dtype, dtype))))
                why = f"the weights hold some too, or {narrow} is too narrow for them"
                return failed(one.path, RuntimeError(f"encode_videos: {name} must be finite, got NaN or Inf: {why}"))
        timing.videos, timing.frames = timing.videos + 1, timing.frames + len(one.seconds)
        return Encoded(one.path, encoding, one.seconds, damaged=one.damaged)

    def failed(path: str, error: Exception) -> Encoded:
        timing.failed += 1
        return Encoded(path, error=f"{type(error).__name__}: {error}")

    def pixels_of(decoded: Decoded) -> Tensor:
        with timing.of("preprocess"):
            return preprocess(decoded.clip.frames.to(weight.device), preset, dtype=weight.dtype)

    def all_held() -> Iterator[Encoded]:
        while held:
            yield from together(held.pop(next(iter(held))))

    began = time.perf_counter()
    for decoded in _awaited(clips, timing):
        timing.parts["read"] += decoded.seconds
        path, clip, error, _ = decoded
        if clip is not None:
            try:
                pixels = pixels_of(decoded)
            except Exception as raised:  # of this video: its frames do not fit the preset, or the device
                clip, error = None, raised
        if ordered and (clip is None or len(clip) not in held):
            yield from all_held()
        if clip is None:
            yield failed(path, error)
            continue
        group = held.setdefault(len(clip), [])
        group.append(Held(path, pixels, clip.seconds, clip.damaged))
        del clip, pixels, decoded
        if len(group) == batch:
            yield from together(held.pop(len(group[0].pixels)))
        elif sum(map(len, held.values())) == 4 * batch:
            yield from together(held.pop(max(held, key=lambda count: len(held[count]))))
        timing.wall = time.perf_counter() - began
    yield from all_held()
    timing.wall = time.perf_counter() - began


def _awaited(clips: Iterable[Decoded], timing: Timing) -> Iterator[Decoded]:
    clips = iter(clips)
    while True:
        with timing.of("wait"):
            decoded = next(clips, None)
        if decoded is None:
            return
        yield decoded


@torch.inference_mode()
def widths(model: nn.Module, frames: int, outputs: Sequence[str] | None = None) -> dict[str, int]:
    """The last dimension of "tokens" and "pooled", those asked for, found by encoding black frames.

    Raises:
        ValueError: the model does not take so many frames, or does not give these outputs.
    """
    weight, side = next(model.parameters()), image_size(model)
    found = model(weight.new_zeros(1, frames, 3, side, side), outputs=outputs)
    return {name: found[name].shape[-1] for name in ("tokens", "pooled") if name in found}


def image_size(model: nn.Module) -> int:
    """Side of the square that the model's tower takes, in pixels."""
    config = getattr(getattr(model, "tower", None), "config", None) or model.config.vision
    return config.image_size


def sized(preset: str | Preset, model: nn.Module) -> Preset:
    """The preset for a model's image size.

    Raises:
        ValueError: it is unknown.
    """
    preset, size = as_preset(preset), image_size(model)
    # A preset that resizes a little larger before it crops keeps its margin.
    return replace(preset, size=round(preset.size * size / (preset.crop or preset.size)), crop=size)
