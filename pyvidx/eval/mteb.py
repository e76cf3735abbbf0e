"""pyvidx's encoders in mteb (2.26 and newer, which has video): rank them on its tasks, or on your own.

model = pyvidx.eval.mteb.encoder()                                    # the TextVideo that ships with pyvidx
model = pyvidx.eval.mteb.encoder("pretrain_btadapter_weight.pth", tokenizer="open_clip")
mteb.evaluate(model, mteb.get_tasks(["MSVDT2VRetrieval"]))
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyvidx.backbones.text import TextTower
from pyvidx.corpus.encode import sized
from pyvidx.device import usable
from pyvidx.eval.text import Tokenizer, load_tokenizer, token_ids
from pyvidx.hosts.importing import importing
from pyvidx.hosts.open import Source, open_model, open_text
from pyvidx.models import TextVideo, VideoEncoder, files
from pyvidx.models.text_video import KIND
from pyvidx.preprocess import Preset, preprocess
from pyvidx.video import sampling


class Encoder:
    """What mteb calls an encoder: videos, texts, or both of a row, to unit vectors in one space.

    Nothing of mteb is imported but for its ModelMeta, when it asks for that. Prompts of tasks are left out: towers of
    CLIP's kind were trained on captions alone.

    Args:
        model: any video encoder of pyvidx.
        text: the tower beside it, and
        tokens: texts to its ids [n, L]. Both None: videos only.
        name: of the results, "organization/name".
        frames, sampler: of a video, see pyvidx.video.sampling.
        preset: see pyvidx.preprocess; its crop is set to the model's image size.
        about: what else the results depend on, e.g. the temporal module; kept with them by mteb.

    Raises:
        ValueError: only one of text and tokens is given, their widths differ, the preset or the sampler is unknown.
    """

    def __init__(
        self,
        model: VideoEncoder,
        text: TextTower | None = None,
        tokens: Callable[[Sequence[str]], Tensor] | None = None,
        *,
        name: str,
        frames: int = 8,
        sampler: str = "uniform",
        preset: str | Preset = "clip",
        about: dict[str, Any] | None = None,
    ):
        if (text is None) != (tokens is None):
            raise ValueError("mteb: text and tokens must be given together, got one of them")
        if text is not None and text.config.embed_dim != model.tower.config.embed_dim:
            E, of_text = model.tower.config.embed_dim, text.config.embed_dim
            raise ValueError(f"mteb: texts and videos must share one space, got widths {of_text} and {E}")
        sampling.sample(sampler, frames, frames, fps=25.0, generator=torch.Generator())  # refuses what is unknown
        self.model, self.text, self.tokens, self.name = model, text, tokens, name
        self.frames, self.sampler, self.preset = frames, sampler, sized(preset, model)
        self._about = {"frames": frames, "sampler": sampler, **(about or {})}

    @torch.inference_mode()
    def encode(self, inputs, *, task_metadata=None, hf_split=None, hf_subset=None, prompt_type=None, **_) -> Tensor:
        """The embeddings of a loader's rows.

        Args:
            inputs: a DataLoader of rows with "video" (a decoder as torchcodec's, or a tensor or array of frames, uint8
                [T, 3, H, W]) or "text" or both, whose two unit vectors are then added.
            others: mteb's, unused.

        Returns:
            float32 [rows, E] on the CPU, of length 1.

        Raises:
            ValueError: a row has neither, has a text where there is no text tower, or a video without frames.
        """
        collate, inputs.collate_fn = inputs.collate_fn, self._collate
        try:
            return torch.cat([self._batch(batch) for batch in inputs]).cpu()
        finally:
            inputs.collate_fn = collate

    def _collate(self, rows: list[dict]) -> dict[str, list]:
        """In the loader's own processes, so that only the frames that are looked at are handed over."""
        found = {}
        for key in ("text", "video"):
            values = [row[key] for row in rows if row.get(key) is not None]
            if len(values) not in (0, len(rows)):
                raise ValueError(f"mteb: all rows of a batch must have a {key}, or none, got {len(values)}")
            if values:
                found[key] = values
        if "video" in found:
            found["video"] = [self._frames(video) for video in found["video"]]
        return found

    def _frames(self, video) -> Tensor:
        video = torch.from_numpy(video) if isinstance(video, np.ndarray) else video
        N = len(video) if isinstance(video, Tensor) else video.metadata.num_frames
        fps = 0.0 if isinstance(video, Tensor) else video.metadata.average_fps or 0.0
        if not N:
            raise ValueError("mteb: a video must have frames, got none")
        # Rules that draw begin anew with each video: the same frames however rows are batched.
        indices = sampling.sample(self.sampler, N, self.frames, fps, torch.Generator().manual_seed(0))
        chosen = video[indices] if isinstance(video, Tensor) else video.get_frames_at(indices.tolist()).data
        return preprocess(chosen.movedim(-3, -1), self.preset)

    def _batch(self, batch: dict[str, list]) -> Tensor:
        parts = []
        if "text" in batch:
            if self.text is None:
                raise ValueError(f"mteb: a task with texts needs a text tower, {self.name} has none: give text=")
            ids = self.tokens(batch["text"]).to(self.text.position.device)
            parts.append(F.normalize(self.text(ids).float(), dim=-1))
        if "video" in batch:
            parts.append(F.normalize(self._videos(batch["video"]).float(), dim=-1))
        if not parts:
            raise ValueError("mteb: rows must have a text or a video, got neither")
        return F.normalize(sum(parts), dim=-1)

    def _videos(self, clips: list[Tensor]) -> Tensor:
        weight = next(self.model.parameters())
        T = max(len(clip) for clip in clips)  # rules may give fewer frames of a short video
        pixels = torch.stack([F.pad(clip, (0,) * 7 + (T - len(clip),)) for clip in clips]).to(weight)
        real = torch.arange(T) < torch.tensor([[len(clip)] for clip in clips])
        mask = None if real.all() else real.to(weight.device)
        return self.model(pixels, outputs=["pooled"], frame_mask=mask).pooled

    def similarity(self, embeddings1, embeddings2) -> Tensor:
        """Cosines [n, m] of [n, E] and [m, E]."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1, embeddings2) -> Tensor:
        """Cosines [n] of the rows of [n, E] and [n, E]."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(-1)

    @cached_property
    def mteb_model_meta(self):
        """mteb's description. Its revision is of the weights, so that results of others are never taken for these.

        Raises:
            RuntimeError: mteb is not installed.
        """
        with importing("pyvidx.eval.mteb", "mteb", install="mteb>=2.26"):
            from mteb.models.model_meta import ModelMeta, ScoringFunction
        towers = [self.model] if self.text is None else [self.model, self.text]
        parameters = sum(p.numel() for tower in towers for p in tower.parameters())
        weights = {f"{i}.{k}": w for i, tower in enumerate(towers) for k, w in tower.state_dict().items()}
        return ModelMeta(
            loader=None, name=self.name, revision=files.digest(weights)[:16], release_date=None, languages=None,
            n_parameters=parameters, memory_usage_mb=None, embed_dim=self.model.tower.config.embed_dim,
            max_tokens=None if self.text is None else self.text.config.context, license=None, open_weights=None,
            public_training_code=None, public_training_data=None, framework=["PyTorch"],
            similarity_fn_name=ScoringFunction.COSINE, use_instructions=False, training_datasets=None,
            modalities=["video"] if self.text is None else ["video", "text"], experiment_kwargs=self._about,
        )  # fmt: skip


