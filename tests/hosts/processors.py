"""The hosts' own processors around a made-up tokenizer of bytes; nothing is read from a network."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SIZES = dict(patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 64, "longest_edge": 64 * 256})
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def tokenizer():
    """Bytes are 0 to 255, SPECIAL from 256 on, then padding."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([*SPECIAL, "<|pad|>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", padding_side="left")


def processor(kind: str):
    """Of Qwen3-VL ("qwen3_vl"), Qwen2.5-VL or VideoLLaMA3."""
    import transformers as t

    image = t.Qwen2VLImageProcessor(**SIZES)
    if kind == "qwen2_5_vl":
        video = t.Qwen2VLVideoProcessor(**SIZES, cap_pixels_per_frame=False)
        return t.Qwen2_5_VLProcessor(image_processor=image, tokenizer=tokenizer(), video_processor=video)
    if kind == "qwen3_vl":
        video = t.Qwen3VLVideoProcessor(**SIZES, cap_pixels_per_frame=False)
        return t.Qwen3VLProcessor(image_processor=image, tokenizer=tokenizer(), video_processor=video)
    video = t.VideoLlama3VideoProcessor(**SIZES | {"temporal_patch_size": 1})
    image = t.VideoLlama3ImageProcessor(patch_size=4, merge_size=1, size=SIZES["size"])
    return t.VideoLlama3Processor(image_processor=image, tokenizer=tokenizer(), video_processor=video)


def ids() -> dict[str, int]:
    """For configurations of models."""
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return {name: 256 + i for i, name in enumerate(names)}


def video(frames: list[int], side: int = 16) -> torch.Tensor:
    """uint8 [T, 3, side, side]: one picture per number, noise; equal numbers are equal pictures."""
    made = {}
    for n in frames:
        g = torch.Generator().manual_seed(n)
        made[n] = torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=g)
    return torch.stack([made[n] for n in frames])


def processed(processor, text: list[str], videos, images=None, fps: float = 2.0, **more):
    """What the processor makes of videos that were taken at fps, all frames."""
    about = [dict(fps=fps, total_num_frames=len(v), frames_indices=list(range(len(v)))) for v in videos]
    given = dict(images=images) if images else {}
    return processor(
        text=text, videos=videos, video_metadata=about, do_sample_frames=False, padding=True, return_tensors="pt",
        **given, **more,
    )  # fmt: skip
