"""The models of `pyvidx ask`, each behind the same few methods: push a clip, ask, and say what the slots hold."""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from pyvidx import memory
from pyvidx.data.tables import read_json
from pyvidx.hosts import minigpt4
from pyvidx.hosts.importing import LOCAL, importing
from pyvidx.hosts.instructblip import MODELS as BLIP
from pyvidx.hosts.instructblip import InstructBLIP
from pyvidx.hosts.language import names
from pyvidx.hosts.language.kept import method
from pyvidx.hosts.language.registry import HOSTS
from pyvidx.hosts.minigpt4 import MODEL_TYPE as MINIGPT4
from pyvidx.hosts.session import Session
from pyvidx.hosts.settings import model_type
from pyvidx.video import Clip

BT_ADAPTER = "pyvidx_bt_adapter_vision"  # of pyvidx.hosts.llava.tower, which needs transformers to be imported
CHUNK = 16  # frames encoded at once
FRAMES = 32, "linspace"
PARTS = ("load", "read", "encode", "compress", "generate")


class Clock:
    """Seconds of each part, without those of parts within it; of a GPU, once its work is done."""

    def __init__(self):
        self.parts = dict.fromkeys(PARTS, 0.0)
        self._within: list[str] = []

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        self._within.append(part)
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            took = time.perf_counter() - start
            self._within.pop()
            self.parts[part] += took
            if self._within:
                self.parts[self._within[-1]] -= took

    def __str__(self) -> str:
        return "time: " + ", ".join(f"{part} {seconds:.3f} s" for part, seconds in self.parts.items())


class Blip:
    """InstructBLIP or BLIP-2, with MA-LMM's memory.

    Attributes, as of all of these:
        sampling: how many frames it is shown, and by which rule, where options do not say.
        frames: pushed so far.
        said: what becomes of them.
    """

    sampling = FRAMES

    def __init__(self, options: argparse.Namespace, clock: Clock):
        self.clock, self.options = clock, options
        dtype = "auto" if options.dtype is None else getattr(torch, options.dtype)
        host = InstructBLIP.from_pretrained(options.model, device=options.device, dtype=dtype)
        if isinstance(options.memory, memory.Policy):
            self.session = host.session(options.question, policy=options.memory)
            self.said = about(options.memory)
        elif options.memory is None:
            self.session = host.session(options.question, capacity=0)
            self.said = "all of them kept"
        else:
            capacity = options.capacity or 20
            self.session = host.session(options.question, capacity=capacity, **options.memory)
            self.said = f"MA-LMM's memory of {capacity}"

    @staticmethod
    def check(options: argparse.Namespace, kind: str) -> None:
        """Options of MA-LMM's memory in the place of its name.

        Raises:
            ValueError: they are others.
        """
        name, chosen = options.memory
        wrong = chosen.keys() - {"query", "visual"} | {k for k, v in chosen.items() if not isinstance(v, bool)}
        if wrong:
            raise ValueError(
                f"--memory merge is MA-LMM's with a {kind} and takes query=False or visual=False, got "
                f"{', '.join(sorted(wrong))}"
            )
        options.memory = chosen

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
        return None if self.options.memory is None else self.session.slots()


class Watching:
    """A model of pyvidx.hosts.language, with any policy of pyvidx.memory before its language model."""

    sampling = FRAMES

    def __init__(self, options: argparse.Namespace, clock: Clock):
        self.clock, self.options = clock, options
        model, processor = loaded(options)
        policy = options.memory or memory.create("concat")
        self.session = Timed(model, processor, policy, chunk=CHUNK)
        self.session.clock = clock
        self.said = "all of them kept" if options.memory is None else about(policy)

    @property
    def frames(self) -> int:
        return self.session.frames

    def push(self, clip: Clip) -> None:
        with self.clock.of("encode"):  # and what the processor does before it
            self.session.push(clip.frames, clip.seconds)

    def ask(self, question: str) -> str:
        with self.clock.of("generate"):
            return self.session.ask(question, max_new_tokens=self.options.new_tokens).text

    def slots(self) -> list[tuple[float, float]] | None:
        return None if self.options.memory is None else self.session.slots()


class Timed(Session):
    """A session whose policy's time is a part of its own."""

    clock: Clock | None = None

    @property
    def policy(self) -> memory.Policy:
        found = super().policy
        return found if self.clock is None else Clocked(found, self.clock)


class Clocked:
    """A policy that says how long it takes."""

    def __init__(self, policy: memory.Policy, clock: Clock):
        self.policy, self.clock = policy, clock

    def __getattr__(self, name: str):
        return getattr(self.policy, name)

    def extend(self, *given, **options) -> memory.Bank:
        with self.clock.of("compress"):
            return self.policy.extend(*given, **options)


