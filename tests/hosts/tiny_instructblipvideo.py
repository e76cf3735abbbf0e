import torch
from transformers import InstructBlipVideoConfig, InstructBlipVideoForConditionalGeneration

from tests.hosts.tiny import TEXT, VIDEO, Image, Tiny, Video

VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32,
              patch_size=8, initializer_range=0.02)  # fmt: skip
QFORMER = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


class InstructBlipVideo(Tiny):
    kind = "instructblipvideo"
    ragged = True
    square = False
    images = False
    embedded = True
    rows = [[Video(6, 1), 5, 7], [Video(3, 2), 8, 9, 10, 5, 5, 6], [Video(5, 3), 6]]

    def build(self):
        config = InstructBlipVideoConfig(
            vision_config=VISION, qformer_config=QFORMER, text_config=dict(model_type="llama", **TEXT),
            num_query_tokens=3, video_token_index=VIDEO,
        )  # fmt: skip
        return InstructBlipVideoForConditionalGeneration(config)

    def block(self, steps: int) -> list[int]:
        return [VIDEO] * (3 * steps)

    def pixels(self, videos: list[Video], images: list[Image]) -> dict:
        found = super().pixels(videos, images)
        if not found:
            return {}
        ids = torch.tensor([[11, 12 + v.seed, 13] for v in videos])
        mask = torch.tensor([[1, 1, v.seed % 2] for v in videos])
        return {"pixel_values": found["pixel_values_videos"], "qformer_input_ids": ids, "qformer_attention_mask": mask}


ENTRY = InstructBlipVideo()
