"""This machine: a pool of processes decodes ahead, the model encodes here."""

from collections.abc import Iterator, Sequence

from torch import nn

from pyvidx.corpus.encode import Encoded, Timing, encode_videos
from pyvidx.corpus.engines.registry import Job, register


@register("local")
class Local:
    def check(self) -> None:
        pass

    def run(self, paths: Sequence[str], model: nn.Module, job: Job, workers: int, timing: Timing) -> Iterator[Encoded]:
        return encode_videos(paths, model, **vars(job), workers=workers, ordered=False, timing=timing)