class Chatting:
    """A LLaVA or MiniGPT-4 with a BT-Adapter, which reads a clip as a whole."""

    def __init__(self, options: argparse.Namespace, clock: Clock):
        self.clock, self.options, self.clips = clock, options, []
        dtype = None if options.dtype is None else getattr(torch, options.dtype)
        if model_type(options.model) == MINIGPT4:
            self.chat = minigpt4.open(options.model, dtype=dtype, device=options.device)
            encoder = self.chat.model
        else:
            from pyvidx.hosts import llava

            self.chat = llava.open(options.model, dtype=dtype)
            encoder = self.chat.model.to(options.device).model.vision_tower
        self.chosen = options.frames is None and options.sampler is None and options.fps is None  # by its own rule
        own = None, lambda num_frames, *_: self.chat.sampled(num_frames)
        self.sampling = own if self.chosen else (self.chat.num_frames, "midpoint")
        running = ExitStack()
        encoder.register_forward_pre_hook(lambda *_: running.enter_context(clock.of("encode")) and None)
        encoder.register_forward_hook(lambda *_: running.close())

    @property
    def said(self) -> str:
        read = self.frames if self.chosen else len(self.chat.sampled(self.frames))
        return f"of which BT-Adapter reads {read}, without a memory"

    @staticmethod
    def check(options: argparse.Namespace) -> None:
        """ValueError for what these models cannot do."""
        for name in ("live", "memory"):
            if getattr(options, name):
                raise ValueError(f"--{name} must not be given with a BT-Adapter, which reads a clip as a whole")

    @property
    def frames(self) -> int:
        return sum(map(len, self.clips))

    def push(self, clip: Clip) -> None:
        self.clips.append(clip)

    def ask(self, question: str) -> str:
        frames, seconds = (torch.cat([getattr(c, name) for c in self.clips]) for name in ("frames", "seconds"))
        with self.clock.of("generate"):
            options = {"sample": not self.chosen, "max_new_tokens": self.options.new_tokens}
            return self.chat.answer(frames, question, seconds, **options)

    def slots(self) -> None:
        return None


def loaded(options: argparse.Namespace) -> tuple:
    """Model, by the class that its config.json names, and processor.

    Raises:
        ValueError: transformers has no such class.
        RuntimeError: transformers cannot be imported.
    """
    named = read_json(options.model / "config.json", dict).get("architectures")
    with importing("ask", "transformers"):
        import transformers

        build = getattr(transformers, str(named[0]), None) if isinstance(named, list) and named else None
        if not (isinstance(build, type) and issubclass(build, transformers.PreTrainedModel)):
            raise ValueError(f"--model: its config.json must name a model of transformers, got {named!r:.100}")
        dtype = "auto" if options.dtype is None else getattr(torch, options.dtype)
        model = build.from_pretrained(options.model, dtype=dtype, **LOCAL).eval().to(options.device)
        return model, transformers.AutoProcessor.from_pretrained(options.model, **LOCAL)


def kind_of(options: argparse.Namespace) -> Callable:
    """What watches with the model of a folder, after a look at its config.json and at the memory.

    Raises:
        FileNotFoundError, ValueError: it is no folder of a host that is known, or has no such memory.
    """
    kind = model_type(options.model)
    vision = read_json(options.model / "config.json", dict).get("vision_config")
    if kind == MINIGPT4 or kind == "llava" and isinstance(vision, dict) and vision.get("model_type") == BT_ADAPTER:
        Chatting.check(options)
        return Chatting
    if kind not in {*BLIP, *names()}:
        known = ", ".join(sorted({*BLIP, *names()})) + ", or a LLaVA or MiniGPT-4 with a BT-Adapter"
        raise ValueError(f"--model must hold one of {known}, {options.model} holds {kind!r:.100}")
    if kind in BLIP and options.memory is not None and options.memory[0] == "merge":
        Blip.check(options, kind)
    elif options.memory is not None:
        options.memory = policy_of(options)
        if options.memory.layout == "ragged" and kind not in BLIP and not HOSTS[kind].ragged:
            raise ValueError(
                f"--memory {options.memory.name} keeps some tokens of a frame, and a {kind} takes whole frames"
            )
    visual_alone = isinstance(options.memory, dict) and options.memory.get("query") is False
    if options.question is None and kind in BLIP and kind != "blip-2" and not visual_alone:
        raise ValueError(
            f"--memory must be merge:query=False where questions are typed: the Q-Former of a {kind} reads the "
            "question with every frame"
        )
    return Blip if kind in BLIP else Watching


def policy_of(options: argparse.Namespace) -> memory.Policy:
    """--memory and --capacity.

    Raises:
        ValueError: an option is unknown, given twice, or out of range.
    """
    name, chosen = options.memory
    given = {} if options.capacity is None else {"capacity": options.capacity}
    if twice := given.keys() & chosen.keys():
        raise ValueError(f"--memory {name} has a {min(twice)} already, --{min(twice)} is another")
    chosen = chosen | given
    return method(name, chosen.pop("capacity", None), chosen).policy


def about(policy: memory.Policy) -> str:
    """A policy and its options, for people."""
    options = ", ".join(f"{k} {v}" for k, v in policy.spec().items() if k != "name" and v)
    return f"policy {policy.name}" + (f" ({options})" if options else "")
