"""MA-LMM's memory (arXiv:2404.05726) in the hosts it was made for, InstructBLIP and BLIP-2 of transformers, untrained.

    host = InstructBLIP.from_pretrained("instructblip-vicuna-7b")               # a folder of transformers
    host.answer(frames, "what is the person doing?")                             # uint8 [T, H, W, 3], any T

    session = host.session("what is the person doing?")                          # a stream, in constant memory
    for clip in pyvidx.video.stream("day.mp4", fps=1):
        session.push(clip.frames, clip.seconds)
    session.ask()                                                                # at any time, any number of times

Where the answer is the host's own, and where MA-LMM differs by design:

    one frame                   the host's own answer about an image, whatever the memory: there is nothing to remember
    capacity=0                  the host's own form for several frames, T * Q tokens (InstructBlipVideo, whose processor
                                writes them for 4 frames; here any T)
    two frames or more          Q tokens whatever T is: those of the newest frame, whose attentions have read the
                                memories. So also where T <= capacity: nothing is merged yet, but frames are read
                                together, which the host never does.

`answer` and `ask` generate as MA-LMM's code does, with its beams and its penalty on what the answer repeats. The hosts'
own `generate` penalizes the question's words, too; `inputs` is for that one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyvidx.hosts import huggingface
from pyvidx.hosts.blip_session import BlipSession
from pyvidx.hosts.importing import LOCAL, importing
from pyvidx.hosts.settings import SQUASHED, model_type, preset_of
from pyvidx.memory import Policy
from pyvidx.models.language import IGNORED, Language
from pyvidx.models.malmm import MALMM
from pyvidx.preprocess import Frames, Preset, as_frames, as_preset

MODELS = {
    "blip-2": "Blip2ForConditionalGeneration",
    "instructblip": "InstructBlipForConditionalGeneration",
    "instructblipvideo": "InstructBlipVideoForConditionalGeneration",
}
TEXT = ("qformer_input_ids", "qformer_attention_mask")


class InstructBLIP:
    """Frame encoder, Q-Former with memories, projector, language model and tokenizers of one host.

    Args:
        model: MA-LMM's part, e.g. of pyvidx.hosts.huggingface.malmm or MALMM.from_pretrained; in eval mode.
        language: the language model with its tokenizers, on the same device.
        preset: how frames become pixels; its size is the model's.
        token_id: of the placeholders in the host's own input_ids, and
        clips: whether its own pixel_values have an axis of frames: both for `inputs`.

    Raises:
        ValueError: the two do not fit together.
    """

    def __init__(
        self,
        model: MALMM,
        language: Language,
        *,
        preset: str | Preset = SQUASHED,
        token_id: int | None = None,
        clips: bool = False,
    ):
        width, reads = model.config.llm_width, model.config.qformer.vocab is not None
        if width != language.width:
            raise ValueError(f"InstructBLIP: the model's llm_width must be {language.width}, got {width}")
        if reads and language.text_tokenizer is None:
            raise ValueError("InstructBLIP: the Q-Former reads the question: language must have a text_tokenizer")
        size = model.config.vision.image_size
        self.model, self.language, self.token_id, self.clips = model, language, token_id, clips
        self.preset = replace(as_preset(preset), size=size, crop=size)
        self.reads_text = reads

    @classmethod
    def of(
        cls,
        host: nn.Module,
        tokenizer: Any,
        text_tokenizer: Any = None,
        *,
        preset: str | Preset = SQUASHED,
        compat: str = "official",
        **options: Any,
    ) -> "InstructBLIP":
        """From a transformers model, whose encoder, Q-Former and projector are copied and whose language model is kept.

        Args:
            host: Blip2-, InstructBlip- or InstructBlipVideoForConditionalGeneration.
            tokenizer, text_tokenizer: its tokenizer, and the Q-Former's; BLIP-2's Q-Former reads no text.
            compat: see MALMM.
            options: of Language (bos, max_text).

        Raises:
            ValueError: it is none of these, or they do not fit.
        """
        if type(host).__name__ not in MODELS.values():
            raise ValueError(
                f"InstructBLIP: host must be one of {', '.join(MODELS.values())}, got {type(host).__name__}"
            )
        model = huggingface.malmm(host, compat=compat)
        language = Language(host.language_model, tokenizer, text_tokenizer if _reads(model) else None, **options)
        names = ("video_token_id", "image_token_id", "video_token_index", "image_token_index")
        ids = [getattr(host.config, name, None) for name in names]
        token_id = next((i for i in ids if i is not None), None)
        return cls(
            model, language, preset=preset, token_id=token_id, clips=type(host).__name__ == MODELS["instructblipvideo"]
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str = "auto",
        **options: Any,
    ) -> "InstructBLIP":
        """From a folder that transformers' save_pretrained of model and processor wrote; nothing is downloaded.

        Args:
            dtype: of the weights; "auto": as saved.
            options: of `of`.

        Raises:
            FileNotFoundError: there is no such folder, or it has no config.json.
            ValueError: it holds another model.
            RuntimeError: transformers is not installed.
        """
        folder = Path(folder)
        kind = model_type(folder)
        if kind not in MODELS:
            raise ValueError(f"InstructBLIP: {folder} must hold one of {', '.join(MODELS)}, it holds {kind!r:.100}")
        with importing("InstructBLIP", "transformers"):
            import transformers

            host = getattr(transformers, MODELS[kind]).from_pretrained(folder, dtype=dtype, **LOCAL).eval()
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **LOCAL)
            text = folder / "qformer_tokenizer"
            text = transformers.AutoTokenizer.from_pretrained(text, **LOCAL) if text.is_dir() else None
        return cls.of(host, tokenizer, text, **{"preset": preset_of(folder)} | options).to(device)

    def to(self, device: str | torch.device) -> "InstructBLIP":
        """Both models moved there, in place."""
        self.model, self.language = self.model.to(device), self.language.to(device)
        return self

    def session(
        self,
        questions: str | Sequence[str] | None = None,
        *,
        capacity: int = 20,
        visual: bool = True,
        query: bool = True,
        policy: Policy | None = None,
    ) -> BlipSession:
        """A new stream.

        Args:
            questions: what will be asked. A Q-Former that reads the question (InstructBLIP) fills the query bank with
                what it makes of it, so it must be known at the start; with query=False, and with BLIP-2, any question
                may be asked at any time.
            capacity: M, entries of each bank; 0: no memory, every frame by itself, which grows with the video.
            visual, query: have that bank.
            policy: of pyvidx.memory, in place of MA-LMM's memories: what of the Q tokens of every frame by itself goes
                to the language model, as pyvidx.hosts.compress does it for InstructBlipVideo.

        Raises:
            ValueError: questions are needed and not given, or an option is out of range.
        """
        return BlipSession(self, questions, capacity, visual, query, policy)

    def answer(
        self,
        frames: Frames,
        question: str,
        *,
        capacity: int = 20,
        visual: bool = True,
        query: bool = True,
        policy: Policy | None = None,
        **options: Any,
    ) -> str:
        """A question about a clip of any number of frames, answered in words.

        A temporal table (of a fine-tuned MA-LMM) bounds that number, unless compat is "paper"; see MALMM.

        Args:
            frames: uint8 [T, H, W, 3], or what else pyvidx.preprocess takes.
            capacity, visual, query, policy: see `session`.
            options: of Language.generate.

        Raises:
            ValueError: frames or options do not fit.
        """
        session = self.session(question, capacity=capacity, visual=visual, query=query, policy=policy)
        frames = as_frames(frames)
        frames = frames[None] if frames.dim() == 3 else frames
        rows, T, positions = self.model.config.time_length, len(frames), None
        if rows and T > rows and self.model.compat == "paper" and session.policy is None:
            positions = torch.linspace(0, rows - 1, T)
        session.push(frames, positions=positions)
        return session.ask(question, **options)

    @torch.no_grad()
    def inputs(
        self, inputs: Mapping[str, Any], *, capacity: int = 20, visual: bool = True, query: bool = True
    ) -> dict[str, Any]:
        """What the host's own processor made, with the video as MA-LMM's tokens, for the host's own model.

            inputs = processor(images=frames, text=question, return_tensors="pt")
            model.generate(**host.inputs(inputs, capacity=20))

        The host insists on pixels and lets nobody in behind its Q-Former: it is given the embeddings of the whole
        prompt, and of the pixels one black patch, whose tokens find no place. input_ids stay beside them, with bos for
        the video, so that what InstructBLIP generates begins with the prompt, and penalties count its words, as ever.
        BLIP-2's forward would take the ids for the prompt, so they are left out: it generates the answer alone.

        Args:
            inputs: pixel_values [B, T, 3, h, w], or [T, 3, h, w] of one prompt, or [B, 3, h, w]; input_ids with the
                placeholders in one block, attention_mask; with InstructBLIP qformer_input_ids. labels may be there.
            capacity, visual, query: see `session`.

        Returns:
            inputs_embeds [B, L, width], attention_mask [B, L] and the rest, for generate, and with InstructBLIP also
            for a forward (BLIP-2's own takes no embeddings).

        Raises:
            ValueError: there are no placeholders or no pixels, or they do not fit together.
        """
        ids, pixels = inputs.get("input_ids"), inputs.get("pixel_values")
        if ids is None or pixels is None:
            raise ValueError(f"InstructBLIP: inputs must have input_ids and pixel_values, got {', '.join(inputs)}")
        for name in ("input_ids", "pixel_values", "attention_mask", "labels", *TEXT):
            if not isinstance(x := inputs.get(name), Tensor | None):
                raise ValueError(
                    f"InstructBLIP: {name} must be a tensor, as of a processor with return_tensors='pt', got "
                    f"{type(x).__name__}"
                )
        if self.reads_text and inputs.get("qformer_input_ids") is None:
            raise ValueError("InstructBLIP: inputs must have qformer_input_ids, the question as the Q-Former reads it")
        clip = pixels
        if pixels.dim() == 4:
            clip = pixels[None] if len(ids) == 1 else pixels[:, None]
        if clip.dim() != 5 or len(clip) != len(ids):
            raise ValueError(
                f"InstructBLIP: pixel_values must be videos of {len(ids)} prompts, got {tuple(pixels.shape)}"
            )
        places = ids == self.token_id
        counts = places.sum(1)
        count = int(counts[0])
        starts = places.int().argmax(1)
        block = torch.arange(ids.shape[1], device=ids.device) - starts[:, None]
        if not count or bool((counts != count).any()) or not torch.equal(places, (block >= 0) & (block < count)):
            raise ValueError(
                f"InstructBLIP: input_ids must have one block of placeholders {self.token_id} in every row, equally "
                f"long in all, got {counts.tolist()}"
            )
        text = [inputs[name] for name in TEXT if inputs.get(name) is not None]
        weight = self.model.qformer.query_tokens
        clip = clip.to(weight.device, weight.dtype)
        tokens = self.model(clip, *text, length=capacity, visual=visual, query=query)
        embed = self.language.causal_lm.get_input_embeddings()
        mask = inputs.get("attention_mask")
        found = {name: inputs[name] for name in inputs if name not in ("input_ids", "pixel_values", "labels")}
        patch, video = self.model.config.vision.patch_size, (1,) if self.clips else ()
        found["pixel_values"] = clip.new_zeros(len(clip), *video, 3, patch, patch)
        found["interpolate_pos_encoding"] = True
        found["inputs_embeds"] = _in_place(embed(ids), tokens.to(embed.weight.dtype), starts, count)
        if self.reads_text:
            plain = ids.new_full(tokens.shape[:2], self.language.tokenizer.bos_token_id or 0)
            found["input_ids"] = _in_place(ids, plain, starts, count)
        mask = torch.ones_like(ids) if mask is None else mask
        found["attention_mask"] = _in_place(mask, mask.new_ones(tokens.shape[:2]), starts, count)
        if (labels := inputs.get("labels")) is not None:
            found["labels"] = _in_place(labels, labels.new_full(tokens.shape[:2], IGNORED), starts, count)
        return found


def _reads(model: MALMM) -> bool:
    return model.config.qformer.vocab is not None


def _in_place(rows: Tensor, new: Tensor, starts: Tensor, count: int) -> Tensor:
    """rows [B, L, ...] with `new` [B, n, ...] in place of `count` of them from `starts` [B] on."""
    parts = [torch.cat([row[:s], x, row[s + count :]]) for row, x, s in zip(rows, new, starts.tolist())]
    return torch.stack(parts)