def encoder(
    source: Source | Sequence[Source] | None = None,
    module: str | None = None,
    *,
    text: Source | None = None,
    tokenizer: str | None = None,
    name: str | None = None,
    frames: int | None = None,
    sampler: str = "uniform",
    preset: str | Preset | None = None,
    device: str = "cpu",
    **options,
) -> Encoder:
    """An Encoder by what pyvidx can open.

    Args:
        source, module, options: as in pyvidx.hosts.open.open_model. Without a source and module it is the TextVideo
            that ships with pyvidx, whose texts are of its own few words.
        text: the text tower, see pyvidx.hosts.open.open_text; default what lies in `source`, if there is a tokenizer.
        tokenizer: a folder of CLIP's, or "open_clip", see pyvidx.eval.text.load_tokenizer. None: videos only.
        name: default "pyvidx/" and the module's name.
        frames: of a video; default 8, and of a TextVideo what it was trained on.
        sampler, preset: see Encoder; the preset is by default the tower's own.
        device: where it runs.

    Raises:
        ValueError: an argument does not fit, or a text tower is asked for that is not there.
        FileNotFoundError, RuntimeError: see open_model.
    """
    where, about = usable(device), {}
    alone = module is None and text is None and tokenizer is None
    if alone and (pair := _text_video(source, options)) is not None:
        model, tower, tokens = pair.model, pair.text, pair.words
        name, preset = name or "pyvidx/text_video", preset or "clip"
        frames = pair.about.get("frames") if frames is None else frames
    else:
        model, loaded = open_model(source, module, **options)
        tower = tokens = None
        if tokenizer is not None:
            tower, tokens = open_text(source if text is None else text), _clip_tokens(load_tokenizer(tokenizer))
            if tower.config.pool != "end":
                raise ValueError("mteb: the text tower is SigLIP's, whose tokenizer is not CLIP's: leave texts out")
        elif text is not None:
            raise ValueError("mteb: a text tower needs its tokenizer: give tokenizer=")
        name, preset = name or f"pyvidx/{loaded.module.split()[0].strip(',')}", preset or loaded.preset
        about = {"model": loaded.model, "module": loaded.module}
    frames = 8 if frames is None else frames
    return Encoder(
        model.to(where).eval(), None if tower is None else tower.to(where), tokens, name=name, frames=frames,
        sampler=sampler, preset=preset, about=about,
    )  # fmt: skip


def _text_video(source, options: dict) -> TextVideo | None:
    if source is None:
        return TextVideo.default(**options)
    if isinstance(source, str | os.PathLike) and files.is_ours(source) and files.kind(source) == KIND:
        return TextVideo.load(source, **options)
    return None


def _clip_tokens(tokenizer: Tokenizer) -> Callable[[Sequence[str]], Tensor]:
    return lambda texts: token_ids(texts, tokenizer)[0]


def _unit(embeddings) -> Tensor:
    return F.normalize(torch.as_tensor(embeddings).float(), dim=-1)
