from types import SimpleNamespace

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from tests.hosts.spelled import tokenizer
from tests.hosts.tiny import IMAGE, TEXT, Image, Tiny, Video

VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=[32, 32],
              patch_size=[8, 8])  # fmt: skip


class InternVL(Tiny):
    kind = "internvl"
    ragged = True
    # What compress uses of the host's; test_frames.py has the whole.
    processor = SimpleNamespace(
        tokenizer=tokenizer("<IMG_CONTEXT>", "<video>", ["<img>", "</img>"]),
        start_image_token="<img>",
        end_image_token="</img>",
    )

    def build(self):
        config = InternVLConfig(
            vision_config=VISION, text_config=dict(model_type="qwen2", **TEXT), image_token_id=IMAGE, image_seq_length=4
        )
        return InternVLForConditionalGeneration(config)

    def block(self, steps: int) -> list[int]:
        frames = [f"Frame{i + 1}: <img>{'<IMG_CONTEXT>' * 4}</img>" for i in range(steps)]
        return self.processor.tokenizer.encode("\n".join(frames), add_special_tokens=False)

    def picture(self) -> list[int]:  # of two tiles
        return self.processor.tokenizer.encode(f"<img>{'<IMG_CONTEXT>' * 8}</img>", add_special_tokens=False)

    def ordered(self, parts: list[Video | Image]) -> dict:
        two = [self.frames(Video(2, 100 + p.seed) if isinstance(p, Image) else p) for p in parts]
        return {"pixel_values": torch.cat(two)} if two else {}


ENTRY = InternVL()
