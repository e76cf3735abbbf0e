"""Models for vLLM, see pyvidx.hosts.vllm_plugin. Importing this imports vLLM.

Run with 0.32 on a CPU, whose runner leaves pruning out (vLLM's own model fails there as well), with the runner's
is_multimodal_pruning_enabled set: by "evs" the first token is that of vLLM's own model, and with that one's provisional
positions all are. It was not run on a GPU; the code of vLLM 0.33 is the same here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptReplacement

from pyvidx.memory import PRUNERS, compute_retained_tokens_count, compute_retention_mask


class PrunedProcessor(Qwen2_5_VLMultiModalProcessor):
    """As many placeholders for a video as the pruner keeps of it."""

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        pruning = self.info.ctx.get_mm_config().get_video_pruning_spec()
        if pruning is None:
            return updates
        (method, q), config = pruning, self.info.get_hf_config()
        m = config.vision_config.spatial_merge_size

        def kept(index: int) -> list[int]:
            T, H, W = map(int, out_mm_kwargs["video"][index]["video_grid_thw"].data)
            count = compute_retained_tokens_count((H // m) * (W // m), T, q, method)
            return [config.video_token_id] * count

        own = PromptReplacement(modality="video", target=[config.video_token_id], replacement=kept)
        return [own if update.modality == "video" else update for update in updates]


@MULTIMODAL_REGISTRY.register_processor(
    PrunedProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class PyvidxQwen2_5_VLForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL whose videos are pruned by any method of pyvidx.memory.PRUNERS that vLLM's flag can name.

    Kept tokens stand where they stood: at the second of their step, as in a video that is not pruned (vLLM's own model
    cuts second_per_grid_ts down to whole seconds here, where it prunes).
    """

    supported_video_pruning_methods = tuple(PRUNERS)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
        """Where videos are pruned, positions up to the first one: recompute_mrope_positions makes all behind it anew.

        vLLM's own counts the tokens before pruning here. So it fails where another video or image follows, and places
        of tokens that were dropped, which lie behind the end of the prompt, move the answer further back.
        """
        if not self.is_multimodal_pruning_enabled:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        return torch.arange(len(input_tokens)).repeat(3, 1), 0

    def _postprocess_video_embeds_evs(
        self, video_embeds_split: Sequence[Tensor], video_input: Any
    ) -> tuple[Tensor, ...]:
        """vLLM's hook, for any method: the kept rows, with positions [t, h, w, columns] behind the channels."""
        method, q = self.multimodal_config.get_video_pruning_spec()
        vision = self.config.vision_config
        seconds = video_input.get("second_per_grid_ts")
        if seconds is None:
            raise ValueError(f"{method}: videos must have second_per_grid_ts where they are pruned")
        found = []
        for rows, grid, apart in zip(video_embeds_split, video_input["video_grid_thw"].tolist(), seconds.tolist()):
            mask = compute_retention_mask(rows, grid, vision.spatial_merge_size, q, method)
            where = _positions(grid, vision.spatial_merge_size, apart * vision.tokens_per_second)
            # float32: bfloat16 holds no odd place above 256. vLLM brings the rows to its own dtype as it merges them.
            found.append(torch.cat([rows.float(), where.to(rows.device, torch.float32)], 1)[mask])
        return tuple(found)


def _positions(grid: list[int], merge: int, per_step: float) -> Tensor:
    """[T * h * w, 4]: floor(per_step t), row, column of each token as if the video stood first, and w."""
    T, h, w = grid[0], grid[1] // merge, grid[2] // merge
    t = (torch.arange(T, dtype=torch.float64) * per_step).floor()
    axes = torch.meshgrid(t, torch.arange(h).double(), torch.arange(w).double(), indexing="ij")
    return torch.stack([*(x.flatten() for x in axes), torch.full((T * h * w,), float(w))], 1)
