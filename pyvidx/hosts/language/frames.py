"""Hosts to whom the frames of a video are images, each with a text of its own before it in the prompt."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyvidx.hosts.language.host import Host, Place, Slots
from pyvidx.hosts.language.tokens import Prompt
from pyvidx.ops._library import require

_WINDOW = 256  # tokens before an image that are read for what it is


@dataclass(frozen=True)
class Framed(Place):
    """A video whose frames stand one by one in the prompt.

    Attributes:
        index: of each frame, among the images of the batch.
        gaps: token ids before the placeholders of each frame; of the first, from the start of the block.
        said: their texts.
        others: the images of the batch that are no frame.
    """

    index: Sequence[int] = ()
    gaps: Sequence[Sequence[int]] = ()
    said: Sequence[str] = ()
    others: Sequence[int] = ()


class Frames(Host):
    """A host with one placeholder for images and frames. The text before it tells which, so the processor is needed.

    Attributes:
        words: attributes of the host's processor that its frames' texts are made of.
    """

    ragged = True
    pixels = ("pixel_values",)
    words: ClassVar[tuple[str, ...]] = ()

    # What a host of this kind defines.

    def shown(self, inputs: Mapping[str, Any]) -> Sequence[int]:
        """Which of the pixels are an image, in the order of the prompts.

        Raises:
            ValueError: pixel_values has another shape than this host's.
        """
        raise NotImplementedError

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the tokens of an image of so many pixels."""
        raise NotImplementedError

    def look(self, inputs: Mapping[str, Any], index: Sequence[int]) -> Tensor:
        """Some of the images by the host's own encoder: [n, P, C]."""
        raise NotImplementedError

    def begins(self, ids: list[int]) -> int | None:
        """Where in the ids before an image the block of a video starts; None: the image is no first frame."""
        raise NotImplementedError

    def follows(self, text: str, number: int) -> bool:
        """Whether an image after `number` frames and this text is the next one."""
        raise NotImplementedError

    def texts(self, place: Framed, seconds: Tensor) -> list[str]:
        """What stands before the placeholders of each slot; of the first, from the start of the block. seconds: their
        times, which to read is to wait for the device."""
        raise NotImplementedError

    # What follows from it.

    @property
    def token(self) -> int:
        return self.config.image_token_id

    def videos(self, inputs: Mapping[str, Any], prompt: Prompt) -> list[Framed]:
        done = (inputs.get("mm_encoder_outputs") or {}).get("image") is not None
        require(not done, "compress: inputs hold encoded frames already (mm_encoder_outputs); give the processor's")
        pixels, runs = inputs.get("pixel_values"), _runs(prompt.ids, self.token)
        text = f"compress: input_ids hold {sum(b - a for _, a, b in runs)} placeholders of images (token {self.token})"
        if pixels is None or not len(pixels):
            require(not runs, f"{text} and the inputs no pixels of any: give what the processor made of videos=")
            return []
        images, (h, w) = self.shown(inputs), self.grid(*pixels[0].shape[-2:])
        P = h * w
        fits = P > 0 and all((b - a) % P == 0 for _, a, b in runs)
        fits = fits and sum(b - a for _, a, b in runs) == len(images) * P
        require(fits, f"{text}, the pixels ask for {P} in each of {len(images)} places")
        self._check_processor()
        clips, others, inside, at, last = [], [], False, 0, (-1, 0)
        for row, start, stop in runs:
            gap = prompt.ids[row, max(last[1] if last[0] == row else 0, start - _WINDOW) : start].tolist()
            clip, text = None, self.read(gap)
            if stop - start == P:  # an image in tiles is no frame
                if inside and last[0] == row and self.follows(text, len(clips[-1]["index"])):
                    clip = clips[-1]
                elif (begin := self.begins(gap)) is not None:
                    gap, text = gap[begin:], self.read(gap[begin:])
                    clip = dict(row=row, start=start - len(gap), index=[], gaps=[], said=[])
                    clips.append(clip)
            if inside := clip is not None:
                clip["stop"] = stop
                clip["index"].append(images[at])
                clip["gaps"].append(gap)
                clip["said"].append(text)
            tiles = (stop - start) // P
            if not inside:
                others += images[at : at + tiles]
            at, last = at + tiles, (row, stop)
        return [
            Framed(i, steps=len(clip["index"]), positions=P, grid=(h, w), others=others, **clip)
            for i, clip in enumerate(clips)
        ]

    def encode(self, inputs: Mapping[str, Any], place: Framed, start: int, stop: int) -> list[Tensor]:
        return [self.look(inputs, place.index[start:stop])]

    def block(self, place: Framed, slots: Slots) -> list[int]:
        known = dict(zip(place.said, place.gaps))
        if slots.ragged:  # one text before all tokens of an entry
            entry, index, n = slots.entry.unique(return_inverse=True, return_counts=True)
            seconds = torch.zeros_like(slots.seconds[: len(entry)]).index_add_(0, index, slots.seconds) / n
            counts = n.tolist()
        else:
            seconds, counts = slots.seconds, [slots.levels[0].shape[1]] * len(slots)
        found = []
        for text, n in zip(self.texts(place, seconds), counts):
            found += [*(known[text] if text in known else self.write(text)), *[self.token] * n]
        return found

    def encoded(self, inputs: Mapping[str, Any], places: Sequence[Framed], slots: Sequence[Slots]) -> dict[str, Any]:
        """All images in the order of the prompts, as the model takes either pixels or encoded images."""
        found, others = {place.index[0]: s.levels[0] for place, s in zip(places, slots)}, places[0].others
        found |= zip(others, self.look(inputs, others).split(1)) if others else {}
        found = [found[i] for i in sorted(found)]
        if any(x.shape[1:] != found[0].shape[1:] for x in found) or slots[0].ragged:  # then every item is a token
            found = [x.reshape(-1, 1, x.shape[-1]) for x in found]
        return {"image": self.output(torch.cat(found))}

    def read(self, ids: Sequence[int]) -> str:
        """The text of tokens, as it is."""
        return self.processor.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def write(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self.processor.tokenizer.encode(text, add_special_tokens=False)

    def _check_processor(self) -> None:
        name, given = self.config.model_type, type(self.processor).__name__
        require(
            all(hasattr(self.processor, word) for word in ("tokenizer", *self.words)),
            f"compress: {name} marks the frames of videos by texts of the prompt: give processor=, the model's own, "
            f"which reads them, got {given}",
        )


def taken(x: Tensor | Sequence[Tensor], index: Sequence[int]) -> Tensor:
    """Some of x, or of what is in the tensors of a list; of a tensor, those side by side are a view."""
    if not isinstance(x, Tensor):
        ends = list(accumulate(map(len, x)))
        parts = [bisect_right(ends, i) for i in index]
        return torch.stack([x[part][i - ends[part]] for part, i in zip(parts, index)])
    first, last = index[0], index[-1] + 1
    return x[first:last] if last - first == len(index) else x[list(index)]


def _runs(ids: Tensor, token: int) -> list[tuple[int, int, int]]:
    """Row, start and stop of placeholders that stand side by side, in the order of the prompts."""
    edges = torch.nn.functional.pad((ids == token).int(), (1, 1)).diff(dim=1)
    begins, ends = ((edges == sign).nonzero().tolist() for sign in (1, -1))
    return [(row, start, stop) for (row, start), (_, stop) in zip(begins, ends)]
