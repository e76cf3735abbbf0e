"""InternVL: a video is "Frame1: <img>...</img>", a line for each frame, an image is <img> and one or more tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pyvidx.hosts.language.frames import Framed, Frames, taken
from pyvidx.hosts.language.registry import register
from pyvidx.ops._library import require


@register("internvl")
class InternVL(Frames):
    """Slots are numbered as frames are: Frame1, Frame2, ... The prompt holds no times."""

    words = ("start_image_token", "end_image_token")

    def shown(self, inputs: Mapping[str, Any]) -> Sequence[int]:
        pixels = inputs["pixel_values"]
        fits = isinstance(pixels, Tensor) and pixels.dim() == 4
        require(fits, "compress: pixel_values must be [images, channels, h, w]", pixels)
        return range(len(pixels))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        ratio, (p, q) = self.config.downsample_ratio, self.config.vision_config.patch_size
        return int(height // p * ratio), int(width // q * ratio)

    def look(self, inputs: Mapping[str, Any], index: Sequence[int]) -> Tensor:
        return self.own("get_image_features", inputs, pixel_values=taken(inputs["pixel_values"], index)).pooler_output

    def begins(self, ids: list[int]) -> int | None:
        return len(ids) if self.read(ids).endswith(f"Frame1: {self.processor.start_image_token}") else None

    def follows(self, text: str, number: int) -> bool:
        return text == self._between(number)

    def texts(self, place: Framed, seconds: Tensor) -> list[str]:
        return ["", *(self._between(k) for k in range(1, len(seconds)))]

    def _between(self, number: int) -> str:
        """What stands between a frame of this number and the next."""
        return f"{self.processor.end_image_token}\nFrame{number + 1}: {self.processor.start_image_token}"
