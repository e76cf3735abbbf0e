"""Hosts whose prompts say in words when each step of a video is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyvidx.hosts.language.host import Place, Slots
from pyvidx.hosts.language.patches import Patches, PatchPlace
from pyvidx.hosts.language.tokens import Prompt
from pyvidx.ops._library import require

LONGEST = 32  # tokens that say one time


@dataclass(frozen=True)
class TimedPlace(PatchPlace):
    texts: Sequence[Sequence[int]] = ()  # the tokens that say when each step is; of a first one alone maybe unknown: []
    link: Sequence[int] = ()  # what stands between a step and the text of the next
    shown: Tensor | None = None  # bool [T, P] on the CPU, the tokens that the prompt has of the steps. None: all


class Timed(Patches):
    """A step is its text and its placeholders. New texts are the processor's own for the middles of the slots. Without
    a processor they are those of the steps that are nearest to the middles, read from the prompt.

    Attributes:
        said: how a step's text reads.
        links: how many tokens stand between a step and the next one's text; the first that fits the prompt.
    """

    said: ClassVar[re.Pattern[str]]
    links: ClassVar[tuple[int, ...]] = (0,)

    def counts(self, inputs: Mapping[str, Any], look: dict[str, Any]) -> list[int]:
        """Placeholders of every step of a video."""
        return [look["positions"]] * look["steps"]

    def around(self) -> tuple[list[int], list[int]]:
        """Tokens before and behind the placeholders of a step."""
        return [], []

    def written(self, place: TimedPlace, counts: list[int], seconds: list[float]) -> str:
        """What the processor writes for steps of so many tokens at these times."""
        raise NotImplementedError

    def told(self, place: TimedPlace, slots: Slots) -> tuple[list[int], Tensor]:
        """How many tokens each entry of the slots has, and when it is, float64 [entries]."""
        return [slots.levels[0].shape[1]] * len(slots), slots.seconds

    def videos(self, inputs: Mapping[str, Any], prompt: Prompt) -> list[Place]:
        looks = self.looks(inputs, prompt)
        if looks and self.processor is not None:
            self._check_processor(TimedPlace(row=0, start=0, stop=0, **looks[0]))
        counts = [self.counts(inputs, look) for look in looks]
        steps = prompt.blocks(self.token, [n for video in counts for n in video], "step of a video")
        (before, behind), found, at = self.around(), [], 0
        for look in looks:
            mine = steps[at : at + look["steps"]]
            at += len(mine)
            row = prompt.ids[mine[0][0]].tolist()
            units = [(start - len(before), stop + len(behind)) for _, start, stop in mine]
            fits = len({r for r, _, _ in mine}) == 1 and all(
                row[max(a, 0) : start] == before and row[stop:b] == behind
                for (a, b), (_, start, stop) in zip(units, mine)
            )
            text = "compress: the steps of video {} must stand in one row, the placeholders of each between {} and {}"
            require(fits, text.format(look["number"], before, behind))
            start, link, texts = self._texts(row, units)
            place = dict(row=mine[0][0], start=start, stop=units[-1][1], texts=texts, link=link)
            found.append(TimedPlace(**place, **look))
        return found

    def seconds(self, inputs: Mapping[str, Any], place: TimedPlace) -> Tensor:
        """Of `video_metadata`; else what the prompt says, which a processor can read; else numbers of steps."""
        known = self.metadata_seconds(inputs, place)
        if known is not None or self.processor is None:
            return super().seconds(inputs, place) if known is None else known
        texts = [self.processor.tokenizer.decode([*place.link, *x]) for x in place.texts]
        matches = [self.said.search(x) for x in texts]
        text = f"compress: the prompt must say when each step of video {place.number} is, or seconds be given"
        require(all(matches), f"{text}; it says {texts}")
        return torch.tensor([float(x[1]) for x in matches], dtype=torch.float64)

    def block(self, place: TimedPlace, slots: Slots) -> list[int]:
        counts, seconds = self.told(place, slots)
        seconds = seconds.cpu()
        if self.processor is not None:
            return self._ids(self.written(place, counts, seconds.tolist()))
        ids, (before, behind) = [], self.around()
        for i, (count, near) in enumerate(zip(counts, (place.seconds - seconds[:, None]).abs().argmin(1).tolist())):
            ids += [*(place.link if i else ()), *place.texts[near], *before, *[self.token] * count, *behind]
        return ids

    def _ids(self, text: str) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check_processor(self, place: TimedPlace) -> None:
        try:
            text = self.written(place, [place.positions], [0.0])
            fits = self._ids(text).count(self.token) == place.positions and self.said.search(text)
        except (AttributeError, KeyError, TypeError, ValueError):
            fits = False
        made, kind = type(self.processor).__name__, self.config.model_type
        require(fits, f"compress: processor must be that of the {kind} model, with its placeholders, got {made}")

    def _texts(self, row: list[int], units: list[tuple[int, int]]) -> tuple[int, list[int], list[list[int]]]:
        """Where the text of the first step begins, what stands between a step and the next one's text, and the texts
        of all."""
        between, end = [row[a:b] for (_, a), (b, _) in zip(units, units[1:])], units[0][0]
        for n in self.links:
            texts = [x[n:] for x in between]
            said = self._said_before(row[max(0, end - LONGEST) : end], texts)
            if said or not any(texts):
                return end - said, between[0][:n] if between else [], [row[end - said : end], *texts]
        raise ValueError(
            "compress: the prompt must say when a video's first step is as it does of the others, beginning with a "
            "token of its own: let the video follow a special token or a space"
        )

    def _said_before(self, before: list[int], texts: list[list[int]]) -> int:
        """How many of the tokens before a first step say when it is; 0: it is not seen."""
        ends, longest = {(x[0], x[-1]) for x in texts if x}, max(map(len, texts), default=0)
        for n in range(1, len(before) + 1):
            if self.processor is not None:
                fits = self.said.fullmatch(self.processor.tokenizer.decode(before[-n:]))
            else:  # it begins and ends like the others, and a later time is no shorter
                fits = n <= longest and ends == {(before[-n], before[-1])}
            if fits:
                return n
        return 0
