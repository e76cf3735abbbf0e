import torch
from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration

from tests.hosts.patched import H, Patched, W
from tests.hosts.tiny import IMAGE, TEXT, VIDEO, Image, Tiny, Video


class VideoLlama3(Patched):
    kind = "video_llama_3"
    ragged = True
    width = 3 * 4 * 4

    def build(self):
        vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, patch_size=4)
        text = dict(model_type="qwen2", **TEXT)
        config = VideoLlama3Config(text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO)
        return VideoLlama3ForConditionalGeneration(config)

    def pixels(self, videos: list[Video], images: list[Image]) -> dict:
        found = super().pixels(videos, images)
        if videos:
            found["video_merge_sizes"] = torch.tensor([2] * len(videos))
            found["video_compression_mask"] = torch.ones(len(found["pixel_values_videos"]) // 4, dtype=torch.bool)
        if images:
            found["image_merge_sizes"] = torch.tensor([1] * len(images))
        return found

    def block(self, steps: int) -> list[int]:
        """As of the processor, where 20 to 29 are digits, 30 and 31 begin and end a time, and 32 is a comma."""
        found = []
        for i in range(steps):
            found += [32] * (i > 0) + [30, *(20 + int(d) for d in str(i * 3)), 31] + [VIDEO] * (H * W // 4)
        return found

    def picture(self) -> list[int]:
        return [IMAGE] * 16

    def inputs(self, *rows, side: str = "left", types: bool = False) -> dict:
        return Tiny.inputs(self, *rows, side=side, types=types)


ENTRY = VideoLlama3()
