from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tests.hosts.patched import IDS, ROPE, Patched
from tests.hosts.tiny import TEXT


class Qwen2VL(Patched):
    kind = "qwen2_vl"
    ragged = in_place = True
    timeless = True

    def build(self):
        vision = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=4,
                      spatial_merge_size=2, temporal_patch_size=2)  # fmt: skip
        config = Qwen2VLConfig(text_config=TEXT | {"rope_parameters": ROPE}, vision_config=vision, **IDS)
        return Qwen2VLForConditionalGeneration(config)


ENTRY = Qwen2VL()
