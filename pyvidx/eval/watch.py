"""Video language models with a memory, and with controls of the same budget: questions about video files."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from pyvidx import memory
from pyvidx.hosts import Answer, Session
from pyvidx.sizes import check_counts
from pyvidx.video import read, sampling

CONTROLS = ("uniform", "random")


class Watcher:
    """A host, a policy and a budget.

        watch = Watcher(model, processor, "merge", capacity=16, frames=64)
        watch("a.mp4", "What is on the table?", max_new_tokens=20).text

    What the language model sees is `capacity` steps of a video (of two frames each for those that take pairs):

        a policy     of pyvidx.memory: the slots that it makes of `frames` steps
        "uniform"    a control without a memory: as many steps, evenly spaced over the video
        "random"     a control: as many steps, drawn from the `frames` that a policy would see; the same of a video
                     whatever is asked, and others with another seed

    Args:
        model, processor: of transformers, one that Session takes.
        policy: one of CONTROLS, or of pyvidx.memory.names() but its "uniform", which is a control here; with its
            options.
        capacity: the budget in steps. None: every step that is read, and with a control all `frames`; a policy that has
            no capacity (dtd, moviechat, ...) goes by its own options then.
        frames: steps read of each video.
        sampler: which, see pyvidx.video.sampling; of the controls "uniform" alone reads others.
        seed: of "random".

    Raises:
        ValueError: a number is below 1, capacity is above frames, or the policy or an option does not fit.
    """

    def __init__(
        self,
        model,
        processor,
        policy: str = "merge",
        *,
        capacity: int | None = 16,
        frames: int = 64,
        sampler: str = "linspace",
        seed: int = 0,
        **options,
    ):
        check_counts("Watcher", frames=frames, **({} if capacity is None else {"capacity": capacity}))
        if capacity is not None and capacity > frames:
            raise ValueError(f"Watcher: capacity must be at most frames, which are {frames} steps, got {capacity}")
        if policy in CONTROLS and options:
            raise ValueError(f"Watcher: {policy} is a control and takes no options, got {', '.join(options)}")
        self.model, self.processor, self.policy, self.capacity = model, processor, policy, capacity
        self.frames, self.sampler, self.seed = frames, sampler, seed
        self._per_step = getattr(getattr(model.config, "vision_config", None), "temporal_patch_size", 1)
        self._how = _how(policy, capacity, options)
        # All of one budget see as many pixels.
        self._how["clip"] = (frames if capacity is None else capacity) * self._per_step
        sampling.sample(sampler, frames, frames, fps=25.0, generator=torch.Generator())  # refuses what is unknown
        Session(model, processor, **self._how)  # refuses what does not fit, before a video is read
        self._seen: tuple[str, Session] | None = None

    def __call__(self, video: str | os.PathLike, question: str | list[dict], **options) -> Answer:
        """An answer. The last video stays encoded for the next question about it.

        Args:
            video: a file. question, options: as of Session.ask.

        Raises:
            FileNotFoundError, RuntimeError, ValueError: see pyvidx.video.read and Session.
        """
        return self.session(video).ask(question, **options)

    def session(self, video: str | os.PathLike) -> Session:
        """What has seen the video."""
        name = os.path.abspath(video)
        if self._seen is None or self._seen[0] != name:
            self._seen = None  # one at a time
            self._seen = (name, self._watched(name))
        return self._seen[1]

    def _watched(self, video: str) -> Session:
        wanted = self.capacity if self.policy == "uniform" and self.capacity is not None else self.frames
        generator = torch.Generator().manual_seed(self.seed)
        clip = read(video, wanted * self._per_step, self.sampler, generator=generator)
        kept = self._drawn(video, len(clip.seconds)) if self.policy == "random" else slice(None)
        return Session(self.model, self.processor, **self._how).push(clip.frames[kept], clip.seconds[kept])

    def _drawn(self, video: str, T: int) -> Tensor | slice:
        """Frames of `capacity` steps in order of time, of T frames."""
        n, steps = self._per_step, -(-T // self._per_step)
        if self.capacity is None or steps <= self.capacity:
            return slice(None)
        seed = zlib.crc32(f"{self.seed} {os.path.basename(video)}".encode())
        drawn = torch.randperm(steps, generator=torch.Generator().manual_seed(seed))[: self.capacity].sort().values
        index = (drawn[:, None] * n + torch.arange(n)).flatten()
        return index[index < T]


def _how(policy: str, capacity: int | None, options: dict) -> dict:
    """Policy, capacity and options of a session.

    Raises:
        ValueError: the policy has no capacity and one is given, or it has one and options, but none is given.
    """
    if policy in CONTROLS:
        return {"policy": "concat"}
    if policy in memory.names():
        fields = memory.create(policy).spec()
        if "capacity" not in fields and capacity is not None:
            raise ValueError(
                f"Watcher: {policy} has no capacity to keep to {capacity} steps: give capacity=None, and its own "
                f"options, which are {', '.join(name for name in fields if name != 'name')}"
            )
        if "capacity" in fields and capacity is None:
            if options:
                raise ValueError(f"Watcher: {policy} needs a capacity beside {', '.join(options)}, got None")
            return {"policy": "concat"}
    return {"policy": policy, "capacity": capacity} | options


def until(text: str, stops: str | Sequence[str]) -> str:
    """The text up to the first of the stops in it."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text
