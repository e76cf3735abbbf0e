"""PerceptionLM: frames pooled to squares of tokens, one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pyvidx.hosts.language.host import Host, Place, Slots
from pyvidx.hosts.language.registry import register
from pyvidx.hosts.language.tokens import Prompt


@register("perception_lm")
class PerceptionLM(Host):
    ragged = True

    def videos(self, inputs: Mapping[str, Any], prompt: Prompt) -> list[Place]:
        clips = self.clips(inputs)
        patch = self.model.base_model.vision_tower.timm_model.patch_embed.patch_size
        pool = self.config.projector_pooling_ratio
        grids = [tuple(n // p // pool for n, p in zip(clip.shape[-2:], patch)) for clip in clips]
        blocks = prompt.blocks(self.token, [len(clip) * h * w for clip, (h, w) in zip(clips, grids)])
        return [
            Place(i, *block, len(clip), h * w, (h, w))
            for i, (block, clip, (h, w)) in enumerate(zip(blocks, clips, grids))
        ]

    def encode(self, inputs: Mapping[str, Any], place: Place, start: int, stop: int) -> list[Tensor]:
        pixels = self.clips(inputs)[place.number][start:stop]
        return [self.own("get_image_features", inputs, pixel_values=pixels[None]).pooler_output]

    def features(self, slots: Sequence[Slots]) -> Any:
        return self.one_by_one([s.rows[0] for s in slots])
