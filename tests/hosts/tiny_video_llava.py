import inspect

import torch
from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration, VideoLlavaModel

from tests.hosts.tiny import CLIP, IMAGE, TEXT, VIDEO, Image, Tiny


class VideoLlava(Tiny):
    kind = "video_llava"
    ragged = True
    square = False

    def build(self):
        config = VideoLlavaConfig(
            vision_config=CLIP, text_config=dict(model_type="llama", **TEXT), image_token_index=IMAGE,
            video_token_index=VIDEO, vision_feature_layer=-2, vision_feature_select_strategy="default",
        )  # fmt: skip
        return VideoLlavaForConditionalGeneration(config)

    def block(self, steps: int) -> list[int]:
        return [VIDEO] * (17 * steps)

    def picture(self) -> list[int]:
        return [IMAGE] * 16

    def image_pixels(self, images: list[Image]) -> dict:
        pixels = [torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i.seed)) for i in images]
        takes = inspect.signature(VideoLlavaModel.get_image_features).parameters
        return {"pixel_values" if "pixel_values" in takes else "pixel_values_images": torch.stack(pixels)}


ENTRY = VideoLlava()
