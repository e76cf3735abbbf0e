"""The official MA-LMM, written plainly in eager torch: the numeric and the speed baseline of the fast path.

The data flow is that of the public code: one frame after the other, the whole bank's cosines at every merge, the whole
bank's keys and values projected anew in every layer at every frame. The banks are a value that goes in and comes out;
in the public code they hang on the modules, and what is odd about that (banks that leak into the next video where the
clip is not as long as the model was told) is not reproduced.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvidx.models.malmm_config import MALMMConfig
from pyvidx.reference.malmm_layers import EVABlock, QFormerLayer, push


class Bank(NamedTuple):
    """Entries in time order, and how many frames were merged into each; None where nothing is stored."""

    rows: Tensor | None = None  # [B, n, P, C]
    sizes: Tensor | None = None  # [B, n, P] float32


class ReferenceState(NamedTuple):
    visual: Bank
    query: tuple[Bank, ...]  # one per layer


class EVAVisionReference(nn.Module):
    """EVA-ViT: patch embedding with bias, class token, position table, pre-norm blocks, no norm at the end."""

    def __init__(self, config: Any):
        super().__init__()
        C, P = config.width, config.patches
        self.cls_token = nn.Parameter(torch.randn(1, 1, C))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + P, C))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, C, config.patch_size, stride=config.patch_size)
        self.blocks = nn.ModuleList(
            EVABlock(C, config.heads, config.mlp_width, config.eps) for _ in range(config.layers)
        )

    def forward(self, x: Tensor, trace: dict[str, Any] | None = None) -> Tensor:  # [B, 3, h, w] -> [B, 1+P, C]
        trace = {} if trace is None else trace
        trace["patch_embed"] = x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for i, block in enumerate(self.blocks):
            trace[f"block{i}"] = x = block(x)
        return x


class ReferenceMALMM(nn.Module):
    """MA-LMM with the official parameter names, without dropout and without the language model."""

    def __init__(self, config: MALMMConfig):
        super().__init__()
        self.config = config
        q, C = config.qformer, config.vision.width
        self.visual_encoder = EVAVisionReference(config.vision)
        self.ln_vision = nn.LayerNorm(C, eps=config.vision.norm_eps)
        self.image_pe = nn.Embedding(config.time_length, C)
        self.query_tokens = nn.Parameter(torch.randn(1, q.queries, q.width))
        self.Qformer = nn.Module()
        self.Qformer.bert = bert = nn.Module()
        bert.embeddings = nn.Module()
        bert.embeddings.word_embeddings = nn.Embedding(q.vocab, q.width)
        bert.embeddings.position_embeddings = nn.Embedding(q.text_length, q.width)
        bert.embeddings.LayerNorm = nn.LayerNorm(q.width, eps=q.eps)
        bert.encoder = nn.Module()
        bert.encoder.layer = nn.ModuleList(QFormerLayer(q, cross=i in q.cross_layers) for i in range(q.layers))
        self.llm_proj = nn.Linear(q.width, config.llm_width)

    def features(self, image: Tensor) -> Tensor:
        """One frame of every video, [B, 3, h, w] -> ln_vision of its tokens [B, P, C]."""
        return self.ln_vision(self.visual_encoder(image))

    def start(self) -> ReferenceState:
        """Nothing stored."""
        return ReferenceState(Bank(), (Bank(),) * self.config.qformer.layers)

    def step(
        self,
        state: ReferenceState,
        features: Tensor,
        t: int,
        text_ids: Tensor | None,
        text_mask: Tensor | None,
        length: int,
        last: bool = False,
    ) -> tuple[Tensor, ReferenceState]:
        """One frame: read the banks and the frame, then append it, then merge where a bank is too long.

        Args:
            features: [B, P, C], from `features`.
            t: index of the frame, the row of the temporal table.
            text_ids, text_mask: [B, L], 0 in the mask = padding; None: no instruction.
            length: M. 0: no memory, nothing is stored.
            last: the last frame of the clip: nothing merges after it.

        Returns:
            the last layer's rows [B, queries + L, D], and the new state.
        """
        Q = self.config.qformer.queries
        frame = features + self.image_pe.weight[t] if length else features  # without memory, without position
        bank = state.visual
        visual = frame if bank.rows is None else torch.cat([bank.rows, frame[:, None]], dim=1).flatten(1, 2)
        x, mask = self._embed(text_ids, text_mask, frame.shape[0])
        query = []
        for layer, stored in zip(self.Qformer.bert.encoder.layer, state.query):
            source = x if stored.rows is None else torch.cat([stored.rows.flatten(1, 2), x], dim=1)
            n = source.shape[1] // x.shape[1]
            layer_mask = None if mask is None else mask.repeat(1, 1, 1, n)
            y = layer(x, source, visual, layer_mask, Q)
            query.append(Bank(*push(*stored, x, length, last)) if length else stored)
            x = y
        bank = Bank(*push(*bank, frame, length, last)) if length else bank
        return x, ReferenceState(bank, tuple(query))

    def forward(
        self, video: Tensor, text_ids: Tensor | None = None, text_mask: Tensor | None = None, *, length: int
    ) -> Tensor:
        """Tokens for the language model, [B, queries, llm_width]; length = 0: of all frames, [B, T * queries, ...].

        video: [B, T, 3, h, w], normalized. Gradients flow through the last frame only: the banks are detached.
        """
        T, Q = video.shape[1], self.config.qformer.queries
        state, outputs = self.start(), []
        for t in range(T):
            x, state = self.step(state, self.features(video[:, t]), t, text_ids, text_mask, length, t == T - 1)
            outputs.append(x[:, :Q])
        return self.llm_proj(outputs[-1] if length else torch.cat(outputs, dim=1))

    def _embed(self, text_ids: Tensor | None, text_mask: Tensor | None, B: int) -> tuple[Tensor, Tensor | None]:
        """Rows [B, N, D] of queries and text, and what is added to the scores, [B, 1, 1, N]."""
        e = self.Qformer.bert.embeddings
        x, mask = self.query_tokens.expand(B, -1, -1), None
        if text_ids is not None:
            text = e.word_embeddings(text_ids) + e.position_embeddings.weight[: text_ids.shape[1]]
            mask = F.pad(text_mask.to(x.dtype), (x.shape[1], 0), value=1.0)
            mask = (1 - mask)[:, None, None] * -10000.0
            x = torch.cat([x, text], dim=1)
        return e.LayerNorm(x), mask
