"""LLaVA-NeXT-Video: frames pooled in space before the projector. Its newline rows are of images alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyvidx.hosts.language.host import Host, Place
from pyvidx.hosts.language.registry import register
from pyvidx.hosts.language.tokens import Prompt


@register("llava_next_video")
class LlavaNextVideo(Host):
    ragged = True

    def videos(self, inputs: Mapping[str, Any], prompt: Prompt) -> list[Place]:
        vision = self.config.vision_config
        clips = self.clips(inputs, vision)
        side = vision.image_size // vision.patch_size // self.config.spatial_pool_stride
        P = side * side
        blocks = prompt.blocks(self.token, [len(clip) * P for clip in clips])
        return [Place(i, *block, len(clip), P, (side, side)) for i, (block, clip) in enumerate(zip(blocks, clips))]

    def encode(self, inputs: Mapping[str, Any], place: Place, start: int, stop: int) -> list[Tensor]:
        pixels = self.clips(inputs)[place.number][start:stop]
        rows = self.own("get_video_features", inputs, pixel_values_videos=pixels[None]).pooler_output
        return [rows[0].unflatten(0, (stop - start, -1))]
