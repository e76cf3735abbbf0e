"""Questions about a video, to a saved chat model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

from pyvidx.hosts.answers import check_one
from pyvidx.hosts.importing import LOCAL
from pyvidx.hosts.llava.processing import BTAdapterLlavaProcessor, even_midpoints
from pyvidx.hosts.llava.register import register
from pyvidx.hosts.llava.tower import BTAdapterVisionConfig
from pyvidx.preprocess import Frames, as_frames


class Chat:
    """A model and its processor.

    Args:
        model: LlavaForConditionalGeneration with BT-Adapter in its tower.
        processor: its processor, with a chat template.
    """

    def __init__(self, model: LlavaForConditionalGeneration, processor: BTAdapterLlavaProcessor):
        self.model, self.processor = model.eval(), processor

    def inputs(
        self, frames: Frames, question: str, history: Sequence[tuple[str, str]] = (), *, sample: bool = True
    ) -> dict[str, Any]:
        """What the model takes, on its device: input_ids, attention_mask, pixel_values.

        Args:
            frames: uint8 [T, H, W, 3], any T; what is taken of them is `sampled`.
            question: the newest one about the video.
            history: (question, answer) of those before.
            sample: False: take all frames, as where they were chosen by `sampled` already, which twice is not as once.

        Raises:
            ValueError: the frames or the question do not fit.
        """
        frames = as_frames(frames)
        if frames.dim() != 4 or not len(frames):
            raise ValueError(f"Chat: frames must be uint8 [T, H, W, 3], T > 0, got {tuple(frames.shape)}")
        turns = [turn for pair in history for turn in zip(("user", "assistant"), pair, strict=True)] + [
            ("user", question)
        ]
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        messages[0]["content"].append({"type": "video"})
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        found = self.processor(
            text=text, videos=[frames.permute(0, 3, 1, 2)], do_sample_frames=sample, return_tensors="pt"
        )
        return found.to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def answer(
        self,
        frames: Frames,
        question: str,
        seconds: Tensor | None = None,
        history: Sequence[tuple[str, str]] = (),
        *,
        sample: bool = True,
        **options: Any,
    ) -> str:
        """The answer in words.

        Args:
            frames, question, history, sample: see `inputs`.
            seconds: [T] of the frames; the model sees their order alone.
            options: of generate, over the model's own, which are those of the public evaluation: sampled, temperature
                0.2, up to 1024 tokens. One sequence comes back.

        Raises:
            ValueError: see `inputs`, or several sequences are asked for.
        """
        check_one("Chat", self.model, options)
        inputs = self.inputs(frames, question, history, sample=sample)
        found = self.model.generate(**inputs, **options)
        ids = getattr(found, "sequences", found)[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    @property
    def num_frames(self) -> int:
        """Taken of a video at most."""
        return self.processor.video_processor.num_frames

    def sampled(self, num_frames: int) -> Tensor:
        """Indices of the frames of a video that the model is shown, int64, ascending."""
        return even_midpoints(num_frames, self.num_frames)


def open(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
) -> Chat:
    """What `load` made and save_pretrained wrote, model and processor in one folder.

    Args:
        dtype: default that of the file.
        device: for all of it; default the CPU.
        device_map: of from_pretrained, in place of device.

    Raises:
        ValueError: the folder holds no such model, or lacks a parameter.
        OSError: there is no such folder, or a part of it is missing.
    """
    register()
    config = AutoConfig.from_pretrained(folder, **LOCAL)
    if not isinstance(getattr(config, "vision_config", None), BTAdapterVisionConfig):
        raise ValueError(f"llava: {folder} must hold a LLaVA with BT-Adapter in its tower, got a {config.model_type}")
    options = {**LOCAL, "dtype": dtype or "auto", "device_map": device_map, "output_loading_info": True}
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, config=config, **options)
    if missing := sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"])):
        raise ValueError(f"llava: {folder} must hold every parameter of its model, it lacks {', '.join(missing[:8])}")
    processor = AutoProcessor.from_pretrained(folder, **LOCAL)
    if not isinstance(processor, BTAdapterLlavaProcessor):
        raise ValueError(f"llava: {folder} must hold a BTAdapterLlavaProcessor, got {type(processor).__name__}")
    return Chat(model if device is None else model.to(device), processor)
