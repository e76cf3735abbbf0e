"""What a video takes, measured on a few, and what a corpus of such videos would take."""

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pyvidx.corpus.encode import Timing, encode_clips, sized, widths
from pyvidx.corpus.engines.registry import Job
from pyvidx.corpus.folder import DTYPES, Corpus, Manifest, parts
from pyvidx.video import read
from pyvidx.video.pool import Decoded


@dataclass(frozen=True)
class Rates:
    """Per video, failed ones counted in.

    Args:
        videos: they were measured on.
        failed: of these.
        read, write: seconds of one core.
        preprocess, encode: seconds of one core, or with another device than a CPU, seconds of that.
        size: bytes in the store.
        device: where preprocess and encode ran.
    """

    videos: int
    failed: int
    read: float
    preprocess: float
    encode: float
    write: float
    size: float
    device: str

    def __post_init__(self) -> None:
        numbers = (self.videos, self.failed, self.read, self.preprocess, self.encode, self.write, self.size)
        if not all(isinstance(x, int | float) and 0 <= x < math.inf for x in numbers) or self.videos < 1:
            raise ValueError(f"Rates: they must be finite numbers of 0 or more, of 1 video or more, got {numbers}")
        if not self.on_cores:
            raise ValueError("Rates: a video must take time of a core, to be read at least, got 0 seconds")

    @property
    def on_cores(self) -> float:
        """Seconds of one core that a video takes."""
        return self.read + self.write + (self.preprocess + self.encode if self.device == "cpu" else 0.0)

    @property
    def on_device(self) -> float:
        """Seconds of the device that a video takes; 0 where that is the CPU."""
        return 0.0 if self.device == "cpu" else self.preprocess + self.encode


def measure(paths: Sequence[str], model: nn.Module, job: Job, store: str = "parquet") -> Rates:
    """Read, encode and store these videos, one after another in this process; what they took of its cores.

    On a CPU seconds of cores are counted, so that other work on the machine counts little. One batch goes ahead, whose
    time is that of the first calls.

    Raises:
        ValueError, RuntimeError: there is no video, none can be encoded, or the store is not there.
    """
    if not paths:
        raise ValueError("rates: there must be a video to measure on, got none")
    weight = next(model.parameters())
    clock = time.process_time if weight.device.type == "cpu" else time.perf_counter
    preset = sized(job.preset, model)
    dtype = next(name for name, value in DTYPES.items() if value == job.dtype)
    made = Manifest(store, widths(model, job.frames, job.outputs), dtype)

    def run(some: Sequence[str], timing: Timing) -> float:
        """Bytes that are kept of them."""

        def clips() -> Iterator[Decoded]:
            for path in some:
                began, clip, error = time.process_time(), None, None
                try:
                    clip = read(path, job.frames, job.sampler, job.reader, start=job.start, end=job.end)
                except Exception as raised:  # whatever a damaged file makes a decoder raise
                    error = raised
                yield Decoded(path, clip, error, time.process_time() - began)

        options = {"outputs": job.outputs, "dtype": job.dtype, "batch": job.batch, "ordered": False}
        with tempfile.TemporaryDirectory() as folder:
            with Corpus(folder, made) as corpus:
                for row in encode_clips(clips(), model, preset, timing=timing, **options):
                    began = time.process_time()
                    corpus.add(row)
                    timing.parts["write"] += time.process_time() - began
                began = time.process_time()
                corpus.flush()
                timing.parts["write"] += time.process_time() - began
            return sum(part.stat().st_size for part in parts(Path(folder)))

    run(paths[: job.batch], Timing())
    timing = Timing(clock=clock)
    size = run(paths, timing)
    if not timing.videos:
        raise RuntimeError(f"rates: of {len(paths)} videos none could be encoded, e.g. {paths[0]}")
    n = len(paths)
    found = {name: timing.parts[name] / n for name in ("read", "preprocess", "encode", "write")}
    return Rates(n, timing.failed, **found, size=size / n, device=weight.device.type)


def report(rates: Rates, videos: float, cores: int, devices: int = 1) -> str:
    """What `videos` would take, in lines."""
    read, write, preprocess, encode = (
        f"{1e3 * x:.2f} ms" for x in (rates.read, rates.write, rates.preprocess, rates.encode)
    )
    core_hours, device_hours = (videos * x / 3600 for x in (rates.on_cores, rates.on_device))
    hours = max(core_hours / cores, device_hours / devices)
    failed = f", {rates.failed} of which failed" if rates.failed else ""
    where = "a core" if rates.device == "cpu" else f"a {rates.device} device"
    lines = [
        f"measured on {rates.videos} videos{failed}; a video takes of a core {read} to read and {write} to write, of "
        f"{where} {preprocess} to preprocess and {encode} to encode, and {rates.size:.0f} bytes in the store",
    ]
    if device_hours:
        busy = core_hours / (device_hours / devices)
        lines += [
            f"{videos:g} videos: {core_hours:.1f} core hours and {device_hours:.1f} hours of {where}",
            f"PREDICTED: {hours:.1f} hours on {cores} cores and {devices} devices, if one of the two is always busy; "
            f"{busy:.1f} cores keep up with {devices} devices",
        ]
    else:
        reading = max(1, round(cores * rates.read / rates.on_cores))
        lines += [
            f"{videos:g} videos: {core_hours:.1f} core hours",
            f"PREDICTED: {hours:.1f} hours on {cores} cores, if all are always busy; reading takes "
            f"{rates.read / rates.on_cores:.0%} of them: --workers {reading}",
        ]
    return "\n".join([*lines, f"store: {videos * rates.size / 1e9:.2f} GB"])
