"""The layers of the official BT-Adapter, written plainly in eager torch: patch-major tokens, copies and all.

Slow on purpose and kept simple: this is what the fast path is compared with, in numbers and in time. Parameters carry
the official names, so that an official state dict loads as it is.
"""

import torch
from torch import Tensor, nn

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": nn.functional.gelu,
}


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D)) v with four projections, scores written out."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [rows, tokens, C]
        rows, tokens, C = x.shape
        D = C // self.heads

        def split(y: Tensor) -> Tensor:  # [rows * H, tokens, D]
            return y.view(rows, tokens, self.heads, D).transpose(1, 2).contiguous().view(rows * self.heads, tokens, D)

        q, k, v = split(self.q_proj(x) * D**-0.5), split(self.k_proj(x)), split(self.v_proj(x))
        weights = torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1)
        y = torch.bmm(weights, v).view(rows, self.heads, tokens, D).transpose(1, 2).reshape(rows, tokens, C)
        return self.out_proj(y)


class MLP(nn.Module):
    def __init__(self, width: int, mlp_width: int, hidden_act: str):
        super().__init__()
        self.act = ACTIVATIONS[hidden_act]
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class CLIPLayer(nn.Module):
    """x + MHA(LN x), then x + MLP(LN x)."""

    def __init__(self, width: int, heads: int, mlp_width: int, hidden_act: str, eps: float):
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, mlp_width, hidden_act)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:  # [rows, tokens, C]
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SpatialLayer(CLIPLayer):
    """Attention inside each frame, every frame with a copy of the one class token; the class results are averaged."""

    def forward(self, z: Tensor, t: int, drop: Tensor | None = None) -> Tensor:
        """z [B, 1 + n, C], n = groups * t tokens in groups of t. drop [B, t]: factors of DropPath."""
        B, _, C = z.shape
        cls, patches = z[:, :1], z[:, 1:]
        groups = patches.shape[1] // t
        frames = patches.reshape(B, groups, t, C).transpose(1, 2).reshape(B * t, groups, C)
        frames = torch.cat([cls.repeat_interleave(t, dim=0), frames], dim=1)
        a = self.self_attn(self.layer_norm1(frames))
        if drop is not None:
            a = a * drop.reshape(-1, 1, 1)
        a_cls = a[:, :1].reshape(B, t, 1, C).mean(dim=1)
        a_patches = a[:, 1:].reshape(B, t, groups, C).transpose(1, 2).reshape(B, groups * t, C)
        z = z + torch.cat([a_cls, a_patches], dim=1)
        return z + self.mlp(self.layer_norm2(z))


class TemporalLayer(nn.Module):
    """Attention inside each group of t consecutive patch tokens; the class token passes unchanged."""

    def __init__(self, width: int, heads: int, eps: float):
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.temporal_fc = nn.Linear(width, width)
        nn.init.zeros_(self.temporal_fc.weight)
        nn.init.zeros_(self.temporal_fc.bias)

    def forward(self, z: Tensor, t: int, drop: Tensor | None = None) -> Tensor:
        """z [B, 1 + groups * t, C]. drop [B, groups]: factors of DropPath."""
        B, _, C = z.shape
        cls, patches = z[:, :1], z[:, 1:]
        groups = patches.reshape(-1, t, C)
        a = self.self_attn(self.layer_norm1(groups))
        if drop is not None:
            a = a * drop.reshape(-1, 1, 1)
        return torch.cat([cls, patches + self.temporal_fc(a).reshape(B, -1, C)], dim=1)
