"""Qwen2.5-VL and Qwen2-VL: one block of placeholders per video, whose positions in time are those of its seconds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyvidx.hosts.language.host import Place, Slots
from pyvidx.hosts.language.patches import Patches
from pyvidx.hosts.language.registry import register
from pyvidx.hosts.language.tokens import Prompt
from pyvidx.ops._library import require

ALONG = (
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
    "image_grid_thw",
    "video_grid_thw",
    "second_per_grid_ts",
)


@register("qwen2_5_vl", "qwen2_vl")
class Qwen2_5_VL(Patches):
    """The model spaces the steps of a video evenly, by one number of second_per_grid_ts. Slots are as far apart as what
    they hold, so they get `position_ids`, in which each stands at its middle second: floor of its middle step, counted
    from the first frame of the first slot, times the model's own interval. For a program that makes the positions anew
    there is second_per_grid_ts, the mean of the spaces between slots: right for the first and the last slot but for the
    time of the first's middle, and between those off by no more than the time from the first to the last.
    """

    typed = True

    def videos(self, inputs, prompt: Prompt) -> list[Place]:
        found, n = [], self.config.vision_config.temporal_patch_size
        grids = self.grids(inputs, prompt)
        if grids:
            apart = self._apart(inputs)
            fits = apart.shape == (len(grids),) and bool(((apart > 0) & apart.isfinite()).all())
            require(fits, f"compress: second_per_grid_ts must be positive, one for each of {len(grids)} videos", apart)
        sides = [self.side(inputs, i) for i in range(len(grids))]
        shapes = [(H // m, W // m) for (_, H, W), m in zip(grids, sides)]
        counts = [T * h * w for (T, _, _), (h, w) in zip(grids, shapes)]
        for i, (block, (T, _, _), (h, w)) in enumerate(zip(prompt.blocks(self.token, counts), grids, shapes)):
            found.append(Place(i, *block, T, h * w, (h, w), n))
        return found

    def seconds(self, inputs, place: Place) -> Tensor:
        """As the model has them: even, second_per_grid_ts apart; without it, and for Qwen2-VL, 1."""
        return torch.arange(place.steps, dtype=torch.float64) * self._apart(inputs)[place.number].double()

    def values(self, inputs, places: Sequence[Place], slots: Sequence[Slots]) -> dict[str, Tensor | None]:
        found = super().values(inputs, places, slots)
        if hasattr(self.config.vision_config, "tokens_per_second"):
            apart = self._apart(inputs)
            mean = [
                (s.seconds[-1] - s.seconds[0]) / (len(s) - 1) if len(s) > 1 else apart[i] for i, s in enumerate(slots)
            ]
            found["second_per_grid_ts"] = torch.stack([x.to(apart) for x in mean])
        return found

    def positions(self, inputs, new, places: Sequence[Place], slots: Sequence[Slots]) -> Tensor:
        given = {name: new[name] for name in ALONG if new.get(name) is not None}
        found, _ = self.model.base_model.get_rope_index(**given)
        per_second = getattr(self.config.vision_config, "tokens_per_second", 1)
        apart = self._apart(inputs).to(found.device)
        blocks = Prompt.of(new).blocks(self.token, [s.tokens for s in slots])
        for place, s, (row, start, stop) in zip(places, slots, blocks):
            one = apart[place.number]
            step = (s.seconds - s.first.min()).to(found.device) / one.double()
            # float32, as the model: a slot of one frame stands where the frame stood, to the last place
            when = (step.float() * (per_second * one)).long().repeat_interleave(place.positions)
            found[0, row, start:stop] = found[1, row, start] + when
        return found

    def _apart(self, inputs) -> Tensor:
        """Seconds between the steps of each video, float32 [videos]."""
        given = inputs.get("second_per_grid_ts")
        if given is None or not hasattr(self.config.vision_config, "tokens_per_second"):
            return torch.ones(len(inputs["video_grid_thw"]))
        return torch.as_tensor(given, dtype=torch.float32)
