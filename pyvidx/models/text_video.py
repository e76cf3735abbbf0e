"""A video encoder with the text tower and the words it was trained with: clips and captions in one space."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvidx.backbones.text import TextConfig, TextTower
from pyvidx.backbones.words import Words
from pyvidx.layers.plain import held
from pyvidx.models import files
from pyvidx.models.bt_adapter import BTAdapter
from pyvidx.models.config import known
from pyvidx.models.video_encoder import VideoEncoder

DEFAULT = Path(__file__).parent / "motion.safetensors"
KIND = "text_video"
ENCODERS = {model.kind: model for model in (VideoEncoder, BTAdapter)}


@dataclass(frozen=True)
class TextVideo:
    """Both towers and the tokenizer between them.

    Attributes:
        model: of the videos.
        text: of the same embedding width.
        words: the tokenizer.
        about: where the weights are from: "command" that trains them, "frames" of its clips, "sha256" of the weights in
            the file (pyvidx.models.files.digest), and more.
    """

    model: VideoEncoder
    text: TextTower
    words: Words
    about: dict[str, Any]

    @torch.inference_mode()
    def similarity(self, pooled: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosines of video embeddings with captions.

        Args:
            pooled: [B, E], as `model` gives them.
            captions: texts of known words.

        Returns:
            float32 [B, captions].

        Raises:
            ValueError: a word is unknown, or pooled are no such embeddings.
        """
        E = self.text.config.embed_dim
        if pooled.dim() != 2 or pooled.shape[1] != E:
            raise ValueError(f"TextVideo: pooled must be [B, E = {E}], got {tuple(pooled.shape)}")
        ids = self.words(captions).to(held(self.text, "position").device)
        text = F.normalize(self.text(ids).float(), dim=-1)
        return F.normalize(pooled.to(text), dim=-1) @ text.T

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file of float16 weights, everything else in its header.

        Raises:
            RuntimeError: the model is a folded copy.
        """
        self.model.check_whole()
        both = nn.ModuleDict({"model": self.model, "text": self.text})
        weights = {name: p.detach().half() for name, p in both.state_dict().items()}
        header = {
            "encoder": {"model": self.model.kind, **self.model.header()},
            "text": dataclasses.asdict(self.text.config),
            "vocabulary": self.words.vocabulary,
            "about": self.about | {"sha256": files.digest(weights)},
        }
        return files.write(path, KIND, weights, header)

    @classmethod
    def load(cls, path: str | Path, *, compat: str | None = None, variant: str | None = None) -> "TextVideo":
        """What `save` wrote, in float32 and eval mode.

        compat, variant: of a BTAdapter, in place of those saved.

        Raises:
            FileNotFoundError, ValueError: see pyvidx.models.files.load; compat or variant is unknown, or given for
                another encoder.
        """
        changes = {name: value for name, value in {"compat": compat, "variant": variant}.items() if value is not None}

        def build(header: dict[str, Any]) -> nn.ModuleDict:
            words, about, encoder = header["vocabulary"], header["about"], header["encoder"]
            if not all(isinstance(word, str) for word in words) or not isinstance(about, dict):
                raise TypeError("vocabulary must be words, and about an object")
            if unknown := changes.keys() - encoder.keys():
                raise ValueError(f"a {encoder['model']} has no {' and '.join(sorted(unknown))} that could be changed")
            model = ENCODERS[encoder["model"]].built(encoder | changes)
            text = TextTower(TextConfig(**known(TextConfig, header["text"])))
            if len(Words(words, text.config.context)) > text.config.vocab:
                raise ValueError(f"vocabulary has more words than the {text.config.vocab} rows of the text tower")
            return nn.ModuleDict({"model": model, "text": text})

        both, header = files.load(path, KIND, build)
        model, text = both.float().values()
        model.tower.requires_grad_(False)
        model.is_random = False
        words = Words(header["vocabulary"], text.config.context)
        return cls(model, text.requires_grad_(False), words, header["about"])

    @classmethod
    def default(cls, *, compat: str | None = None, variant: str | None = None) -> "TextVideo":
        """The model that ships with pyvidx. It knows the small world of pyvidx.data.motion, and nothing else."""
        return cls.load(DEFAULT, compat=compat, variant=variant)
