"""LLaVA-OneVision: frames pooled to a quarter of their patches, one newline row after the last."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pyvidx.hosts.language.host import Host, Place, Slots
from pyvidx.hosts.language.registry import register
from pyvidx.hosts.language.tokens import Prompt


@register("llava_onevision")
class LlavaOnevision(Host):
    ragged = True

    def videos(self, inputs: Mapping[str, Any], prompt: Prompt) -> list[Place]:
        vision = self.config.vision_config
        clips = self.clips(inputs, vision)
        side = math.ceil(vision.image_size // vision.patch_size / 2)
        P = side * side
        blocks = prompt.blocks(self.token, [len(clip) * P + 1 for clip in clips])
        return [Place(i, *block, len(clip), P, (side, side)) for i, (block, clip) in enumerate(zip(blocks, clips))]

    def encode(self, inputs: Mapping[str, Any], place: Place, start: int, stop: int) -> list[Tensor]:
        pixels = self.clips(inputs)[place.number][start:stop]
        rows = self.own("get_video_features", inputs, pixel_values_videos=pixels[None]).pooler_output
        return [rows[0, :-1].unflatten(0, (stop - start, -1))]

    def block(self, place: Place, slots: Slots) -> list[int]:
        return [self.token] * (slots.tokens + 1)

    def features(self, slots: Sequence[Slots]) -> Any:
        newline = self.model.base_model.image_newline.to(slots[0].rows[0])[None]
        return self.one_by_one([x for s in slots for x in (s.rows[0], newline)])
