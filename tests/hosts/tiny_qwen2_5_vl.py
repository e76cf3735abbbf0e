import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.hosts.patched import IDS, ROPE, VISION, Patched
from tests.hosts.tiny import TEXT, Image, Video


class Qwen2_5_VL(Patched):
    kind = "qwen2_5_vl"
    ragged = in_place = True

    def build(self):
        vision = VISION | dict(window_size=16, fullatt_block_indexes=[1], tokens_per_second=2)
        config = Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": ROPE}, vision_config=vision, **IDS)
        return Qwen2_5_VLForConditionalGeneration(config)

    def pixels(self, videos: list[Video], images: list[Image]) -> dict:
        times = {"second_per_grid_ts": torch.tensor([0.7 + 0.1 * v.seed for v in videos])} if videos else {}
        return super().pixels(videos, images) | times


ENTRY = Qwen2_5_VL()
