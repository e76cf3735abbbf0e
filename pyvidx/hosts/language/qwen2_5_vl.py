"""Qwen2.5-VL and Qwen2-VL: one block of placeholders per video, whose steps the model places in time itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyvidx.hosts.language.host import Place, Slots
from pyvidx.hosts.language.patches import Patches, PatchPlace
from pyvidx.hosts.language.registry import register
from pyvidx.hosts.language.tokens import Prompt
from pyvidx.ops._library import require

_ALONG = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")


@register("qwen2_vl")
class Qwen2VL(Patches):
    """The model counts steps and knows no seconds: to it, slots are steps. Ragged tokens and the text behind them
    keep the positions that they have in the whole video's prompt, in position_ids."""

    typed = True
    ragged = in_place = True

    def videos(self, inputs: Mapping[str, Any], prompt: Prompt) -> list[Place]:
        looks = self.looks(inputs, prompt)
        blocks = prompt.blocks(self.token, [look["steps"] * look["positions"] for look in looks])
        return [PatchPlace(row=row, start=a, stop=b, **look) for look, (row, a, b) in zip(looks, blocks)]

    def values(
        self, inputs: Mapping[str, Any], places: Sequence[Place], slots: Sequence[Slots]
    ) -> dict[str, Tensor | None]:
        return {} if slots[0].ragged else super().values(inputs, places, slots)

    def handed(
        self, inputs: Mapping[str, Any], new: dict[str, Tensor], places: Sequence[Place], slots: Sequence[Slots]
    ) -> dict[str, Any]:
        found = super().handed(inputs, new, places, slots)
        return found | ({"position_ids": self._in_place(inputs, new, places, slots)} if slots[0].ragged else {})

    def _in_place(
        self, inputs: Mapping[str, Any], new: dict[str, Tensor], places: Sequence[Place], slots: Sequence[Slots]
    ) -> Tensor:
        given = {name: x for name in (*_ALONG, "second_per_grid_ts") if (x := inputs.get(name)) is not None}
        was, _ = self.model.base_model.get_rope_index(**given)
        was = was.to(slots[0].seconds.device, non_blocking=was.is_cpu)
        long, short = Prompt.of(inputs), Prompt.of(new)
        before, after = long.seen.clone(), short.seen.clone()  # but for the videos
        found = was.new_ones(len(was), *short.ids.shape)
        for place, s, (row, start, stop) in zip(places, slots, short.blocks(self.token, [s.tokens for s in slots])):
            found[:, row, start:stop] = was[:, row, place.start + s.entry * place.positions + s.position]
            before[row, place.start : place.stop] = after[row, start:stop] = False
        row, to = after.nonzero(as_tuple=True)
        found[:, row, to] = was[:, row, before.nonzero(as_tuple=True)[1]]
        return found


@register("qwen2_5_vl")
class Qwen2_5_VL(Qwen2VL):
    """The model spaces the steps of a video evenly, by one number in second_per_grid_ts; slots are as far apart as what
    they hold. So there are position_ids, in which each slot stands at its middle second, counted from the first frame
    of the first slot and rounded down as the model does. For a program that makes positions anew, second_per_grid_ts
    is the mean space between the middles of slots: in their order, but off by up to the time from first to last.
    """

    def videos(self, inputs: Mapping[str, Any], prompt: Prompt) -> list[Place]:
        found = super().videos(inputs, prompt)
        if found:
            apart = self._apart(inputs)
            fits = apart.shape == (len(found),) and bool(((apart > 0) & apart.isfinite()).all())
            require(fits, f"compress: second_per_grid_ts must be positive, one for each of {len(found)} videos", apart)
        return found

    def seconds(self, inputs: Mapping[str, Any], place: Place) -> Tensor:
        """As the model has them: second_per_grid_ts apart, or 1 without it."""
        return torch.arange(place.steps, dtype=torch.float64) * self._apart(inputs)[place.number].double().cpu()

    def values(
        self, inputs: Mapping[str, Any], places: Sequence[Place], slots: Sequence[Slots]
    ) -> dict[str, Tensor | None]:
        if slots[0].ragged:
            return super().values(inputs, places, slots)
        apart = [
            (s.seconds.max() - s.seconds.min()) / (len(s) - 1) if len(s) > 1 else old
            for s, old in zip(slots, self._apart(inputs))
        ]
        apart = [x.to(slots[0].seconds.device, torch.float32, non_blocking=x.is_cpu) for x in apart]
        return super().values(inputs, places, slots) | {"second_per_grid_ts": torch.stack(apart)}

    def handed(
        self, inputs: Mapping[str, Any], new: dict[str, Tensor], places: Sequence[Place], slots: Sequence[Slots]
    ) -> dict[str, Any]:
        if slots[0].ragged:
            return super().handed(inputs, new, places, slots)
        given = {name: x for name in _ALONG if (x := new.get(name, inputs.get(name))) is not None}
        found, _ = self.model.base_model.get_rope_index(**given)
        found = found.to(slots[0].seconds.device, non_blocking=found.is_cpu)
        per_second, apart = self.config.vision_config.tokens_per_second, self._apart(inputs)
        blocks = Prompt.of(new).blocks(self.token, [s.tokens for s in slots])
        for place, s, (row, start, stop) in zip(places, slots, blocks):
            step = (s.seconds - s.first.min()) / apart[place.number].double()
            # In float32, as the model: then a slot of one step stands where that stood, to the last place.
            when = (step.float() * (per_second * apart[place.number])).long()
            found[0, row, start:stop] = found[1, row, start] + when.repeat_interleave(place.positions)
        return super().handed(inputs, new, places, slots) | {"position_ids": found}

    def _apart(self, inputs: Mapping[str, Any]) -> Tensor:
        """Seconds between the steps of each video, float32 [videos]."""
        given = inputs.get("second_per_grid_ts")
        return torch.ones(len(inputs["video_grid_thw"])) if given is None else torch.as_tensor(given).float()
