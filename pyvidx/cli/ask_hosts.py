"""The models of `pyvidx ask`, each behind the same few methods: push a clip, ask, and say what the slots hold."""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from pyvidx import memory
from pyvidx.hosts.instructblip import MODELS as BLIP
from pyvidx.hosts.instructblip import InstructBLIP
from pyvidx.hosts.settings import model_type
from pyvidx.video import Clip

CHUNK = 16  # frames encoded at once
PARTS = ("load", "read", "encode", "compress", "generate")


class Clock:
    """Seconds of each part; of a GPU, once its work is done."""

    def __init__(self):
        self.parts = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.parts[part] += time.perf_counter() - start

    def __str__(self) -> str:
        return "time: " + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in self.parts.items())


class Blip:
    """InstructBLIP or BLIP-2, with MA-LMM's memory."""

    def __init__(self, options: argparse.Namespace, clock: Clock):
        self.clock, self.options = clock, options
        dtype = "auto" if options.dtype is None else getattr(torch, options.dtype)
        host = InstructBLIP.from_pretrained(options.model, device=options.device, dtype=dtype)
        chosen = {} if options.memory is None else options.memory[1]
        capacity = 0 if options.memory is None else options.capacity or 20
        self.session = host.session(options.question, capacity=capacity, **chosen)
        self.said = f"MA-LMM's memory of {capacity}" if capacity else "no memory: every frame by itself"

    @staticmethod
    def check(options: argparse.Namespace, kind: str) -> None:
        """ValueError for a memory that these hosts have not."""
        if options.memory is None:
            return
        name, chosen = options.memory
        wrong = chosen.keys() - {"query", "visual"} or {k for k, v in chosen.items() if not isinstance(v, bool)}
        if name != "merge" or wrong:
            raise ValueError(
                f"--memory must be merge, merge:query=False or merge:visual=False with a {kind}, whose memory is "
                f"MA-LMM's, got {name}" + (f" with {', '.join(sorted(wrong))}" if wrong else "")
            )
        if options.question is None and kind != "blip-2" and chosen.get("query", True):
            raise ValueError(
                f"--memory must be merge:query=False where questions are typed: the Q-Former of a {kind} reads the "
                "question with every frame"
            )

    @property
    def frames(self) -> int:
        return self.session.frames

    def push(self, clip: Clip) -> None:
        for frames, seconds in zip(clip.frames.split(CHUNK), clip.seconds.split(CHUNK)):
            with self.clock.of("encode"):
                features = self.session.encode(self.session.prepare(frames))
            with self.clock.of("compress"):
                self.session.take(features, seconds)

    def ask(self, question: str) -> str:
        with self.clock.of("generate"):
            return self.session.ask(question, max_new_tokens=self.options.new_tokens)

    def slots(self) -> list[tuple[float, float]] | None:
        """Of each its first and last second: positions merge by themselves, so the middle one of all."""
        found = self.session.slots
        if found is None:
            return None
        return list(zip(*(x.median(0).values.tolist() for x in (found.first, found.last))))


def kind_of(options: argparse.Namespace) -> Callable:
    """What watches with the model of a folder, after a look at its config.json and at the memory.

    Raises:
        FileNotFoundError, ValueError: it is no folder of a host that is known, or has no such memory.
    """
    kind = model_type(options.model)
    if options.memory is not None and kind not in BLIP:
        name, chosen = options.memory
        given = {} if options.capacity is None else {"capacity": options.capacity}
        if twice := given.keys() & chosen.keys():
            raise ValueError(f"--memory {name} has a {min(twice)} already, --{min(twice)} is another")
        options.memory = memory.create(name, **chosen | given)
    if kind in BLIP:
        Blip.check(options, kind)
        return Blip
    raise ValueError(f"--model must hold one of {', '.join(BLIP)}, {options.model} holds {kind!r:.100}")
