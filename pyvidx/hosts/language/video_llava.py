"""Video-LLaVA: all patches of a frame after its class token."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pyvidx.hosts.language.host import Host, Place, Slots
from pyvidx.hosts.language.registry import register
from pyvidx.hosts.language.tokens import Prompt


@register("video_llava")
class VideoLlava(Host):
    ragged = True
    pictures = ("pixel_values", "pixel_values_images")  # the second in transformers before 5.23

    def videos(self, inputs: Mapping[str, Any], prompt: Prompt) -> list[Place]:
        vision = self.config.vision_config
        clips = self.clips(inputs, vision)
        P = (vision.image_size // vision.patch_size) ** 2 + 1
        blocks = prompt.blocks(self.token, [len(clip) * P for clip in clips])
        return [Place(i, *block, len(clip), P) for i, (block, clip) in enumerate(zip(blocks, clips))]

    def encode(self, inputs: Mapping[str, Any], place: Place, start: int, stop: int) -> list[Tensor]:
        pixels = self.clips(inputs)[place.number][start:stop]
        return [self.own("get_video_features", inputs, pixel_values_videos=pixels[None]).pooler_output]

    def images(self, inputs: Mapping[str, Any]) -> Any:
        pixels = next(inputs[name] for name in self.pictures if inputs.get(name) is not None)
        known = inspect.signature(self.model.base_model.get_image_features).parameters
        name = next(name for name in self.pictures if name in known)
        return self.own("get_image_features", {}, **{name: pixels})

    def features(self, slots: Sequence[Slots]) -> Any:
        return self.one_by_one([s.rows[0] for s in slots])
