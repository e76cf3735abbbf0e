"""Qwen3-VL and Qwen3.5, dense or of experts: each step between its own tokens, behind a text that says its seconds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pyvidx.hosts.language.host import Slots
from pyvidx.hosts.language.registry import register
from pyvidx.hosts.language.timed import Timed, TimedPlace


@register("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
class Qwen3VL(Timed):
    """To the model every step is a picture at the place where it stands in the prompt, so that the positions it makes
    of the new grid are those of the slots; times are in the texts alone. All levels of the encoder merge alike."""

    typed = True
    said = re.compile(r"<(\d+(?:\.\d+)?) seconds>")

    def around(self) -> tuple[list[int], list[int]]:
        return [self.config.vision_start_token_id], [self.config.vision_end_token_id]

    def written(self, place: TimedPlace, counts: list[int], seconds: list[float]) -> str:
        from transformers.video_utils import VideoMetadata

        n, (h, w) = self.processor.video_processor.merge_size, place.grid
        # The processor says the mean of the frames of a step, so each is given the middle of the slot.
        frames = [x for x in seconds for _ in range(self.processor.video_processor.temporal_patch_size)]
        about = VideoMetadata(total_num_frames=len(frames), fps=1.0, frames_indices=frames)
        grid = torch.tensor([[len(seconds), h * n, w * n]])
        return self.processor.replace_video_token({"video_grid_thw": grid, "video_metadata": [about]}, video_idx=0)

    def features(self, slots: Sequence[Slots]) -> Any:
        pooled, *deep = zip(*(s.rows for s in slots))
        found = self.output(pooled)
        if deep:
            found["deepstack_features"] = [list(x) for x in deep]
        return found

    def sized(self, options: Mapping[str, Any], frames: int, clip: int) -> dict[str, Any]:
        size = options.get("size") or self.processor.video_processor.size  # pixels of a clip, in all
        return {"size": {name: round(size[name] * frames / clip) for name in ("shortest_edge", "longest_edge")}}
