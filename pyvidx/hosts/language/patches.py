"""Hosts whose processors lay the patches of all videos in one list, with a grid (T, H, W) of each: Qwen and its kin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyvidx.hosts.language.host import Host, Place, Slots
from pyvidx.hosts.language.tokens import Prompt
from pyvidx.ops._library import require


@dataclass(frozen=True)
class PatchPlace(Place):
    shape: tuple[int, int] = (0, 0)  # (H, W) of a step in patches; `grid` is in tokens
    before: int = 0  # patches of the videos before


class Patches(Host):
    """pixel_values_videos [patches, width] and video_grid_thw [videos, 3], in patches. The encoder looks at one step at
    a time (its attention ends with a step), so that any chunk of steps gives the features of the whole."""

    passed = ("image_grid_thw", "video_grid_thw")
    typed: ClassVar[bool] = False  # positions are made of mm_token_type_ids

    def looks(self, inputs: Mapping[str, Any], prompt: Prompt) -> list[dict[str, Any]]:
        """What the inputs tell of each video's Place, but where it stands; [] if there are no pixels.

        Raises:
            ValueError: the grid is lost, or it does not fit the pixels; token types are lost, or do not fit the ids.
        """
        pixels, grid = inputs.get("pixel_values_videos"), inputs.get("video_grid_thw")
        if pixels is None:
            return []
        text = "compress: video_grid_thw must be whole numbers [videos, 3] beside pixel_values_videos"
        fits = isinstance(grid, Tensor) and grid.dim() == 2 and grid.shape[1] == 3 and not grid.is_floating_point()
        require(fits, text, grid)
        grids, found, count = grid.tolist(), [], 0
        for i, ((T, H, W), n) in enumerate(zip(grids, self.sides(inputs))):
            fits = min(T, H, W) > 0 and H % n == 0 and W % n == 0
            require(fits, f"compress: H and W of video_grid_thw must be multiples of {n}, got {(T, H, W)} of video {i}")
            look = dict(number=i, steps=T, positions=H * W // n**2, grid=(H // n, W // n), shape=(H, W), before=count)
            found.append(look | {"frames_per_step": getattr(self.config.vision_config, "temporal_patch_size", 1)})
            count += T * H * W
        text = "compress: pixel_values_videos must be [patches, width]"
        fits = isinstance(pixels, Tensor) and pixels.dim() == 2 and len(pixels) == count
        require(fits, f"{text}, {count} patches of the grids {grids} in video_grid_thw", pixels)
        if self.typed:
            self._check_types(inputs, prompt)
        return found

    def sides(self, inputs: Mapping[str, Any]) -> list[int]:
        """How many patches, along each side, are one token of each video."""
        return [self.config.vision_config.spatial_merge_size] * len(inputs["video_grid_thw"])

    def encode(self, inputs: Mapping[str, Any], place: PatchPlace, start: int, stop: int) -> list[Tensor]:
        H, W = place.shape
        pixels = inputs["pixel_values_videos"][place.before + start * H * W : place.before + stop * H * W]
        found = self.video_features(place, pixels, torch.tensor([[stop - start, H, W]]))
        levels = [found.pooler_output, *(getattr(found, "deepstack_features", None) or [])]
        return [x[0].unflatten(0, (stop - start, -1)) for x in levels]

    def video_features(self, place: PatchPlace, pixels: Tensor, grid: Tensor) -> Any:
        """The model's own get_video_features, of some steps of one video."""
        return self.own("get_video_features", {}, pixel_values_videos=pixels, video_grid_thw=grid)

    def values(
        self, inputs: Mapping[str, Any], places: Sequence[Place], slots: Sequence[Slots]
    ) -> dict[str, Tensor | None]:
        grid = inputs["video_grid_thw"].clone()
        for place, s in zip(places, slots):
            grid[place.number, 0] = len(s)
        return {"video_grid_thw": grid}

    def _check_types(self, inputs: Mapping[str, Any], prompt: Prompt) -> None:
        types = inputs.get("mm_token_type_ids")
        text = "compress: mm_token_type_ids must be there, as of the processor: without it positions are those of text"
        require(isinstance(types, Tensor), text)
        kinds = {1: self.config.image_token_id, 2: self.config.video_token_id}
        fits = types.shape == prompt.ids.shape
        types = types.cpu()
        fits = fits and all(torch.equal(types == kind, prompt.ids == token) for kind, token in kinds.items())
        text = "compress: mm_token_type_ids must be [B, L] as input_ids, 2 at videos' placeholders and 1 at images'"
        require(fits, text, types)
