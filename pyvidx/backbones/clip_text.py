"""The text tower of CLIP (arXiv:2103.00020): a causal transformer, read at the end token."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyvidx.layers.block import Block
from pyvidx.layers.linear import dense
from pyvidx.ops._library import require, require_tensors
from pyvidx.sizes import check


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of a CLIP text tower.

    Attributes:
        vocab, context: number of token ids, and the longest text.
        width, heads, layers, mlp_width: of the transformer.
        embed_dim: E of the projection to the shared space.
        hidden_act, eps: see CLIPVisionConfig.
    """

    vocab: int
    context: int
    width: int
    heads: int
    layers: int
    mlp_width: int
    embed_dim: int
    hidden_act: str = "quick_gelu"
    eps: float = 1e-5

    def __post_init__(self):
        check(self)
        if self.width % self.heads:
            raise ValueError(f"CLIPTextConfig: width must be a multiple of heads, got {self.width} and {self.heads}")


def check_ids(op: str, name: str, ids: Tensor, vocab: int) -> None:
    """Raise unless all ids are in the vocabulary: on the CPU, where asking stalls nothing, and not in compiled code,
    which cannot ask. A GPU stops its embedding kernel."""
    if not ids.is_cpu or torch.compiler.is_compiling() or not ids.numel():
        return
    low, high = (int(n) for n in torch.aminmax(ids))
    require(low >= 0 and high < vocab, f"{op}: {name} must be in [0, {vocab}), the vocabulary, got {low} to {high}")


class CLIPText(nn.Module):
    """CLIP's text tower. Weights: pyvidx.weights.clip_text."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = c = config
        self.token = nn.Embedding(c.vocab, c.width)
        self.position = nn.Parameter(torch.randn(c.context, c.width) * 0.01)
        self.blocks = nn.ModuleList(
            Block(c.width, c.heads, c.mlp_width, c.hidden_act, c.eps, causal=True) for _ in range(c.layers)
        )
        self.norm = nn.LayerNorm(c.width, eps=c.eps)
        self.projection = nn.Linear(c.width, c.embed_dim, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """The text embedding, projection(LN(x at the LARGEST id)), in CLIP's vocabulary the end token.

        Args:
            ids: int64 [B, L], L at most `context`. What follows the end token has no effect. A text cut before its end
                token is read at whatever id is largest, as by the official code.

        Returns:
            [B, E], not normalized.

        Raises:
            ValueError: ids are not int64 [B, L], or beyond the vocabulary.
        """
        require_tensors("CLIPText", ids=ids)
        if ids.dim() != 2 or ids.dtype != torch.int64 or not 0 < ids.shape[1] <= self.config.context:
            raise ValueError(
                f"CLIPText: ids must be int64 [B, L], L in [1, {self.config.context}], "
                f"got {tuple(ids.shape)} {ids.dtype}"
            )
        check_ids("CLIPText", "ids", ids, self.config.vocab)
        x = self.token(ids) + self.position[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        end = x[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)]
        return dense(self.norm(end), self.projection)
