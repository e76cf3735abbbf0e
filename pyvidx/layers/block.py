"""The pre-norm transformer block that CLIP and the branch of BT-Adapter are made of."""

import functools
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvidx import ops
from pyvidx.layers.attention import gather, gathered_values, self_attention
from pyvidx.layers.int8 import is_product
from pyvidx.layers.linear import dense, wants_grad
from pyvidx.layers.norm import add_norm, writable
from pyvidx.layers.plain import plain, untouched

# silu is what quick_gelu becomes when its two factors are folded into the weights beside it.
ACTIVATIONS = {
    "quick_gelu": ops.quick_gelu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


class Block(nn.Module):
    """x + MHA(LN x), then x + MLP(LN x).

    One GEMM makes q, k and v, rows packed as [3, H, D].

    Args:
        hidden_act: "quick_gelu", "gelu" or "gelu_tanh"; the published weights need the one they were trained with.
        causal: a token attends to itself and those before it.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        hidden_act: str = "quick_gelu",
        eps: float = 1e-5,
        *,
        causal: bool = False,
    ):
        super().__init__()
        if hidden_act not in ACTIVATIONS:
            raise ValueError(f"Block: hidden_act must be one of quick_gelu, gelu and gelu_tanh, got {hidden_act!r}")
        if width % heads:
            raise ValueError(f"Block: width must be a multiple of heads, got {width} and {heads}")
        self.heads, self.hidden_act, self.causal = heads, hidden_act, causal
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[..., N, C] -> [..., N, C], attention over N. mask: as in `attend`."""
        x, added = self.halves(x, self.norm1(x), mask)
        return x + added

    def halves(self, x: Tensor, normed: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What forward adds up at its end, x after attention and what the MLP adds to it: the block that follows takes
        the sum with its norm, see `run_blocks`. normed: LN x."""
        y = dense(self.attention(normed, mask), self.out)
        x, normed = add_norm(x, y, self.norm2, writable(x, y, normed, self.out, self.norm1, self.norm2))
        return x, dense(self.hidden(normed), self.fc2)

    def class_row(self, x: Tensor, normed: Tensor | None = None) -> Tensor:
        """Row 0 of forward(x) without most of the work for the others: one query, no keys and no values, see `gather`.

        [..., N, C] -> [..., 1, C]. normed: LN x, where it is known.
        """
        if self.causal or not (untouched(self) and plain(self.qkv)):
            return self(x)[..., :1, :]
        normed = self.norm1(x) if normed is None else normed
        y = gathered_values(gather(normed[..., 0, :], normed, self.qkv, self.heads), self.qkv)
        return self.feed_forward(x[..., :1, :] + dense(y[..., None, :], self.out))

    def attend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """MHA(LN x) without the residual. [..., N, C] -> [..., N, C].

        mask: bool, True = attended to, of a shape that broadcasts to [rows, H, N, N]; not for a causal block.
        """
        return dense(self.attention(self.norm1(x), mask), self.out)

    def attention(self, normed: Tensor, mask: Tensor | None = None) -> Tensor:
        """What `out` projects, of LN x. [..., N, C] -> [..., N, C]."""
        *rows, N, C = normed.shape
        return self_attention(normed.reshape(-1, N, C), self.qkv, self.heads, mask, self.causal).view(*rows, N, C)

    def hidden(self, normed: Tensor) -> Tensor:
        """The MLP of LN x up to its second layer. [..., C] -> [..., mlp_width]."""
        x = dense(normed, self.fc1)
        # Of folded layers: what nobody else can hold is written over, as new memory costs a page fault per 4 KB.
        own = self.hidden_act == "silu" and is_product(self.fc1) and not torch.compiler.is_compiling()
        if own and not wants_grad(normed, *self.fc1.parameters()):
            return F.silu(x, inplace=True)
        return ACTIVATIONS[self.hidden_act](x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """x + MLP(LN x). [..., C] -> [..., C]."""
        return x + dense(self.hidden(self.norm2(x)), self.fc2)


def run_blocks(
    blocks: Sequence[nn.Module],
    x: Tensor,
    wanted: Collection[int],
    mask: Tensor | None = None,
    *,
    class_row: bool = False,
) -> list[Tensor]:
    """One block after another; the sum that ends one and the norm that begins the next are one launch on a GPU.

    Args:
        blocks: Blocks, or what stands in their places, which is then called as it is.
        x: [..., N, C].
        wanted: whose outputs are asked for, of range(len(blocks)).
        mask: as in Block.attend.
        class_row: of the last block, the class row alone, see Block.class_row.

    Returns:
        [..., N, C] each, in the order of the blocks.
    """
    found, before, added = [], None, None  # x + added is what the block `before` gives
    for i, block in enumerate(blocks):
        own, normed = type(block).forward is Block.forward and untouched(block), None
        if added is not None:
            if own:
                out = writable(x, added, x, before.fc2, before.norm2, block.norm1)
                x, normed = add_norm(x, added, block.norm1, out)
            else:
                x = x + added
            added = None
            if i - 1 in wanted:
                found.append(x)
        if class_row and i == len(blocks) - 1:
            x = block.class_row(x, normed) if own else block(x)[..., :1, :]
        elif own:
            x, added = block.halves(x, block.norm1(x) if normed is None else normed, mask)
        else:
            x = block(x) if mask is None else block(x, mask)
        before = block
        if added is None and i in wanted:
            found.append(x)
    if added is not None and len(blocks) - 1 in wanted:
        found.append(x + added)
    return found
