"""InstructBlipVideo: a Q-Former makes 32 tokens of each frame, and the prompt begins with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyvidx.hosts.language.host import Host, Place, Slots
from pyvidx.hosts.language.registry import register
from pyvidx.hosts.language.tokens import Prompt
from pyvidx.ops._library import require

WRITTEN = 4  # frames that the processor writes placeholders for, whatever it is given


@register("instructblipvideo")
class InstructBlipVideo(Host):
    """A slot has the queries of a frame. The prompt may hold placeholders for each frame, or for the four that the
    host's processor writes always.

    The host's generate encodes pixels in any case and takes no encoded video, so what it gets is embedded: the slots
    are in inputs_embeds, and pixel_values is one black patch whose features find no placeholder.
    """

    ragged = True
    pixels = ("pixel_values",)
    passed = ("qformer_input_ids", "qformer_attention_mask")
    embedded = True
    reads_prompt = True

    def videos(self, inputs: Mapping[str, Any], prompt: Prompt) -> list[Place]:
        clips, Q = self.clips(inputs), self.config.num_query_tokens
        counts = (prompt.ids == self.token).sum(1).tolist()
        if not len(clips):
            return prompt.blocks(self.token, [])
        fits = len(clips) == len(counts) and all(n in (len(c) * Q, WRITTEN * Q) for n, c in zip(counts, clips))
        require(
            fits,
            f"compress: input_ids must hold {Q} placeholders (token {self.token}) for each frame of a row's video, or "
            f"{WRITTEN * Q} as the processor writes, got {counts} for {[len(c) for c in clips]} frames",
        )
        text, mask = (inputs.get(name) for name in self.passed)
        fits = isinstance(text, Tensor) and text.dim() == 2 and len(text) == len(clips)
        require(fits, f"compress: inputs must hold qformer_input_ids [{len(clips)}, L] of the processor")
        fits = mask is None or (isinstance(mask, Tensor) and mask.shape == text.shape)
        require(fits, f"compress: qformer_attention_mask must be {list(text.shape)} as qformer_input_ids")
        blocks = prompt.blocks(self.token, counts)
        return [Place(i, *block, len(clip), Q) for i, (block, clip) in enumerate(zip(blocks, clips))]

    def encode(self, inputs: Mapping[str, Any], place: Place, start: int, stop: int) -> list[Tensor]:
        pixels = self.clips(inputs)[place.number][start:stop]
        mine = {name: inputs[name][place.row, None] for name in self.passed if inputs.get(name) is not None}
        found = self.own("get_video_features", inputs, pixel_values=pixels[None], **mine).pooler_output
        return [found[0].unflatten(0, (stop - start, -1))]

    def handed(
        self, inputs: Mapping[str, Any], new: dict[str, Tensor], places: Sequence[Place], slots: Sequence[Slots]
    ) -> dict[str, Any]:
        device, patch = self.model.device, self.config.vision_config.patch_size
        ids = new["input_ids"].to(device)
        video = ids == self.token
        embeds = self.model.get_input_embeddings()(ids)
        rows = torch.cat([s.rows[0] for s in slots]).to(embeds)
        # generate's penalties count ids, and no features may be put here again: those of slots become a prompt's first
        plain = getattr(self.config.text_config, "bos_token_id", None) or 0
        return {
            "inputs_embeds": embeds.masked_scatter(video[..., None], rows),
            "input_ids": ids.masked_fill(video, plain).to(new["input_ids"].device),
            "pixel_values": torch.zeros(len(ids), 1, 3, patch, patch, dtype=self.model.dtype, device=device),
            "interpolate_pos_encoding": True,
        }
