import torch
from transformers import PerceptionLMConfig, PerceptionLMForConditionalGeneration

from tests.hosts.tiny import IMAGE, TEXT, VIDEO, Image, Tiny

VISION = dict(
    model_type="timm_wrapper",
    architecture="vit_pe_core_large_patch14_336",
    model_args=dict(
        embed_dim=32, img_size=[32, 32], patch_size=8, depth=2, num_heads=4, global_pool="",
        use_post_transformer_norm=False, init_values=0.1, ref_feat_shape=[4, 4],
    ),
)  # fmt: skip


class PerceptionLM(Tiny):
    kind = "perception_lm"
    ragged = True
    needs = ("timm",)

    def build(self):
        config = PerceptionLMConfig(
            vision_config=VISION, text_config=dict(model_type="llama", **TEXT), image_token_id=IMAGE,
            video_token_id=VIDEO, projector_pooling_ratio=2, vision_use_cls_token=True,
        )  # fmt: skip
        return PerceptionLMForConditionalGeneration(config)

    def block(self, steps: int) -> list[int]:
        return [VIDEO] * (4 * steps)

    def picture(self) -> list[int]:  # of two tiles
        return [IMAGE] * 8

    def image_pixels(self, images: list[Image]) -> dict:
        tiles = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(i.seed)) for i in images]
        return {"pixel_values": torch.stack(tiles)}


ENTRY = PerceptionLM()
