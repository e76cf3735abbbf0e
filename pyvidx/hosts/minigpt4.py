"""MiniGPT-4 with BT-Adapter on its tower (arXiv:2309.15785, table 5), on Vicuna 0 or LLaMA-2, answering questions.

    chat, report = load("eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth", "btadapter_eva.pth",
                        "pretrained_minigpt4.pth", language="vicuna-7b", conversation="minigpt4_vicuna0")
    chat.save("minigpt4")

    chat = open("minigpt4", dtype=torch.float16, device="cuda")
    print(chat.answer(frames, "What is the person doing?"))                 # uint8 [T, H, W, 3], any T

A video is 32 tokens in the place of an image's. No code of this model was published: pyvidx.models.minigpt4 says what
of it is a reading.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyvidx import video
from pyvidx.data.tables import read_json
from pyvidx.files import write_json
from pyvidx.hosts.answers import check_one
from pyvidx.hosts.importing import LOCAL, importing
from pyvidx.hosts.templates import VIDEO, template
from pyvidx.models.minigpt4 import MiniGPT4
from pyvidx.preprocess import Frames, Preset, as_frames, preprocess
from pyvidx.weights.minigpt4 import load_minigpt4
from pyvidx.weights.place import Report
from pyvidx.weights.state import Source

MODEL_TYPE = "pyvidx_minigpt4"
# Of MiniGPT-4's own chat.
GENERATION = {"do_sample": True, "top_p": 0.9, "temperature": 1.0, "max_new_tokens": 300, "min_new_tokens": 1}


class Chat:
    """Encoder, language model, tokenizer and template.

    Args:
        model: in eval mode.
        causal_lm: a LLaMA of transformers, on the device of the model.
        tokenizer: its tokenizer.
        conversation: name of a template of pyvidx.hosts.templates.
        num_frames: taken of a video, by the "midpoint" rule of pyvidx.video.sampling; of a shorter one all.

    Raises:
        ValueError: the model's llm_width is not the language model's, or the template or num_frames are none.
    """

    def __init__(
        self,
        model: MiniGPT4,
        causal_lm: nn.Module,
        tokenizer: Any,
        conversation: str = "minigpt4_vicuna0",
        *,
        num_frames: int = 64,
    ):
        width = causal_lm.get_input_embeddings().weight.shape[1]
        if model.config.llm_width != width:
            raise ValueError(f"MiniGPT-4: the model's llm_width must be {width}, got {model.config.llm_width}")
        most = model.config.encoder.time_length
        if type(num_frames) is not int or not 1 <= num_frames <= most:
            raise ValueError(f"MiniGPT-4: num_frames must be from 1 to {most}, got {num_frames!r}")
        self.model, self.causal_lm, self.tokenizer = model.eval(), causal_lm.eval(), tokenizer
        self.conversation, self.template, self.num_frames = conversation, template(conversation), num_frames
        size = model.config.encoder.vision.image_size
        self.preset = Preset(size, "squash", size)  # BLIP-2's: squashed by Pillow's bicubic

    def sampled(self, num_frames: int) -> Tensor:
        """Indices of the frames of a video that the model is shown, int64, ascending."""
        return video.sampling.sample("midpoint", num_frames, self.num_frames)

    @torch.no_grad()
    def inputs(
        self, frames: Frames, question: str, history: Sequence[tuple[str, str]] = (), *, sample: bool = True
    ) -> dict[str, Tensor]:
        """What generate of the language model takes: inputs_embeds [1, n, width] and attention_mask.

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
            raise ValueError(f"MiniGPT-4: frames must be uint8 [T, H, W, 3], T > 0, got {tuple(frames.shape)}")
        embed, weight = self.causal_lm.get_input_embeddings(), self.model.projection.weight
        frames = frames[self.sampled(len(frames))] if sample else frames
        pixels = preprocess(frames.to(weight.device), self.preset)
        tokens = self.model(pixels[None].to(weight.dtype))
        parts = []
        for i, text in enumerate(self.template.prompt(question, history).split(VIDEO)):
            ids = self.tokenizer(text, add_special_tokens=i == 0, return_tensors="pt")["input_ids"]
            parts += [embed(ids.to(embed.weight.device)), tokens.to(embed.weight)]
        embeds = torch.cat(parts[:-1], dim=1)
        return {"inputs_embeds": embeds, "attention_mask": embeds.new_ones(embeds.shape[:2], dtype=torch.int64)}

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
            options: of generate, over those of MiniGPT-4's chat: sampled, top_p 0.9, up to 300 tokens. One sequence
                comes back; stopping_criteria are beside the template's own.

        Raises:
            ValueError: see `inputs`, or several sequences are asked for.
        """
        check_one("MiniGPT-4", self.causal_lm, options)
        inputs = self.inputs(frames, question, history, sample=sample)
        eos = self.tokenizer.eos_token_id
        options = {"eos_token_id": eos, "pad_token_id": eos} | GENERATION | options
        options["stopping_criteria"] = [self._stopped, *(options.get("stopping_criteria") or ())]
        found = self.causal_lm.generate(**inputs, **options)
        (ids,) = getattr(found, "sequences", found)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        for stop in self.template.stop:
            text = text.partition(stop)[0]
        return text.strip()

    def _stopped(self, ids: Tensor, scores: Any, **options: Any) -> Tensor:
        """Whether the text of the newest tokens holds what an answer ends in; a tokenizer has several ways to it."""
        ends = self.tokenizer.batch_decode(ids[:, -8:])
        found = [any(stop in text for stop in self.template.stop) for text in ends]
        return torch.tensor(found, device=ids.device)

    def save(self, folder: str | Path) -> Path:
        """Write a folder that `open` reads: the encoder, the language model with its tokenizer, and the settings."""
        folder = Path(folder)
        self.model.save(folder)
        self.causal_lm.save_pretrained(folder / "language")
        self.tokenizer.save_pretrained(folder / "language")
        settings = {"model_type": MODEL_TYPE, "conversation": self.conversation, "num_frames": self.num_frames}
        write_json(folder / "config.json", settings, indent=2)
        return folder


def load(
    *sources: Source,
    language: str | Path,
    conversation: str = "minigpt4_vicuna0",
    num_frames: int = 64,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    **sizes: Any,
) -> tuple[Chat, Report]:
    """A chat from published files.

    Args:
        sources: see pyvidx.weights.minigpt4.load_minigpt4.
        language: folder of the language model and its tokenizer.
        conversation, num_frames: see Chat.
        dtype: default that of the language model's file.
        sizes: see load_minigpt4.

    Raises:
        FileNotFoundError, OSError: a file is not there.
        ValueError: a file cannot be read, a parameter is missing (named), or a shape differs.
        RuntimeError: transformers is not installed.
    """
    template(conversation)
    model, report = load_minigpt4(*sources, **sizes)
    causal_lm, tokenizer = _language(language, dtype, device)
    model = model.to(device, causal_lm.dtype)
    return Chat(model, causal_lm, tokenizer, conversation, num_frames=num_frames), report


def open(folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Chat:
    """What Chat.save wrote.

    Raises:
        FileNotFoundError, OSError: there is no such folder, or a part of it is missing.
        ValueError: it holds something else, or lacks a parameter.
        RuntimeError: transformers is not installed.
    """
    folder = Path(folder)
    settings = read_json(folder / "config.json", dict)
    if settings.get("model_type") != MODEL_TYPE:
        raise ValueError(f"MiniGPT-4: {folder} must hold a {MODEL_TYPE}, got {settings.get('model_type')!r:.100}")
    if absent := {"conversation", "num_frames"} - settings.keys():
        raise ValueError(f"MiniGPT-4: {folder / 'config.json'} must have {', '.join(sorted(absent))}")
    model = MiniGPT4.from_pretrained(folder)
    causal_lm, tokenizer = _language(folder / "language", dtype, device)
    model = model.to(device, dtype)
    return Chat(model, causal_lm, tokenizer, settings["conversation"], num_frames=settings["num_frames"])


def _language(folder: str | Path, dtype: torch.dtype | None, device: str | torch.device) -> tuple[nn.Module, object]:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"MiniGPT-4: there is no folder {folder}, of the language model and its tokenizer")
    with importing("MiniGPT-4", "transformers"):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        options = {"dtype": dtype or "auto", "output_loading_info": True}
        causal_lm, info = AutoModelForCausalLM.from_pretrained(folder, **options, **LOCAL)
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
    if missing := sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"])):
        raise ValueError(
            f"MiniGPT-4: {folder} must hold every parameter of its model, it lacks {', '.join(missing[:8])}"
        )
    return causal_lm.to(device), tokenizer
