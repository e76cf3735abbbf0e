import torch
from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

from tests.hosts.tiny import CLIP, IMAGE, TEXT, VIDEO, Image, Tiny


class LlavaNextVideo(Tiny):
    kind = "llava_next_video"
    ragged = True

    def build(self):
        config = LlavaNextVideoConfig(
            vision_config=CLIP, text_config=dict(model_type="llama", **TEXT), image_token_index=IMAGE,
            video_token_index=VIDEO, vision_feature_layer=-2, image_grid_pinpoints=[[32, 32], [32, 64]],
        )  # fmt: skip
        return LlavaNextVideoForConditionalGeneration(config)

    def block(self, steps: int) -> list[int]:
        return [VIDEO] * (4 * steps)

    def picture(self) -> list[int]:
        return [IMAGE] * (16 + 4 * 5)  # the base, and four rows with a newline each

    def image_pixels(self, images: list[Image]) -> dict:
        pixels = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(i.seed)) for i in images]
        return {"pixel_values": torch.stack(pixels), "image_sizes": torch.tensor([[32, 32]] * len(images))}


ENTRY = LlavaNextVideo()
