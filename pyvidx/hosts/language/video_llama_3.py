"""VideoLLaMA3: each step behind "Time <seconds>s:", and maybe without tokens that the processor found unchanged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyvidx.hosts.language.host import Place, Slots
from pyvidx.hosts.language.registry import register
from pyvidx.hosts.language.timed import Timed, TimedPlace
from pyvidx.hosts.language.tokens import Prompt
from pyvidx.ops._library import require


@register("video_llama_3")
class VideoLlama3(Timed):
    """The processor leaves out tokens that are like those of the frame before (video_compression_mask). That frame may
    be gone or in another slot, so slots show all positions, and may be more tokens than a still video had; a video that
    fits stays as the processor left it."""

    ragged = True
    pixels = ("pixel_values_videos", "video_compression_mask")
    said = re.compile(r"Time (\d+(?:\.\d+)?)s:")
    links = (1, 2)  # a comma; tokenizers may join it with "Time", or with a part of that

    def sides(self, inputs: Mapping[str, Any]) -> list[int]:
        sides, count = inputs.get("video_merge_sizes"), len(inputs["video_grid_thw"])
        fits = isinstance(sides, Tensor) and sides.shape == (count,) and not sides.is_floating_point()
        text = "compress: video_merge_sizes must be whole numbers [videos] beside video_grid_thw, at least 1"
        require(fits and bool((sides > 0).all()), text, sides)
        return sides.tolist()

    def counts(self, inputs: Mapping[str, Any], look: dict[str, Any]) -> list[int]:
        found = self._shown(inputs, look["number"]).view(look["steps"], -1).sum(1)
        text = "compress: video_compression_mask must leave a token of every step, got {} of video {}"
        require(bool(found.all()), text.format(found.tolist(), look["number"]))
        return found.tolist()

    def videos(self, inputs: Mapping[str, Any], prompt: Prompt) -> list[Place]:
        found = super().videos(inputs, prompt)
        return [replace(p, shown=self._shown(inputs, p.number).view(p.steps, p.positions)) for p in found]

    def video_features(self, place: TimedPlace, pixels: Tensor, grid: Tensor) -> Any:
        given = dict(video_grid_thw=grid, video_merge_sizes=torch.tensor([place.shape[0] // place.grid[0]]))
        return self.own("get_video_features", {}, pixel_values_videos=pixels, **given)

    def told(self, place: TimedPlace, slots: Slots) -> tuple[list[int], Tensor]:
        slots = self._as_shown(place, slots)
        if not slots.ragged:
            return super().told(place, slots)
        _, of, counts = slots.entry.unique(return_inverse=True, return_counts=True)
        sums = torch.zeros(len(counts), dtype=torch.float64, device=of.device).index_add(0, of, slots.seconds)
        return counts.tolist(), sums / counts

    def written(self, place: TimedPlace, counts: list[int], seconds: list[float]) -> str:
        from transformers.video_utils import VideoMetadata

        n, (h, w) = self.processor.video_processor.merge_size, place.grid
        mask = torch.arange(place.positions) < torch.tensor(counts)[:, None]
        about = VideoMetadata(total_num_frames=len(seconds), fps=1.0, frames_indices=seconds)
        made = {
            "video_grid_thw": torch.tensor([[len(seconds), h * n, w * n]]),
            "video_merge_sizes": torch.tensor([n]),
            "video_compression_mask": mask.flatten(),
            "video_metadata": [about],
        }
        return self.processor.replace_video_token(made, video_idx=0)

    def values(
        self, inputs: Mapping[str, Any], places: Sequence[Place], slots: Sequence[Slots]
    ) -> dict[str, Tensor | None]:
        if any(s.ragged for s in slots):
            return {"video_grid_thw": None, "video_merge_sizes": None}
        return super().values(inputs, places, slots)

    def encoded(self, inputs: Mapping[str, Any], places: Sequence[Place], slots: Sequence[Slots]) -> dict[str, Any]:
        return super().encoded(inputs, places, [self._as_shown(p, s) for p, s in zip(places, slots)])

    def sized(self, options: Mapping[str, Any], frames: int, clip: int) -> dict[str, Any]:
        size = options.get("size") or self.processor.video_processor.size
        longest = size["longest_edge"] // clip * frames  # pixels of a clip, in all; shortest_edge is of a frame
        return {"size": {"shortest_edge": size["shortest_edge"], "longest_edge": longest}}

    def _shown(self, inputs: Mapping[str, Any], number: int) -> Tensor:
        """bool [T * P] on the CPU, the tokens of one video that the prompt has."""
        counts = [n // side**2 for n, side in zip(inputs["video_grid_thw"].prod(1).tolist(), self.sides(inputs))]
        mask = inputs.get("video_compression_mask")
        if mask is None:
            return torch.ones(counts[number], dtype=torch.bool)
        fits = isinstance(mask, Tensor) and mask.shape == (sum(counts),)
        text = f"compress: video_compression_mask must be [{sum(counts)}], of all tokens of the videos' grids"
        require(fits, text, mask)
        return mask.bool().cpu().split(counts)[number]

    @staticmethod
    def _as_shown(place: TimedPlace, slots: Slots) -> Slots:
        """Slots of which each is one step of the video are what the prompt has of that."""
        if slots.ragged or len(slots) != place.steps or place.seconds is None or place.shown.all():
            return slots
        if not (torch.equal(slots.first.cpu(), place.seconds) and torch.equal(slots.last.cpu(), place.seconds)):
            return slots
        entry, position = place.shown.nonzero(as_tuple=True)
        at = [x.to(slots.seconds.device) for x in (entry, position)]
        times = (x[at[0]] for x in (slots.seconds, slots.first, slots.last))
        return Slots([x[at[0], at[1]] for x in slots.levels], *times, *at)
