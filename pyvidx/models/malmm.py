"""MA-LMM (arXiv:2404.05726): a Q-Former that walks through a video with two memory banks, in constant memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyvidx.backbones.vit import ViT
from pyvidx.layers.linear import dense
from pyvidx.layers.plain import held
from pyvidx.memory.qformer import Prompt, QFormer
from pyvidx.memory.sources import FrameSource, LastSource, Memories, PushSource, ReadSource
from pyvidx.models import files
from pyvidx.models.fold import Foldable
from pyvidx.models.language import Language
from pyvidx.models.malmm_config import MALMMConfig
from pyvidx.ops._library import require_tensors
from pyvidx.ops.memory_merge import MemoryState, new_state
from pyvidx.sizes import check_counts
from pyvidx.temporal.table import rows_at

COMPATS = ("official", "paper")


class MALMM(Foldable):
    """Frame encoder, Q-Former, temporal embedding and the projection to a language model.

    Whole clips: `forward`, or `encode` from stored features. Streams: `start`, then `push` frames as they come and
    `ask` at any time; all of them give the same numbers.

        model = MALMM.default()
        memories = model.start(model.prompt(text_ids))
        for frame in frames:                                         # [B, 3, h, w]
            memories = model.push(memories, model.features(frame))
        tokens = model.project(model.ask(memories))                  # [B, 32, llm_width], after any frame

    Args:
        config: sizes.
        compat: "official", the numbers of the public code: a merge is the mean of all frames in its two entries, and a
            frame beyond the temporal table is an error. "paper": a merge is the plain mean of the two entries (equation
            7), and of a clip longer than the table its frames are spread over the table, with linear interpolation.
            Defects of the public code that change results are not reproduced: its banks hang on the modules and leak
            into the next video, or are emptied, where a clip is not as long as the model was told.

    Attributes:
        time: [time_length, C] or None, the temporal embedding table; zero at first.
        is_random: the weights came from no file.
    """

    def __init__(self, config: MALMMConfig, *, compat: str = "official"):
        super().__init__()
        if compat not in COMPATS:
            raise ValueError(f"MALMM: compat must be one of {', '.join(COMPATS)}, got {compat!r}")
        self.config, self.compat, self.is_random = config, compat, True
        self.vision = ViT(config.vision)
        self.freeze_vision()
        self.time = nn.Parameter(torch.zeros(config.time_length, config.vision.width)) if config.time_length else None
        self.qformer = QFormer(config.qformer)
        self.projection = None if config.llm_width is None else nn.Linear(config.qformer.width, config.llm_width)

    def forward(
        self,
        pixels: Tensor,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        length: int = 20,
        visual: bool = True,
        query: bool = True,
        frames: Sequence[int] | None = None,
    ) -> Tensor:
        """Videos to tokens for a language model.

        Where gradients are wanted, they flow through the last frame alone, as in the paper: all frames before it are
        encoded without autograd, and the banks are constants.

        Args:
            pixels: [B, T, 3, h, w], normalized.
            text_ids, text_mask: the instruction, see QFormer.prompt.
            length, visual, query: see `encode`.
            frames: B whole numbers from 1 to T, where the videos of the batch are not all of T frames: what comes
                after is padding, and each video gives what it gives alone.

        Returns:
            [B, Q, llm_width], or [B, G, Q, llm_width] of G questions; length = 0: T * Q tokens instead of Q.

        Raises:
            ValueError: pixels, the text, frames, length or the number of frames (see compat) do not fit.
        """
        require_tensors("MALMM", pixels=pixels)
        if pixels.dim() != 5 or pixels.shape[1] == 0:
            raise ValueError(f"MALMM: pixels must be [B, T, 3, h, w] with T >= 1, got {tuple(pixels.shape)}")
        if frames is not None:
            return self._ragged(pixels, frames, text_ids, text_mask, length, visual, query)
        prompt = self.prompt(text_ids, text_mask, batch=pixels.shape[0])
        if length and torch.is_grad_enabled():
            with torch.no_grad():
                before = (self.features(pixels[:, :-1]),) if pixels.shape[1] > 1 else ()
            parts = (*before, self.features(pixels[:, -1:]))
        else:
            parts = (self.features(pixels),)
        return self.project(self._encode(parts, prompt, length, visual, query, chunk=32))

    def _ragged(
        self,
        pixels: Tensor,
        frames: Tensor | Sequence[int],
        text_ids: Tensor | None,
        text_mask: Tensor | None,
        length: int,
        visual: bool,
        query: bool,
    ) -> Tensor:
        """Videos of one length at a time: each at full speed, and nothing of the padding is worked on."""
        counts = torch.as_tensor(frames)
        whole = not counts.is_floating_point() and counts.dtype != torch.bool
        if (
            not len(pixels)
            or counts.shape != pixels.shape[:1]
            or not whole
            or not bool(((counts >= 1) & (counts <= pixels.shape[1])).all())
        ):
            raise ValueError(f"MALMM: frames must be B > 0 whole numbers from 1 to T = {pixels.shape[1]}, got {frames}")
        if any(x is not None and len(x) != len(counts) for x in (text_ids, text_mask)):
            raise ValueError(f"MALMM: the text must be of {len(counts)} videos, as pixels")
        if length == 0 and len(counts.unique()) > 1:
            raise ValueError("MALMM: without memory (length=0) tokens are as many as frames: all videos must have T")
        out: list[Tensor] = [pixels] * len(counts)
        for T in counts.unique().tolist():
            rows = (counts == T).nonzero().flatten().tolist()
            text = [None if x is None else x[rows] for x in (text_ids, text_mask)]
            tokens = self(pixels[rows, :T], *text, length=length, visual=visual, query=query)
            for row, found in zip(rows, tokens):
                out[row] = found
        return torch.stack(out)

    def generate(
        self,
        pixels: Tensor,
        prompts: Sequence[Any],
        language: Language,
        *,
        memory: dict[str, Any] | None = None,
        **options: Any,
    ) -> list[Any]:
        """Questions about videos, answered in words.

        Args:
            pixels: [B, T, 3, h, w], normalized.
            prompts: B instructions, or B lists of G questions: those about one video share its visual bank.
            language: the causal language model, whose width is this model's llm_width.
            memory: `length`, `visual`, `query` and `frames` of `forward`.
            options: of Language.generate (num_beams, max_new_tokens, num_return_sequences, ...).

        Returns:
            as prompts, an answer in place of each.
        """
        with torch.no_grad():
            tokens = self(pixels, *language.question_ids(prompts), **(memory or {}))
        return language.generate(tokens, prompts, **options)

    def loss(
        self,
        pixels: Tensor,
        prompts: Sequence[Any],
        answers: Sequence[Any],
        language: Language,
        *,
        memory: dict[str, Any] | None = None,
    ) -> Tensor:
        """The training loss: mean cross-entropy of the answers' tokens, see Language.loss; arguments as in generate.

        Gradients flow through the last frame alone, see `forward`.
        """
        tokens = self(pixels, *language.question_ids(prompts), **(memory or {}))
        return language.loss(tokens, prompts, answers)

    def freeze_vision(self) -> None:
        """No gradients for the image tower; the LayerNorm after it keeps its own: that is how MA-LMM is trained."""
        for name, p in self.vision.named_parameters():
            p.requires_grad_(name.startswith("norm_post"))

    def features(self, pixels: Tensor) -> Tensor:
        """ln_vision(ViT(x)) of frames, all in one batch. [..., 3, h, w] -> [..., P, C], class token first."""
        (x,) = self.vision.run(self.vision.embed(pixels))
        return self.vision.norm(x)

    def prompt(self, text_ids: Tensor | None = None, text_mask: Tensor | None = None, *, batch: int = 1) -> Prompt:
        """The questions, and what depends on them alone; see QFormer.prompt."""
        return self.qformer.prompt(text_ids, text_mask, batch)

    def project(self, tokens: Tensor) -> Tensor:
        """The Q-Former's tokens in the language model's width. [..., D] -> [..., llm_width]."""
        if self.projection is None:
            raise ValueError("MALMM: this model was built without a projection (llm_width=None)")
        return dense(tokens, self.projection)

    def start(
        self,
        prompt: Prompt | None = None,
        *,
        batch: int | None = None,
        length: int = 20,
        visual: bool = True,
        query: bool = True,
        bank_dtype: torch.dtype | None = None,
    ) -> Memories:
        """Empty memories.

        Args:
            prompt: the questions, from `prompt`. May be left out where there is no query bank; then give `batch`.
            length: M, entries of each bank.
            visual, query: have that bank. Without the query bank a push only fills the visual one, the Q-Former runs at
                `ask`, and that takes any prompt.
            bank_dtype: of the rows that similarities are taken of. None: float32, also where the weights are 16-bit.
                A 16-bit bank is half as large, but its rounding makes other pairs merge. Measured over 10,000 frames
                (`python -m bench.long_run drift`), relative error of the query tokens against float32, median at ten
                times along the stream: scenes of 50 frames, float16 0.5 %, bfloat16 3.2 %; with 16-bit weights and a
                float32 bank 0.1 % and 0.8 %. Frames of pure noise, where all pairs are about as similar: 7 and 9 %;
                4 and 8 %.
        """
        if prompt is None and (query or batch is None):
            raise ValueError("MALMM: start needs a prompt, or query=False and batch=B")
        if type(length) is not int or length < 1:
            raise ValueError(
                f"MALMM: the memories' length must be at least 1 and whole, got {length!r}; `encode` takes 0"
            )
        B, P, C = batch if prompt is None else prompt.batch, 1 + self.config.vision.patches, self.config.vision.width
        q, weight = self.config.qformer, held(self.qformer, "query_tokens")

        def bank(rows: int, N: int, width: int, attached: int) -> MemoryState:
            kept = bank_dtype or torch.promote_types(weight.dtype, torch.float32)
            return new_state(rows, length, N, width, kept, weight.device, (2 * q.width,) * attached, weight.dtype)

        banks = ()
        if query:
            R, N, D = prompt.rows.shape
            banks = tuple(None if i == 0 and prompt.attended is not None else bank(R, N, D, 1) for i in range(q.layers))
        frames = bank(B, P, C, len(q.cross_layers) * query) if visual else None
        return Memories(0, length, prompt, frames, banks)

    @torch.no_grad()
    def push(
        self, memories: Memories, features: Tensor, *, positions: Tensor | None = None, chunk: int = 32
    ) -> Memories:
        """Take in the next frames of a stream.

        The tensors of `memories` are changed in place, as a copy of the banks would cost more than the step: go on with
        what is returned, and clone() what is to be kept.

        Args:
            features: [B, P, C] of one frame or [B, t, P, C] of t frames, from `features`.
            positions: float [t], where in the temporal table these frames are, linear between its rows; default: their
                number in the stream.
            chunk: frames worked on at once; a matter of speed and memory, not of the result.
        """
        require_tensors("MALMM", features=features)
        check_counts("MALMM", chunk=chunk)
        frames = features[:, None] if features.dim() == 3 else features
        self._check(frames, memories)
        frames = self._timed(frames, memories.seen, positions)
        for part in frames.split(chunk, dim=1):
            memories = self._push(memories, part)
        return memories

    def ask(self, memories: Memories, prompt: Prompt | None = None) -> Tensor:
        """The query tokens at the newest frame, [B, Q, D] or [B, G, Q, D]; the memories stay as they are.

        prompt: other questions than at the start; only without a query bank, which holds the questions' own states.

        Raises:
            ValueError: no frame was pushed, or the prompt does not fit.
        """
        if memories.seen == 0:
            raise ValueError("MALMM: ask needs a frame to have been pushed")
        if prompt is not None and memories.query:
            raise ValueError("MALMM: with a query bank the questions are those of start; use query=False for others")
        prompt = memories.prompt if prompt is None else prompt
        if prompt is None:
            raise ValueError("MALMM: ask needs a prompt: these memories were started without one")
        source = ReadSource(self.qformer, memories, prompt)
        if memories.query:
            tokens = self.qformer.finish(prompt, memories.rows, source)
        else:
            tokens = self.qformer.run(prompt, 1, source)[:, 0]
        return _by_question(tokens, prompt)

    def encode(
        self,
        features: Tensor,
        prompt: Prompt | None = None,
        *,
        length: int = 20,
        visual: bool = True,
        query: bool = True,
        chunk: int = 32,
    ) -> Tensor:
        """The query tokens at the last frame of whole clips, layer by layer over all frames.

        Where gradients are wanted, they flow through the last frame, as in `forward`, and into the prompt.

        Args:
            features: [B, T, P, C], from `features`.
            prompt: the questions, made with autograd on if that is to learn too; None: no text.
            length: M; 0: no memory: every frame by itself, the paper's ablation "Concat".
            visual, query: have that bank.
            chunk: frames worked on at once; a matter of speed and memory, not of the result.

        Returns:
            [B, Q, D], or [B, G, Q, D] of G questions; length = 0: [..., T * Q, D], frame by frame.
        """
        require_tensors("MALMM", features=features)
        prompt = self.prompt(batch=features.shape[0]) if prompt is None else prompt
        return self._encode((features,), prompt, length, visual, query, chunk)

    def _encode(
        self, parts: Sequence[Tensor], prompt: Prompt, length: int, visual: bool, query: bool, chunk: int
    ) -> Tensor:
        """parts: features of consecutive frames; of them only the last frame has gradients."""
        T = sum(part.shape[1] for part in parts)
        for part in parts:
            self._check(part, prompt)
        if 0 in (T, prompt.batch):
            raise ValueError(
                f"MALMM: there must be at least one clip of at least one frame, got {prompt.batch} of {T} frames"
            )
        positions = None
        if self.time is not None and T > len(self.time) and self.compat == "paper":
            positions = torch.linspace(0, len(self.time) - 1, T)
        if length == 0:
            # Without a temporal embedding, as in the public code.
            tokens = self.qformer.run(prompt, T, FrameSource(self.qformer, prompt, parts[-1]))
            return _by_question(tokens.flatten(1, 2), prompt)
        memories = self.start(prompt, length=length, visual=visual, query=query)
        if not torch.is_grad_enabled():
            return self.ask(self.push(memories, parts[-1], positions=positions, chunk=chunk))
        *before, last = parts
        for part in (*before, last[:, :-1]):
            at = None if positions is None else positions[memories.seen : memories.seen + part.shape[1]]
            memories = self.push(memories, part, positions=at, chunk=chunk)
        frame = self._timed(last[:, -1:], T - 1, None if positions is None else positions[-1:])[:, 0]
        source = LastSource(self.qformer, memories, frame, self.compat == "official")
        tokens = self.qformer.run(prompt, 1, source, constants=not query)
        return _by_question(tokens[:, 0], prompt)

    def _push(self, memories: Memories, frames: Tensor) -> Memories:
        t, prompt = frames.shape[1], memories.prompt
        if t == 0:
            return memories
        source, rows = PushSource(self.qformer, memories, frames, self.compat == "official"), None
        if memories.query:
            rows = source.remember_last(self.qformer.run(prompt, t, source, with_last=False))[:, -1]
        frame = frames[:, -1] if memories.visual is None else None
        return memories._replace(seen=memories.seen + t, frame=frame, rows=rows)

    def _timed(self, frames: Tensor, seen: int, positions: Tensor | None) -> Tensor:
        """features + temporal embedding: it is added before attention and before storing."""
        if self.time is None:
            return frames
        t, table = frames.shape[1], held(self, "time")
        if positions is None and seen + t > len(table):
            raise ValueError(
                f"MALMM: the temporal table has {len(table)} rows, got frame {seen + t}; pass positions, or use "
                'compat="paper" for whole clips'
            )
        rows = table[seen : seen + t] if positions is None else rows_at(table, positions)
        if len(rows) != t:
            raise ValueError(f"MALMM: positions must be one per frame, {t}, got {len(rows)}")
        return frames + rows[:, None]

    def _check(self, frames: Tensor, memories: Memories | Prompt) -> None:
        P, C = 1 + self.config.vision.patches, self.config.vision.width
        if frames.dim() != 4 or frames.shape[2:] != (P, C) or not frames.is_floating_point():
            raise ValueError(
                f"MALMM: features must be floating [B, t, {P}, {C}], got {tuple(frames.shape)} {frames.dtype}"
            )
        prompt = memories.prompt if isinstance(memories, Memories) else memories
        B = prompt.batch if prompt is not None else memories.visual.bank.shape[0] if memories.visual else None
        if B is not None and frames.shape[0] != B:
            raise ValueError(f"MALMM: features must be of {B} videos, as the prompt, got {frames.shape[0]}")

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, configuration included. A path without that ending is a folder."""
        self.check_whole()
        header = {"config": self.config.to_dict(), "compat": self.compat, "is_random": self.is_random}
        return files.write(path, "malmm", self, header)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, compat: str | None = None) -> "MALMM":
        """Load what `save` wrote, a file or its folder, in eval mode and with the dtypes of the file.

        compat: in place of that saved. Published files are read by pyvidx.weights.malmm.

        Raises:
            FileNotFoundError, ValueError: see pyvidx.models.files.load; compat is unknown.
        """
        model, header = files.load(
            path, "malmm", lambda h: cls(MALMMConfig.from_dict(h["config"]), compat=compat or h["compat"])
        )
        model.freeze_vision()
        model.is_random = header["is_random"]
        return model

    @classmethod
    def default(cls, *, compat: str = "official") -> "MALMM":
        """A small model with random weights, always the same ones, to try things out. `is_random` is True."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls(MALMMConfig.tiny(), compat=compat).eval()


def _by_question(tokens: Tensor, prompt: Prompt) -> Tensor:
    """[R, n, D] -> [B, n, D], or [B, G, n, D] where the prompt had an axis for the questions."""
    return tokens if prompt.groups is None else tokens.unflatten(0, (-1, prompt.groups))
