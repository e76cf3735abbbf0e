"""LLaVA with BT-Adapter in its tower (arXiv:2309.15785, table 5), in transformers' own LlavaForConditionalGeneration.

From the published files, once; then from the folder, by us or by transformers alone:

    model, processor, report = load("LLaVA-Lightning-7B-v1-1", "sft_btadapter_weight.bin",
                                    clip="clip-vit-large-patch14", projector="sft_mm_projector.bin")
    model.save_pretrained("chat")
    processor.save_pretrained("chat")

    chat = open("chat", dtype=torch.float16, device="cuda")
    print(chat.answer(frames, "What is the person doing?"))                 # uint8 [T, H, W, 3], any T

    register()                                                              # then transformers knows the parts
    model = LlavaForConditionalGeneration.from_pretrained("chat")
    processor = AutoProcessor.from_pretrained("chat")

A video is one [T, 3, h, w] of pixel_values, and 257 tokens: the time averages of 256 patches, then the class token.
"""

from pyvidx.hosts.importing import importing

with importing("pyvidx.hosts.llava", "transformers"):
    import transformers  # noqa: F401
with importing("pyvidx.hosts.llava", "torchvision"):  # which transformers' video processors are made with
    import torchvision  # noqa: F401

from pyvidx.hosts.llava.chat import Chat, open
from pyvidx.hosts.llava.processing import BTAdapterLlavaProcessor, BTAdapterVideoProcessor
from pyvidx.hosts.llava.published import load
from pyvidx.hosts.llava.register import register
from pyvidx.hosts.llava.tower import BTAdapterVisionConfig, BTAdapterVisionModel

__all__ = [
    "BTAdapterLlavaProcessor",
    "BTAdapterVideoProcessor",
    "BTAdapterVisionConfig",
    "BTAdapterVisionModel",
    "Chat",
    "load",
    "open",
    "register",
]
