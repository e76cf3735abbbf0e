from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.hosts.patched import IDS, ROPE, VISION, H, Patched, W
from tests.hosts.tiny import TEXT, VIDEO


class Qwen3VL(Patched):
    kind = "qwen3_vl"

    def build(self):
        rope = ROPE | dict(mrope_section=[2, 1, 1], mrope_interleaved=True)
        text = TEXT | dict(head_dim=8, num_hidden_layers=3, rope_parameters=rope)
        vision = VISION | dict(depth=3, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
        return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **IDS))

    def block(self, steps: int) -> list[int]:
        """As of the processor, where 20 to 29 are digits and 30, 31 begin and end a time."""
        found = [292]
        for i in range(steps):
            found += [30, *(20 + int(d) for d in str(i * 3)), 31, 292] + [VIDEO] * (H * W // 4) + [293]
        return found + [293]


ENTRY = Qwen3VL()
