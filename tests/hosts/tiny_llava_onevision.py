import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from tests.hosts.tiny import IMAGE, TEXT, VIDEO, Image, Tiny

VISION = dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
              num_attention_heads=4, image_size=32, patch_size=8)  # fmt: skip


class LlavaOnevision(Tiny):
    kind = "llava_onevision"
    ragged = True

    def build(self):
        config = LlavaOnevisionConfig(
            vision_config=VISION, text_config=dict(model_type="qwen2", **TEXT), image_token_index=IMAGE,
            video_token_index=VIDEO, vision_feature_layer=-1, vision_feature_select_strategy="full",
            image_grid_pinpoints=[[32, 32], [32, 64]],
        )  # fmt: skip
        return LlavaOnevisionForConditionalGeneration(config)

    def block(self, steps: int) -> list[int]:
        return [VIDEO] * (4 * steps + 1)

    def picture(self) -> list[int]:
        return [IMAGE] * (16 + 4 * 5)  # the base, and four rows with a newline each

    def image_pixels(self, images: list[Image]) -> dict:
        pixels = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(i.seed)) for i in images]
        sizes = torch.tensor([[32, 32]] * len(images))
        return {
            "pixel_values": torch.stack(pixels),
            "image_sizes": sizes,
            "batch_num_images": torch.ones(len(images), dtype=torch.int64),
        }


ENTRY = LlavaOnevision()
