from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMModel

from tests.hosts.spelled import tokenizer
from tests.hosts.tiny import IMAGE, TEXT, Image, Tiny, Video

VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32,
              patch_size=4)  # fmt: skip
FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"
SHOWN = "<image>" * 4 + FAKE


class SmolVLM(Tiny):
    kind = "smolvlm"
    timeless = False
    ragged = not hasattr(SmolVLMModel, "inputs_merger")  # 5.20 has it
    needs = ("num2words",)
    # What compress uses of the host's; test_frames.py has the whole.
    processor = SimpleNamespace(
        tokenizer=tokenizer("<image>", "<video>", [FAKE, GLOBAL, "<row_1_col_1>"]),
        fake_image_token=FAKE,
        global_image_token=GLOBAL,
    )

    def build(self):
        text = dict(model_type="llama", **TEXT)
        config = SmolVLMConfig(vision_config=VISION, text_config=text, image_token_id=IMAGE, scale_factor=4)
        return SmolVLMForConditionalGeneration(config)

    def block(self, steps: int) -> list[int]:
        words = ["", "one", "two", "three", "four", "five", "six", "seven", "eight"][steps]
        text = f"You are provided the following series of {words} frames from a 0:00:0{steps} [H:MM:SS] video.\n"
        text += "".join(f"\nFrame from 00:{i:02d}:{FAKE}{GLOBAL}{SHOWN}" for i in range(steps))
        return self.processor.tokenizer.encode(text + "\n\n", add_special_tokens=False)

    def picture(self) -> list[int]:  # a piece and the whole
        text = f"{FAKE}<row_1_col_1>{'<image>' * 4}\n\n{FAKE}{GLOBAL}{SHOWN}"
        return self.processor.tokenizer.encode(text, add_special_tokens=False)

    def ordered(self, parts: list[Video | Image]) -> dict:
        seen: list[Tensor] = [self.frames(Video(2, 100 + p.seed) if isinstance(p, Image) else p) for p in parts]
        if not seen:
            return {}
        pixels = torch.nn.utils.rnn.pad_sequence(seen, batch_first=True)  # images of zeros are padding to the host
        return {"pixel_values": pixels, "pixel_attention_mask": torch.ones_like(pixels[:, :, 0], dtype=torch.int64)}


ENTRY = SmolVLM()
