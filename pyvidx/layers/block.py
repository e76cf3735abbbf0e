"""The pre-norm transformer block that CLIP and the branch of BT-Adapter are made of."""

import functools

import torch.nn.functional as F
from torch import Tensor, nn

from pyvidx import ops
from pyvidx.layers.attention import gather, gathered_values, self_attention
from pyvidx.layers.linear import dense
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
        return self.feed_forward(x + self.attend(x, mask))

    def class_row(self, x: Tensor) -> Tensor:
        """Row 0 of forward(x) without most of the work for the others: one query, no keys and no values, see `gather`.

        [..., N, C] -> [..., 1, C].
        """
        if self.causal or not (untouched(self) and plain(self.qkv)):
            return self(x)[..., :1, :]
        normed = self.norm1(x)
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
        return ACTIVATIONS[self.hidden_act](dense(normed, self.fc1))

    def feed_forward(self, x: Tensor) -> Tensor:
        """x + MLP(LN x). [..., C] -> [..., C]."""
        return x + dense(self.hidden(self.norm2(x)), self.fc2)
