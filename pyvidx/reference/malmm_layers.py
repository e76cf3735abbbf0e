"""The layers of the official MA-LMM, written plainly in eager torch: EVA-ViT blocks, BERT layers, bank compression.

Slow on purpose and kept simple: this is what the fast path is compared with, in numbers and in time. Parameters carry
the official names, so that an official state dict loads as it is.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EVAAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v; one matrix for q, k and v, biases for q and v only."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
        B, N, C = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).reshape(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * (C // self.heads) ** -0.5, qkv[1], qkv[2]
        weights = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, C))


class EVAMLP(nn.Module):
    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class EVABlock(nn.Module):
    """x + MHA(LN x), then x + MLP(LN x)."""

    def __init__(self, width: int, heads: int, mlp_width: int, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = EVAAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = EVAMLP(width, mlp_width)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class BertAttentionWeights(nn.Module):
    """Multi-head attention without its output projection."""

    def __init__(self, width: int, heads: int, source_width: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, N, D] attends to source [B, S, Ds]; mask [B, 1, 1, S] is added to the scores."""

        def split(y: Tensor) -> Tensor:  # [B, H, tokens, D / H]
            return y.view(*y.shape[:2], self.heads, -1).permute(0, 2, 1, 3)

        q, k, v = split(self.query(x)), split(self.key(source)), split(self.value(source))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        weights = (scores if mask is None else scores + mask).softmax(dim=-1)
        return (weights @ v).permute(0, 2, 1, 3).reshape(x.shape)


class Dense(nn.Module):
    """The part that BERT calls intermediate: a projection alone, under its name."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.dense = nn.Linear(width, out_width)


class DenseNorm(Dense):
    """LN(residual + W x), what BERT calls output."""

    def __init__(self, width: int, out_width: int, eps: float):
        super().__init__(width, out_width)
        self.LayerNorm = nn.LayerNorm(out_width, eps=eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class BertAttention(nn.Module):
    def __init__(self, width: int, heads: int, source_width: int, eps: float):
        super().__init__()
        self.self = BertAttentionWeights(width, heads, source_width)
        self.output = DenseNorm(width, width, eps)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.output(self.self(x, source, mask), x)


class QFormerLayer(nn.Module):
    """Self-attention of all rows, cross-attention of the query rows (where there is one), two feed-forward paths."""

    def __init__(self, config: Any, cross: bool):
        super().__init__()
        D, H, F_, eps = config.width, config.heads, config.mlp_width, config.eps
        self.attention = BertAttention(D, H, D, eps)
        if cross:
            self.crossattention = BertAttention(D, H, config.encoder_width, eps)
        self.intermediate, self.output = Dense(D, F_), DenseNorm(F_, D, eps)
        self.intermediate_query, self.output_query = Dense(D, F_), DenseNorm(F_, D, eps)

    def forward(self, x: Tensor, source: Tensor, visual: Tensor, mask: Tensor | None, queries: int) -> Tensor:
        """x [B, N, D], self-attention keys from source [B, S, D], cross-attention keys from visual [B, L, C]."""
        x = self.attention(x, source, mask)
        q, text = x[:, :queries], x[:, queries:]
        if hasattr(self, "crossattention"):
            q = self.crossattention(q, visual)
        q = self.output_query(F.gelu(self.intermediate_query.dense(q)), q)
        text = self.output(F.gelu(self.intermediate.dense(text)), text)
        return torch.cat([q, text], dim=1)


def compress(bank: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """One merge at every position. bank [B, n, P, C], sizes float [B, n, P] -> [B, n-1, P, C] and [B, n-1, P].

    The whole bank's cosines, gathers, a scaling there and back, as the public code does it.
    """
    B, n, P, C = bank.shape
    similarity = F.cosine_similarity(bank[:, :-1], bank[:, 1:], dim=-1)
    k = similarity.max(dim=1, keepdim=True).indices  # [B, 1, P]
    source = k + 1
    rest = torch.arange(n - 1, device=bank.device)[None, :, None].repeat(B, 1, P)
    rest[rest > k] += 1
    wide = lambda index: index[..., None].expand(-1, -1, -1, C)  # noqa: E731
    source_sizes, rest_sizes = sizes.gather(1, source), sizes.gather(1, rest)
    out = bank.gather(1, wide(rest)) * rest_sizes[..., None]
    out.scatter_add_(1, wide(k), bank.gather(1, wide(source)) * source_sizes[..., None])
    rest_sizes.scatter_add_(1, k, source_sizes)
    return out / rest_sizes[..., None], rest_sizes


def push(bank: Tensor | None, sizes: Tensor | None, frame: Tensor, length: int, last: bool) -> tuple[Tensor, Tensor]:
    """Append frame [B, P, C] with count 1; unless it is the last, one merge where that makes the bank too long."""
    frame = frame.detach()[:, None]
    one = torch.ones(frame.shape[:3], device=frame.device)
    bank = frame if bank is None else torch.cat([bank, frame], dim=1)
    sizes = one if sizes is None else torch.cat([sizes, one], dim=1)
    return compress(bank, sizes) if bank.shape[1] > length and not last else (bank, sizes)
