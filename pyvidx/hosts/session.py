"""A video language model that watches: frames come in as they are taken, questions are asked at any time.

    session = Session(model, processor, "merge", capacity=16)
    session.push(frames, seconds)                             # any number of frames, any number of times
    answer = session.ask("What is on the table?", max_new_tokens=50)
    answer.text, answer.slots                                 # what it said; seconds of first and last frame per slot

No frame stays once its step is encoded, so memory is as flat as the policy's bank (see pyvidx.memory).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyvidx import memory
from pyvidx.hosts.answers import answers, check_one
from pyvidx.hosts.compress import CHUNK, handed, placed
from pyvidx.hosts.frames import stacked, times_after
from pyvidx.hosts.language import Place, Prompt, Slots, host_of
from pyvidx.hosts.language.kept import Stream, method, slots_of
from pyvidx.memory import Bank, Policy
from pyvidx.ops._library import FLOATING, require
from pyvidx.preprocess import Frames
from pyvidx.sizes import check_counts

STEPS = 8  # of one call of the encoder
_KEY = "pyvidx.session"
_FIXED = ("text", "images", "videos", "video_metadata", "do_sample_frames", "return_tensors")  # of the processor's call


class Answer(NamedTuple):
    """What the model said, and what it had before it."""

    text: str
    tokens: Tensor  # int64 [n], on the CPU: those it made
    slots: list[
        tuple[float, float]
    ]  # seconds of the first and the last step in each, where two frames are at their mean


class Session:
    """One video, as long as it runs, before a video language model.

    Its state is what `push` leaves: a bank and, for models that take frames in pairs, the frame that waits for the
    other half. `ask` changes nothing; `fork` goes two ways from one state; `save` and `resume` go on another day.

    What the model gets is what compress would give it of all the frames at once, sized as `clip` says; but a video that
    fits has all its tokens, also those that VideoLLaMA3's processor leaves out as unchanged.

    Args:
        model, processor: of transformers, as for compress; neither is changed.
        policy, capacity, options: as of compress, without the functions of a whole clip (keyframes, evs, vidcom2).
        chunk: steps that the processor and the encoder take at a time.
        clip: processors that give a clip a number of pixels in all (Qwen3-VL, VideoLLaMA3) size frames as in a clip of
            so many. None: as many as all slots show, which then have the pixels of such a clip.
        processing: options of the host's processor for its videos, e.g. {"size": {"height": 224, "width": 224}}.

    Raises:
        ValueError: the model is no host; the policy is none of a stream; an option does not fit the policy.
        RuntimeError: transformers is older than 5.20.2.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        policy: str | Policy = "merge",
        *,
        capacity: int | None = None,
        chunk: int = STEPS,
        clip: int | None = None,
        processing: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        check_counts("Session", chunk=chunk, **({} if clip is None else {"clip": clip}))
        self.host = host_of(model, processor)
        require(processor is not None, "Session: processor must be the host's, got None")
        kind = self.host.config.model_type
        text = f"Session: the encoder of {kind} reads the question, so it cannot look at frames before; use compress"
        require(not self.host.reads_prompt, text)
        how = method(policy, capacity, options)
        ragged = isinstance(how, Stream) and how.policy.layout == "ragged"
        text = f"Session: {kind} needs the whole video's prompt for where ragged tokens stand in it; use compress"
        require(not (ragged and self.host.in_place), text)
        require(isinstance(how, Stream), f"Session: policy must be of a stream of frames; {policy} is of a whole clip")
        self._how, self._chunk, self._clip, self._processing = how, chunk, clip, dict(processing or {})
        try:
            json.dumps(self._processing)  # for save
        except (TypeError, ValueError) as error:
            raise ValueError(f"Session: processing must be of plain values ({error})") from error
        wrong = self._processing.keys() & {*_FIXED}
        require(not wrong, f"Session: processing must leave {', '.join(sorted(wrong))} to the session")
        self._place: Place | None = None  # of a step; None: no frame was pushed
        self._dtype: torch.dtype | None = None  # of the encoder
        self._bank: Bank | None = None  # None: no step is full
        self._held: Tensor | None = None  # [n, C, H, W], frames of a step that lacks some; often 0
        self._times: list[float] = []  # of those
        self._first, self._last = math.inf, -math.inf  # seconds
        self._frames = 0

    @property
    def policy(self) -> Policy:
        return self._how.policy if self._place is None else self._how.policy_of(self._place)

    @property
    def frames(self) -> int:
        """How many were pushed."""
        return self._frames

    @property
    def held(self) -> int:
        """How many of them wait for the rest of their step."""
        return len(self._times)

    def __repr__(self) -> str:
        spec = self.policy.spec()
        options = "".join(f", {name}={value!r}" for name, value in spec.items() if name != "name")
        seen = f"{self.frames} frames" + (f" up to {self._last:g} s" if self.frames else "")
        return f"Session({type(self.host.model).__name__}, {spec['name']!r}{options}): {seen}"

    @torch.no_grad()
    def push(self, frames: Frames, seconds: float | Sequence[float] | Tensor) -> Session:
        """Show the next frames to the memory, through the host's own processor, encoder and projector.

        A model that takes two frames at a time (Qwen) gets pairs. An odd frame waits for the next push; an ask
        before that sees it twice, as the model's processor ends a video of an odd number.

        Args:
            frames: one frame or several, none too: PIL images, arrays or tensors [H, W, 3] or [3, H, W], as the host's
                processor takes them, all of a session of one size.
            seconds: the time of each in its video; finite, and none before the one before.

        Returns:
            This session.

        Raises:
            ValueError: frames or seconds are not that; none of them is taken then.
        """
        new, times = stacked(frames), times_after(self._last, seconds)
        require(len(new) == len(times), f"Session.push: seconds must be {len(new)}, one per frame, got {len(times)}")
        if not times:
            return self
        if self._held is None:
            self._look(new[:1])
            self._held, self._first = new[:0].clone(), times[0]
        first, fits = self._held, self._held.shape[1:] == new.shape[1:] and self._held.dtype == new.dtype
        require(fits, "Session.push: frames must have the size and dtype of the first", new, first)
        if self._times:
            new, times = torch.cat([first.to(new.device), new]), self._times + times
        before, n = self._frames - self.held, self._place.frames_per_step
        whole = len(new) // n * n
        for start in range(0, whole, self._chunk * n):
            stop = min(start + self._chunk * n, whole)
            self._bank = self._advanced(self._bank, new[start:stop], times[start:stop])
            self._waits(new[:0], [], before + stop, times[stop - 1])
        self._waits(new[whole:], times[whole:], before + len(new), times[-1])
        return self

    def ask(self, question: str | list[dict[str, Any]], **options: Any) -> Answer:
        """The model's answer about what it has seen so far. Nothing changes: ask as often as you like.

        Args:
            question: the words of a user, put behind the video by the processor's chat template; a conversation in the
                template's form, with {"type": "video"} in it once; or a whole prompt with the video's placeholder.
            options: of the model's `generate`, e.g. max_new_tokens. One sequence comes back.

        Raises:
            ValueError: nothing was pushed yet, the prompt has not one place for the video, or generate would return
            several sequences.
        """
        check_one("Session.ask", self.host.model, options)
        slots = self._slots()
        inputs = self._inputs(question, slots)
        found = self.host.model.generate(**inputs, **options)
        found = getattr(found, "sequences", found)
        tokens = answers(found, inputs["input_ids"])[0].cpu()
        return Answer(self.host.processor.decode(tokens, skip_special_tokens=True), tokens, spans(slots))

    def inputs(self, question: str | list[dict[str, Any]]) -> Mapping[str, Any]:
        """What `ask` gives to the model, as of compress: for model(**inputs), and for other ways to generate."""
        return self._inputs(question, self._slots())

    def slots(self) -> list[tuple[float, float]]:
        """Seconds of the first and the last step in each slot; a step of two frames is at their mean."""
        return spans(self._slots())

    def fork(self) -> Session:
        """A second session that starts from this state. Model and processor are shared."""
        other = copy.copy(self)
        other._bank = None if self._bank is None else self._bank.fork()
        return other

    @torch.no_grad()
    def save(self, path: str | Path) -> Path:
        """Write the state to a .safetensors file, which memory.load reads as well. A crash leaves the old file whole.

        Raises:
            ValueError: path has another ending, nothing was pushed yet, or what is kept is not finite.
            OSError: the file cannot be written.
        """
        self._check_begun("save")
        bank = self._ended().reset() if self._bank is None else self._bank
        about = {
            "host": self.host.config.model_type, "weights": fingerprint(self.host.model),
            "dtype": str(self._dtype).removeprefix("torch."), "frames": self._frames, "first": self._first,
            "last": self._last, "held": self._times, "clip": self._clip, "processing": self._processing,
        }  # fmt: skip
        tensors, notes = {"held": self._held.contiguous()}, {_KEY: json.dumps(about)}
        return memory.save(path, self.policy, bank, tensors=tensors, notes=notes)

    @classmethod
    def resume(cls, path: str | Path, model: nn.Module, processor: Any, *, chunk: int = STEPS) -> Session:
        """The session that `save` wrote, with the policy and the options it had.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no file of `save`, or is damaged; model or processor are not those it was made with.
        """
        about, tensors = memory.beside(path, _KEY)
        require(about is not None and "held" in tensors, f"Session.resume: {path} must be a file of Session.save")
        policy, bank = memory.load(path)
        session = cls(model, processor, policy, chunk=chunk)
        host, kind = session.host, about.get("host")
        mine = host.config.model_type
        require(kind == mine, f"Session.resume: {path} is of a {kind!r} model, this is a {mine!r}")
        same = about.get("weights") == fingerprint(host.model)
        require(same, f"Session.resume: {path} is of other weights, or of these in another dtype")
        try:
            session._restore(about, tensors["held"])
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(f"Session.resume: {path} cannot go on with this model and processor: {error}") from error
        place, frames = session._place, session._frames - session.held
        left = policy.new(1, place.positions, host.width, device="meta").positions
        fits = bank.positions == left and bank.frames.tolist() == [frames // place.frames_per_step]
        fits = fits and len(session._times) < place.frames_per_step
        text = f"Session.resume: {path} must be of {frames} frames whose steps have {left} positions"
        require(fits, f"{text}, its bank is of {bank.frames.tolist()} steps of {bank.positions}")
        session._bank = Bank.load_state_dict(bank.state_dict(), host.model.device)
        return session

    def _restore(self, about: Mapping[str, Any], held: Tensor) -> None:
        clip, times = about["clip"], [float(x) for x in about["held"]]
        check_counts("Session", **({} if clip is None else {"clip": clip}))
        check_counts("Session", frames=about["frames"])
        require(held.dim() == 4 and len(held) == len(times), "the frames that wait must be one for each time", held)
        require(times == sorted(times), f"the times of frames that wait must not fall, got {times}")
        self._clip, self._processing = clip, dict(about["processing"])
        self._dtype = {str(x).removeprefix("torch."): x for x in FLOATING}[about["dtype"]]
        self._first = float(about["first"])
        self._look(held.new_zeros((1, *held.shape[1:])))
        self._waits(held, times, about["frames"], float(about["last"]))

    # The way of a frame.

    def _look(self, frame: Tensor) -> None:
        """Learn from the first frame [1, C, H, W] what a step is."""
        for _ in range(2):  # once more, sized by how many frames it takes
            place = self._processed(self._prompt(""), frame.expand(2, -1, -1, -1))[2]
            self._how.check(self.host, [place])
            self._place = place

    def _processed(self, prompt: str, frames: Tensor, **about: Any) -> tuple[Mapping[str, Any], Prompt, Place]:
        """What the host's processor makes of frames [n, C, H, W]. about: what video_metadata says of them."""
        n, per_step = len(frames), 1 if self._place is None else self._place.frames_per_step
        clip = self._clip or per_step * (self.policy.capacity or CHUNK)
        inputs = self.host.processor(
            text=[prompt], videos=[[frames]], return_tensors="pt", do_sample_frames=False,
            video_metadata=[{"total_num_frames": n, "fps": 1.0, "frames_indices": list(range(n))} | about],
            **self._processing | self.host.sized(self._processing, n, clip),
        )  # fmt: skip
        tokens = Prompt.of(inputs)
        places = placed(self.host, inputs, tokens)
        require(len(places) == 1, f"Session: the prompt must hold one video, got {len(places)}")
        return inputs, tokens, places[0]

    def _advanced(self, bank: Bank | None, frames: Tensor, times: list[float]) -> Bank:
        """The bank after the steps of frames [n, C, H, W]."""
        inputs, _, place = self._processed(self._prompt(""), frames)
        n = place.frames_per_step
        was, now = (self._place.positions, self._place.grid), (place.positions, place.grid)
        require(now == was, f"Session: the processor must size all frames alike, got steps of {was} and of {now}")
        levels = self.host.encode(inputs, place, 0, len(frames) // n)
        self._dtype = levels[0].dtype
        when = torch.tensor(times, dtype=torch.float64, device="cpu").view(-1, n).mean(1)
        bank = Stream.start(self.policy, levels, 1) if bank is None else bank
        first, *others = (x[None] for x in levels)
        return self.policy.extend(bank, first, when[None].to(first.device, non_blocking=True), attached=others)

    def _ended(self) -> Bank:
        """The bank as if the video ended here; this session's own stays as it is."""
        bank, missing = self._bank, self._place.frames_per_step - self.held
        if not self.held:
            return bank
        frames = torch.cat([self._held, self._held[-1:].expand(missing, -1, -1, -1)])
        bank = None if bank is None else bank.fork()
        return self._advanced(bank, frames, self._times + self._times[-1:] * missing)

    @torch.no_grad()
    def _slots(self) -> Slots:
        self._check_begun("ask")
        return slots_of(self._ended(), self._dtype)[0]

    @torch.no_grad()
    def _inputs(self, question: str | list[dict[str, Any]], slots: Slots) -> Mapping[str, Any]:
        blank = self._held.new_zeros((max(2, self._place.frames_per_step), *self._held.shape[1:]))
        span = self._last - self._first
        rate = (self._frames - 1) / span if span > 0 else 1.0
        prompt = self._prompt(question)
        inputs, prompt, place = self._processed(prompt, blank, fps=rate, duration=self._last)
        found = handed(self.host, inputs, prompt, [place], [slots])
        device = self.host.model.device
        found.update({name: x.to(device) for name, x in found.items() if isinstance(x, Tensor)})
        return found

    def _prompt(self, question: str | list[dict[str, Any]]) -> str:
        token = getattr(self.host.processor, "video_token", None)
        if isinstance(question, str):
            if token is not None and str(token) in question:
                return question
            parts = [{"type": "video"}, {"type": "text", "text": question}]
            question = [{"role": "user", "content": parts}]
        require(isinstance(question, list | tuple), "Session.ask: question must be a text or a conversation", question)
        return self.host.processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)

    def _waits(self, held: Tensor, times: list[float], frames: int, last: float) -> None:
        self._held, self._times = held.clone(), times  # a clone: else all that was pushed would stay
        self._frames, self._last = frames, last

    def _check_begun(self, what: str) -> None:
        require(self._place is not None, f"Session.{what}: push a frame first, there is nothing yet")


def spans(slots: Slots) -> list[tuple[float, float]]:
    """Seconds of the first and the last frame in each slot, in order of time; of ragged tokens, in each entry."""
    first, last = slots.first.tolist(), slots.last.tolist()
    if slots.entry is None:
        return list(zip(first, last))
    found: dict[int, tuple[float, float]] = {}
    for i, a, b in zip(slots.entry.tolist(), first, last):
        low, high = found.get(i, (a, b))
        found[i] = min(low, a), max(high, b)
    return [found[i] for i in sorted(found)]


def fingerprint(model: nn.Module) -> str:
    """Of a model's weights: a few numbers of each, so that other weights are noticed without reading all."""
    digest = hashlib.sha256()
    for name, x in model.named_parameters():
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        if not x.is_meta and x.numel():
            some = x.detach().reshape(-1)[:: max(1, x.numel() // 16)][:16]
            digest.update(some.double().cpu().numpy().tobytes())
    return digest.hexdigest()
