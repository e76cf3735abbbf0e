"""Ray Data, on this machine or the cluster it is part of: one streaming plan of decoding tasks and an actor pool.

Tasks of one core decode, each in a process that Ray has, through pyvidx.video.pool: what ends a decoder is an error of
its file there too. Actors encode, one per GPU where there are some, else on cores that decoding leaves. Frames go
through Ray's object store, which holds decoding back while it is full; results come to the process that started the
run, which writes them. So rows have one writer: none is there twice where Ray runs a task again, and videos that have a
row are left out by the same rule as without Ray.
"""

import copy
import logging
import os
import pickle
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from pyvidx.corpus.encode import Encoded, Timing, encode_clips, sized
from pyvidx.corpus.engines.registry import Job, register
from pyvidx.video import Clip
from pyvidx.video.pool import Decoded, shared

# Videos of a block: what is handed from task to task, and done again if a machine is lost; and blocks at most.
_BLOCK, _BLOCKS = 32, 4096


@register("ray")
class Ray:
    def check(self) -> None:
        try:
            import ray.data  # noqa: F401
        except ImportError as error:
            raise RuntimeError("corpus: the engine ray needs Ray Data: pip install 'pyvidx[ray]'") from error

    def run(self, paths: Sequence[str], model: nn.Module, job: Job, workers: int, timing: Timing) -> Iterator[Encoded]:
        """workers: decoding tasks at once at most."""
        if not paths:
            return
        import ray

        began = time.perf_counter()
        if not ray.is_initialized():
            # Of a cluster that runs already, RAY_ADDRESS or `ray start` on this machine says so.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # there is one already
        cores, gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
        # Decoding never takes the last core from the actors, nor are they more than there is work for.
        tasks = max(1, min(workers, cores - 1))
        actors = gpus or max(1, min(cores - tasks, -(-len(paths) // _BLOCK)))
        weights = ray.put(copy.deepcopy(model).to("cpu"))
        share = 1.0 if cores > 1 else 0.5
        names = [{"path": os.fsencode(path)} for path in paths]  # bytes: a name need not be UTF-8
        blocks = min(_BLOCKS, -(-len(names) // _BLOCK))
        rows = ray.data.from_items(names, override_num_blocks=blocks).map(
            _decode, fn_kwargs={"job": job, "folder": os.getcwd()},
            compute=ray.data.TaskPoolStrategy(size=tasks), num_cpus=share,
        ).map_batches(
            _Encoder, fn_constructor_args=(weights, job), batch_size=job.batch,
            # Of other resources than decoding: Ray would have the same process do both.
            compute=ray.data.ActorPoolStrategy(size=actors), num_cpus=0 if gpus else 0.9 * share,
            num_gpus=1 if gpus else 0,
        )  # fmt: skip
        try:
            for row in rows.iter_rows():
                results, part = pickle.loads(row["results"])
                timing.videos += part.videos
                timing.frames += part.frames
                timing.failed += part.failed
                for name, seconds in part.parts.items():
                    timing.parts[name] += seconds
                timing.wall = time.perf_counter() - began
                yield from results
        except ray.exceptions.RayError as error:
            last = str(error).strip().split("\n")[-1]
            raise RuntimeError(f"corpus: Ray ended with {type(error).__name__}: {last}") from error


def _decode(row: dict[str, Any], job: Job, folder: str) -> dict[str, Any]:
    """A video's frames in place of its path, or its error. As bytes: rows of one column differ in shape.

    folder: that a relative path starts from; a worker of Ray may be in another.
    """
    given = os.fsdecode(row["path"])
    path = os.path.join(folder, given)
    options = {"start": job.start, "end": job.end, "workers": 1, "ahead": 1}
    (found,) = shared().map([path], job.frames, job.sampler, job.reader, **options)
    frames = b"" if found.clip is None else found.clip.frames.numpy().tobytes()
    rest = found._replace(source=given, clip=None if found.clip is None else _without_frames(found.clip))
    return {"frames": frames, "rest": pickle.dumps(rest)}


def _without_frames(clip: Clip) -> tuple[Any, ...]:
    return tuple(clip.frames.shape), {n: getattr(clip, n) for n in ("seconds", "indices", "fps", "path", "damaged")}


class _Encoder:
    """An actor: the model, loaded once."""

    def __init__(self, model: Any, job: Job):
        import ray

        self.model = ray.get(model).to("cuda" if torch.cuda.is_available() else "cpu")
        self.job, self.preset = job, sized(job.preset, self.model)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        job, timing = self.job, Timing()
        clips = map(_decoded, batch["frames"], batch["rest"])
        results = list(
            encode_clips(
                clips, self.model, self.preset, outputs=job.outputs, dtype=job.dtype, batch=job.batch, ordered=False,
                timing=timing,
            )
        )  # fmt: skip
        return {"results": [pickle.dumps((results, timing))]}


def _decoded(frames: bytes, rest: bytes) -> Decoded:
    found: Decoded = pickle.loads(rest)
    if found.clip is None:
        return found
    shape, values = found.clip
    return found._replace(clip=Clip(torch.frombuffer(bytearray(frames), dtype=torch.uint8).view(shape), **values))
