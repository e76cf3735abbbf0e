"""The text towers of CLIP (arXiv:2103.00020) and SigLIP (arXiv:2303.15343), which differ in data, see TextConfig."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyvidx.layers.block import Block, run_blocks
from pyvidx.layers.linear import dense
from pyvidx.ops._library import require, require_tensors
from pyvidx.sizes import check


@dataclass(frozen=True)
class TextConfig:
    """Sizes and kind of a text tower. The defaults are those of a CLIP; SIGLIP_TEXT_B is the other.

    Attributes:
        vocab, context: number of token ids, and the longest text.
        width, heads, layers, mlp_width: of the transformer.
        embed_dim: E of the projection to the shared space.
        hidden_act, eps: see ViTConfig.
        pool: "end": a token attends to itself and those before it, and the text is read at its LARGEST id, in CLIP's
            vocabulary the end token. "last": every token attends to all, padding too, and the text is read at the last
            place: pad it to `context`, as SigLIP was trained.
        projection_bias: whether the projection has one.
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
    pool: str = "end"
    projection_bias: bool = False

    def __post_init__(self) -> None:
        check(self)
        if self.width % self.heads:
            raise ValueError(f"TextConfig: width must be a multiple of heads, got {self.width} and {self.heads}")
        if self.pool not in ("end", "last"):
            raise ValueError(f"TextConfig: pool must be end or last, got {self.pool!r}")


SIGLIP_TEXT_B = TextConfig(
    32000, 64, 768, 12, 12, 3072, 768, hidden_act="gelu_tanh", eps=1e-6, pool="last", projection_bias=True
)


def check_ids(op: str, name: str, ids: Tensor, vocab: int) -> None:
    """Raise unless all ids are in the vocabulary: on the CPU, where asking stalls nothing, and not in compiled code,
    which cannot ask. A GPU stops its embedding kernel."""
    if not ids.is_cpu or torch.compiler.is_compiling() or not ids.numel():
        return
    low, high = (int(n) for n in torch.aminmax(ids))
    require(low >= 0 and high < vocab, f"{op}: {name} must be in [0, {vocab}), the vocabulary, got {low} to {high}")


class TextTower(nn.Module):
    """A text tower. Weights: pyvidx.weights.towers."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = c = config
        self.token = nn.Embedding(c.vocab, c.width)
        self.position = nn.Parameter(torch.randn(c.context, c.width) * 0.01)
        self.blocks = nn.ModuleList(
            Block(c.width, c.heads, c.mlp_width, c.hidden_act, c.eps, causal=c.pool == "end") for _ in range(c.layers)
        )
        self.norm = nn.LayerNorm(c.width, eps=c.eps)
        self.projection = nn.Linear(c.width, c.embed_dim, bias=c.projection_bias)

    def forward(self, ids: Tensor) -> Tensor:
        """The text embedding, projection(LN(x at the place that is read)), see TextConfig.pool.

        Args:
            ids: int64 [B, L], L at most `context`. "end": what follows the end token has no effect; a text cut before
                it is read at whatever id is largest, as by the official code.

        Returns:
            [B, E], not normalized.

        Raises:
            ValueError: ids are not int64 [B, L], or beyond the vocabulary.
        """
        require_tensors("TextTower", ids=ids)
        end = self.config.pool == "end"
        if ids.dim() != 2 or ids.dtype != torch.int64 or not 0 < ids.shape[1] <= self.config.context:
            raise ValueError(
                f"TextTower: ids must be int64 [B, L], L in [1, {self.config.context}], "
                f"got {tuple(ids.shape)} {ids.dtype}"
            )
        check_ids("TextTower", "ids", ids, self.config.vocab)
        x = self.token(ids) + self.position[: ids.shape[1]]
        (x,) = run_blocks(self.blocks, x, [len(self.blocks) - 1]) if len(self.blocks) else (x,)
        read = x[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)] if end else x[:, -1]
        return dense(self.norm(read), self.projection)
