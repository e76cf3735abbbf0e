"""Hosts whose prompts say in words when each step of a video is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyvidx.hosts.language.host import Place, Slots
from pyvidx.hosts.language.patches import Patches
from pyvidx.hosts.language.tokens import Prompt
from pyvidx.ops._library import require

LONGEST = 32  # tokens that say one time


@dataclass(frozen=True)
class TimedPlace(Place):
    texts: Sequence[Sequence[int]] = ()  # the tokens that say when each step is; of a first one alone maybe unknown: []
    link: Sequence[int] = ()  # what stands between a step and the text of the next
    shown: Tensor | None = None  # bool [T, P] on the CPU, the tokens that the prompt has of the steps. None: all


class Timed(Patches):
    """A step is its text and its placeholders. New texts are the processor's own for the middles of the slots. Without
    a processor they are those of the steps that are nearest to the middles, read from the prompt.

    Attributes:
        said: how a step's text reads.
        links: tokens between a step and the next one's text.
    """

    said: ClassVar[re.Pattern]
    links: ClassVar[int] = 0

    def counts(self, inputs: Mapping[str, Any], number: int, T: int, P: int) -> list[int]:
        """Placeholders of every step of a video."""
        return [P] * T

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
        grids, counts, shapes = self.grids(inputs, prompt), [], []
        for i, (T, H, W) in enumerate(grids):
            n = self.side(inputs, i)
            shapes.append((H // n, W // n))
            counts.append(self.counts(inputs, i, T, shapes[i][0] * shapes[i][1]))
        steps = prompt.blocks(self.token, [n for video in counts for n in video], "step of a video")
        before, behind = self.around()
        found, rows = [], prompt.ids.tolist()
        for i, (h, w) in enumerate(shapes):
            mine, steps = steps[: len(counts[i])], steps[len(counts[i]) :]
            row = mine[0][0]
            units = [(start - len(before), stop + len(behind)) for _, start, stop in mine]
            fits = all(r == row for r, _, _ in mine)
            fits = fits and all(
                rows[row][max(a, 0) : start] == before and rows[row][stop:b] == behind
                for (a, b), (_, start, stop) in zip(units, mine)
            )
            text = f"compress: the steps of video {i} must stand in one row, the placeholders of each between"
            require(fits, f"{text} {before} and {behind}")
            start, link, texts = self._texts(rows[row], units)
            place = dict(texts=texts, link=link, grid=(h, w), frames_per_step=self.frames_per_step)
            found.append(TimedPlace(i, row, start, units[-1][1], len(mine), h * w, **place))
        return found

    @property
    def frames_per_step(self) -> int:
        return getattr(self.config.vision_config, "temporal_patch_size", 1)

    def seconds(self, inputs: Mapping[str, Any], place: TimedPlace) -> Tensor:
        """Of `video_metadata`; else what the prompt says, which a processor can read; else numbers of steps."""
        if inputs.get("video_metadata") is not None or self.processor is None or not all(place.texts):
            return super().seconds(inputs, place)
        texts = [self.processor.tokenizer.decode(x) for x in place.texts]
        matches = [self.said.fullmatch(x.strip()) for x in texts]
        text = f"compress: the prompt must say when each step of video {place.number} is, or seconds be given"
        require(all(matches), f"{text}; it says {texts}")
        return torch.tensor([float(x[1]) for x in matches], dtype=torch.float64)

    def block(self, place: TimedPlace, slots: Slots) -> list[int]:
        counts, seconds = self.told(place, slots)
        seconds = seconds.cpu()
        if self.processor is not None:
            text = self.written(place, counts, seconds.tolist())
            ids = list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
            text = "compress: the processor must write {} placeholders for {} slots; it is of another model"
            require(ids.count(self.token) == sum(counts), text.format(sum(counts), len(counts)))
            return ids
        ids, (before, behind) = [], self.around()
        for i, (count, near) in enumerate(zip(counts, (place.seconds - seconds[:, None]).abs().argmin(1).tolist())):
            ids += [*(place.link if i else ()), *place.texts[near], *before, *[self.token] * count, *behind]
        return ids

    def _texts(self, row: list[int], units: list[tuple[int, int]]) -> tuple[int, list[int], list[list[int]]]:
        """Where the text of the first step begins, what stands between a step and the next one's text, and the texts
        of all."""
        between = [row[a:b] for (_, a), (b, _) in zip(units, units[1:])]
        texts, n = [x[self.links :] for x in between], units[0][0]
        start = n - self._said_before(row[max(0, n - LONGEST) : n], texts)
        return start, between[0][: self.links] if between else [], [row[start:n], *texts]

    def _said_before(self, before: list[int], texts: list[list[int]]) -> int:
        """How many of the tokens before a first step say when it is."""
        for n in range(1, len(before) + 1):
            if self.processor is not None:
                fits = self.said.fullmatch(self.processor.tokenizer.decode(before[-n:]))
            else:  # it begins and ends like the others, and a later time is no shorter
                longest = max(map(len, texts), default=0)
                fits = n <= longest and {(x[0], x[-1]) for x in texts if x} == {(before[-n], before[-1])}
            if fits:
                return n
        text = "compress: the prompt must say when a video's first step is as it does of the others, beginning with"
        require(not any(texts), f"{text} a token of its own: let the video follow a special token or a space")
        return 0
