"""SmolVLM: a video is a sentence with its length, and "Frame from 00:01:" before each frame."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyvidx.hosts.language.frames import Framed, Frames, taken
from pyvidx.hosts.language.host import Place, Slots
from pyvidx.hosts.language.registry import register
from pyvidx.ops._library import require

TIME = r"\nFrame from (\d+):(\d\d):"
INTRO = re.compile(r"(You are provided the following series of )([a-z, -]+)( frames from a \S+ \[H:MM:SS\] video\.\n)")


@register("smolvlm")
class SmolVLM(Frames):
    """The texts say the slots' own seconds, in the host's whole seconds, and how many slots there are."""

    pixels = ("pixel_values", "pixel_attention_mask")
    words = ("fake_image_token", "global_image_token")

    def shown(self, inputs: Mapping[str, Any]) -> Sequence[int]:
        pixels = inputs["pixel_values"]
        rows = list(pixels) if isinstance(pixels, Tensor | list | tuple) else []
        fits = rows and all(isinstance(x, Tensor) and x.dim() == 4 and x.shape[1:] == rows[0].shape[1:] for x in rows)
        require(fits, "compress: pixel_values must be [rows, images, channels, h, w], or a list of rows")
        real = torch.cat([x.flatten(1).any(1) for x in rows])  # to the host, an image of zeros is padding
        return real.nonzero()[:, 0].tolist() or [0]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        side = self.config.vision_config.patch_size * self.config.scale_factor
        return height // side, width // side

    def look(self, inputs: Mapping[str, Any], index: Sequence[int]) -> Tensor:
        given = {name: inputs[name] for name in self.pixels if inputs.get(name) is not None}
        given = {name: x.flatten(0, 1) if isinstance(x, Tensor) else x for name, x in given.items()}
        given = {name: taken(x, index)[None] for name, x in given.items()}
        return self.own("get_image_features", inputs, **given).pooler_output[0].unflatten(0, (len(index), -1))

    def seconds(self, inputs: Mapping[str, Any], place: Framed) -> Tensor:
        known = self.metadata_seconds(inputs, place)
        if known is not None:
            return known
        said = [re.search(TIME, text).groups() for text in place.said]
        return torch.tensor([60.0 * int(m) + int(s) for m, s in said], dtype=torch.float64)

    def begins(self, ids: list[int]) -> int | None:
        time = re.compile(f"{TIME}{re.escape(self._after)}$")
        text = self.read(ids)
        if not time.search(text):
            return None
        whole = re.compile(INTRO.pattern + time.pattern)
        pattern = whole if whole.search(text) else time
        for start in reversed(range(len(ids))):  # where the tokenizer begins a token by itself
            text = self.read(ids[start:])
            if pattern.search(text) and self.write(text) == ids[start:]:
                return start
        raise ValueError("compress: the text before the frames of a video has other tokens by processor.tokenizer")

    def follows(self, text: str, number: int) -> bool:
        return (
            re.fullmatch(re.escape(self.processor.fake_image_token) + TIME + re.escape(self._after), text) is not None
        )

    def texts(self, place: Framed, seconds: Tensor) -> list[str]:
        times = [f"\nFrame from {int(s // 60):02d}:{int(s % 60):02d}:" for s in seconds.tolist()]
        first = place.said[0]
        if len(seconds) != place.steps:
            first = INTRO.sub(lambda m: m[1] + _words(len(seconds)) + m[3], first)
        first = re.sub(TIME, times[0], first)
        return [first, *(self.processor.fake_image_token + time + self._after for time in times[1:])]

    def encoded(self, inputs: Mapping[str, Any], places: Sequence[Place], slots: Sequence[Slots]) -> dict[str, Any]:
        if self._grouped:
            group, counts = self.config.vision_config.patch_size, (inputs["input_ids"] == self.token).sum(1).tolist()
            for place, s in zip(places, slots):
                counts[place.row] += s.tokens - place.steps * place.positions
            text = f"compress: this transformers takes smolvlm's image tokens in multiples of its patch_size {group}"
            text += f" in a prompt, they would hold {counts}: take another capacity, or a newer transformers"
            require(all(n % group == 0 for n in counts), text)
        return super().encoded(inputs, places, slots)

    @property
    def ragged(self) -> bool:
        return not self._grouped

    @property
    def _grouped(self) -> bool:
        """transformers 5.20 cuts the image tokens of a prompt in groups of patch_size, whatever an image has."""
        return hasattr(self.model.base_model, "inputs_merger")

    @property
    def _after(self) -> str:
        return self.processor.fake_image_token + self.processor.global_image_token


def _words(number: int) -> str:
    from num2words import num2words  # SmolVLM's processor, which has been given, needs it as well

    return num2words(number)
