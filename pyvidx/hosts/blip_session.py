"""A stream through an InstructBLIP or BLIP-2 with MA-LMM's memory, and what its entries hold in seconds."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyvidx import memory
from pyvidx.hosts.frames import times_after
from pyvidx.hosts.language.kept import Stream, slots_of
from pyvidx.hosts.session import spans
from pyvidx.memory import Policy
from pyvidx.memory.sources import Memories
from pyvidx.preprocess import Frames, preprocess
from pyvidx.sizes import check_counts


class Slots(NamedTuple):
    """What the entries of a visual bank hold, at each of its P positions, which merge by themselves.

    Attributes:
        sizes: int64 [P, L], frames in each.
        first, last: float64 [P, L], seconds of the first and last frame in each.
    """

    sizes: Tensor
    first: Tensor
    last: Tensor


class BlipSession:
    """A stream through an InstructBLIP; made by its `session`. Of constant size, where its memory is.

    Attributes:
        frames: pushed so far.
        held: what the entries of MA-LMM's visual bank hold, or None: no frame yet, or no such bank.
    """

    def __init__(
        self, host: nn.Module, questions: Any, capacity: int, visual: bool, query: bool, policy: Policy | None
    ):
        model, language = host.model, host.language
        self.host, self.frames, self.held = host, 0, None
        self._last = -math.inf  # seconds of the newest frame
        self.questions = [questions] if isinstance(questions, str) else list(questions or [])
        if type(capacity) is not int or capacity < 0:
            raise ValueError(f"InstructBLIP: capacity must be whole and at least 0, got {capacity!r}")
        self.policy = memory.create("concat") if policy is None and not capacity else policy
        self.bound = host.reads_text and (query or self.policy is not None)  # to the questions of the start
        if self.bound and not self.questions:
            raise ValueError(
                "InstructBLIP: this Q-Former reads the question, so session needs its questions; with query=False any "
                "may be asked at any time"
            )
        self.prompt = None
        if self.bound:
            self.prompt = model.prompt(*language.question_ids([self.questions]))
        elif not host.reads_text:
            self.prompt = model.prompt(batch=1)
        self.bank: memory.Bank | None = None  # of a policy: of as many videos as there are questions
        self.memories: Memories | None = None
        if self.policy is None:
            self.memories = model.start(self.prompt, batch=1, length=capacity, visual=visual, query=query)

    @torch.no_grad()
    def push(
        self,
        frames: Frames,
        seconds: Tensor | Sequence[float] | None = None,
        *,
        positions: Tensor | None = None,
        chunk: int = 16,
    ) -> None:
        """Take in the next frames.

        Args:
            frames: uint8 [T, H, W, 3], or what else pyvidx.preprocess takes.
            seconds: [T], their times, finite and none before the one before; None: their numbers in the stream.
            positions: [T], where they are in the temporal table, if the model has one; see MALMM.push.
            chunk: frames encoded at once; a matter of speed and memory.

        Raises:
            ValueError: they are no frames, or their times are not as many or go back; none of them is taken then.
        """
        check_counts("InstructBLIP", chunk=chunk)
        pixels = self.prepare(frames)
        times = self._times(seconds, len(pixels))
        for start in range(0, len(pixels), chunk):
            part = slice(start, start + chunk)
            at = None if positions is None else positions[part]
            self.take(self.encode(pixels[part]), times[part], positions=at)

    def prepare(self, frames: Frames) -> Tensor:
        """Normalized pixels [T, 3, h, w] of frames."""
        pixels = preprocess(frames, self.host.preset)
        return pixels[None] if pixels.dim() == 3 else pixels

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """The frame encoder alone: normalized pixels [t, 3, h, w] -> features [t, P, C]."""
        weight = self.host.model.qformer.query_tokens
        return self.host.model.features(pixels.to(weight.device, weight.dtype))

    @torch.no_grad()
    def take(
        self,
        features: Tensor,
        seconds: Tensor | Sequence[float] | None = None,
        *,
        positions: Tensor | None = None,
    ) -> None:
        """`push` of what `encode` gave, [T, P, C]."""
        T, model = len(features), self.host.model
        times = self._times(seconds, T)
        if self.policy is None:
            self.memories = model.push(self.memories, features[None], positions=positions)
            if self.memories.visual is not None:
                self.held = _advanced(self.held, self.memories, times)
        else:
            rows = model.project(model.encode(features[None], self.prompt, length=0))  # [1, T * Q, C], or [1, G, ...]
            rows = rows.view(-1, T, model.config.qformer.queries, rows.shape[-1])
            self.dtype = rows.dtype
            self.bank = Stream.start(self.policy, [rows], len(rows)) if self.bank is None else self.bank
            self.bank = self.policy.extend(self.bank, rows, times.to(rows.device).expand(len(rows), -1))
        self.frames += T
        self._last = float(times[-1]) if T else self._last

    @torch.no_grad()
    def ask(self, question: str | None = None, **options: Any) -> str:
        """The answer at the newest frame; the stream stays as it is.

        Args:
            question: one of the start's, where it must be (see InstructBLIP.session), else any. None: the start's one.
            options: of Language.generate.

        Raises:
            ValueError: no frame was pushed, or the question is not one of the start's.
        """
        question = self.questions[0] if question is None and len(self.questions) == 1 else question
        if question is None:
            raise ValueError("InstructBLIP: ask needs a question: the session was started with none, or with several")
        if not self.frames:
            raise ValueError("InstructBLIP: ask needs a frame to have been pushed")
        if self.bound and question not in self.questions:
            raise ValueError(
                f"InstructBLIP: the question must be one of the session's, got {question!r}; with query=False any may "
                "be asked"
            )
        language, model = self.host.language, self.host.model
        number = self.questions.index(question) if self.bound else 0
        if self.policy is not None:
            tokens = slots_of(self.bank, self.dtype)[number].rows[0][None]
        else:
            other = None
            if self.prompt is None:
                other = model.prompt(*language.question_ids([question]))
            tokens = model.ask(self.memories, other)
            tokens = model.project(tokens[:, number] if tokens.dim() == 4 else tokens)
        (answer,) = language.generate(tokens, [question], **options)
        return answer

    def slots(self) -> list[tuple[float, float]]:
        """Seconds of the first and the last frame in each slot, in order of time. In MA-LMM's visual bank positions
        merge by themselves: the middle one of all. Without that bank, or a frame, there are none."""
        if self.bank is not None:
            return spans(slots_of(self.bank, self.dtype)[0])
        if self.held is None:
            return []
        return list(zip(*(x.median(0).values.tolist() for x in (self.held.first, self.held.last))))

    def _times(self, seconds: Tensor | Sequence[float] | None, T: int) -> Tensor:
        """float64 [T]"""
        seconds = range(self.frames, self.frames + T) if seconds is None else seconds
        times = times_after(self._last, seconds)
        if len(times) != T:
            raise ValueError(f"InstructBLIP: seconds must be one per frame, {T}, got {len(times)}")
        return torch.tensor(times, dtype=torch.float64)

    def fork(self) -> "BlipSession":
        """A copy that goes its own way."""
        twin = object.__new__(BlipSession)
        twin.__dict__ |= self.__dict__
        twin.memories = self.memories and self.memories.clone()
        twin.bank = self.bank and self.bank.fork()
        return twin


def _advanced(before: Slots | None, memories: Memories, times: Tensor) -> Slots:
    """The slots after frames of these times. An entry holds consecutive frames, so its sizes tell which."""
    bank, L = memories.visual, memories.stored
    sizes = bank.sizes[0].gather(1, bank.order[0, :, :L].long()).long().cpu()  # [P, L]
    new = times.expand(len(sizes), -1)
    if before is None:
        items, first, last = torch.ones_like(new, dtype=torch.int64), new, new
    else:
        items = torch.cat([before.sizes, torch.ones_like(new, dtype=torch.int64)], 1)
        first, last = torch.cat([before.first, new], 1), torch.cat([before.last, new], 1)
    ends, reached = items.cumsum(1), sizes.cumsum(1)
    at = torch.searchsorted(ends, reached)  # the item that an entry ends with
    begin = torch.cat([torch.zeros_like(at[:, :1]), at[:, :-1] + 1], 1)
    return Slots(sizes, first.gather(1, begin), last.gather(1, at))
