"""The official BT-Adapter towers, written plainly in eager torch: the numeric and the speed baseline of the fast path.

The data flow is that of the public code: backbone tokens [B*T, 1+P, C], branch tokens Z [B, 1 + P*T, C] with one class
token first and the patches patch-major (flat index p * T + t), transposed and concatenated anew in every layer. Its
behavior is kept where it is odd: a clip whose axis 1 is 3 is read channel-first; the llava tower halves its group size
for every T; the mask, drawn frame-major, is applied to patch-major tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pyvidx.models.config import BTAdapterConfig
from pyvidx.reference.bt_adapter_layers import CLIPLayer, SpatialLayer, TemporalLayer
from pyvidx.temporal.masking import Drops


class ReferenceBTAdapter(nn.Module):
    """One of the official towers, with the official parameter names.

    tower: "mma" (retrieval, pixels -> video embedding), "llava" (video chat, pixels or stored features -> tokens), or
        "stan" (the ungated sibling, which starts its class token from CLIP's). config.part: "full" or "features".
    """

    def __init__(self, config: BTAdapterConfig, tower: str = "mma"):
        super().__init__()
        if tower not in ("mma", "llava", "stan") or config.part == "tokens":
            raise ValueError(f"ReferenceBTAdapter: no tower {tower!r} with part {config.part!r}")
        self.config, self.tower = config, tower
        v = config.vision
        C, P = v.width, v.patches
        sizes = (v.width, v.heads, v.mlp_width, v.hidden_act)
        self.position_embedding = nn.Embedding(1 + P, C)
        self.layers = nn.ModuleList(CLIPLayer(*sizes, v.eps) for _ in config.backbone_layers)
        if config.part == "full":
            self.class_embedding = nn.Parameter(torch.randn(C))
            self.patch_embedding = nn.Conv2d(3, C, v.patch_size, stride=v.patch_size, bias=False)
            self.pre_layrnorm = nn.LayerNorm(C, eps=v.eps)
            self.post_layernorm = nn.LayerNorm(C, eps=v.eps)
            if tower != "llava":
                self.visual_projection = nn.Linear(C, v.embed_dim, bias=False)
        if config.gated and tower != "stan":
            self.balance1 = nn.Parameter(torch.zeros(C))
            self.balance2 = nn.Parameter(torch.zeros(C))
        if tower != "stan":
            self.btadapter_cls_token = nn.Parameter(torch.zeros(1, 1, C))
        depth, eps = config.branch_layers, config.branch_eps
        self.btadapter_S_layers = nn.ModuleList(SpatialLayer(*sizes, eps) for _ in range(depth))
        self.btadapter_T_layers = nn.ModuleList(TemporalLayer(v.width, v.heads, eps) for _ in range(depth))
        self.btadapter_time_embed = nn.Embedding(config.time_length, C)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, trace: dict[str, Any] | None = None, drops: Drops | None = None
    ) -> Tensor:
        """
        Args:
            x: pixels [B, T, 3, h, w], or [B, 3, T, h, w]; mma and stan also [B, 3, h, w] (images); llava also
                [T, 3, h, w] (one video). part "features": stored tokens [B, T, 1+P, C] or [T, 1+P, C].
            mask: bool [B, T*P], True = removed, frame-major as the official training code draws it.
            trace: a dict to fill with intermediate values: backbone.i, T.j, S.j, post_ln_cls, per_frame.
            drops: DropPath, from pyvidx.temporal.masking.drop_path_draws; only training has it.

        Returns:
            mma, stan: the video embedding [B, E], not normalized.
            llava: (hidden_states, pooler): entry i < L is [B*T, 1+P, C] before the branch starts and the fused tokens
                [B, 1+P, C] (patches first, class last) after; the last is the pair (X [B*T, 1+P, C], Z); pooler is
                [B*T, C]. part "features": the last entry is the fused tokens, pooler is None.
        """
        x, B, T = self._frames(x)
        trace = {} if trace is None else trace
        if self.config.part == "full":
            x = self.pre_layrnorm(self._embed(x))
        first, z, states = len(self.layers) - len(self.btadapter_S_layers), None, []
        for i, layer in enumerate(self.layers):
            if self.tower == "llava":
                states.append(x if z is None else self._fused_tokens(x, z, B, T))
            x = layer(x)
            if i >= first:
                trace[f"backbone.{i}"] = x
                drop = drops[i - first] if drops else None
                z = self._branch_layer(i - first, x, z, B, T, mask, trace, drop or (None, None))
        if self.config.part == "features":
            return [*states, self._fused_tokens(x, z, B, T)], None
        states.append((x, z))
        normed = self.post_layernorm(self._output_gate(x[:, 0], z[:, 0].repeat_interleave(T, dim=0)))
        trace["post_ln_cls"] = normed
        if self.tower == "llava":
            return states, normed
        per_frame = self.visual_projection(normed).view(B, T, -1)
        trace["per_frame"] = per_frame
        return per_frame.mean(dim=1)

    def _frames(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Frames in one axis [B*T, ...], and B, T."""
        shape = tuple(x.shape)
        if self.config.part == "features":
            if x.dim() == 3:
                x = x[None]
            if x.dim() != 4 or x.shape[1] == 3:  # three axes of 3 are read as pixels and fail later
                raise ValueError(f"llava tower: features must be [B, T, 1+P, C], T != 3, or [T, 1+P, C], got {shape}")
        elif x.dim() == 5:
            if x.shape[1] == 3:
                x = x.transpose(1, 2)
        elif x.dim() == 4 and x.shape[1] == 3:
            x = x[None] if self.tower == "llava" else x[:, None]
        else:
            raise ValueError(f"{self.tower} tower: pixels must be [B, T, 3, h, w] or [N, 3, h, w], got {shape}")
        B, T = x.shape[:2]
        self._check(T)
        return x.reshape(B * T, *x.shape[2:]), B, T

    def _check(self, T: int) -> None:
        P, rows = self.config.vision.patches, self.config.time_length
        if self.tower != "llava":
            if T > rows:
                raise ValueError(f"{self.tower} tower: T must be at most {rows}, the rows of the time table, got {T}")
        elif T < 2 or (T > rows and (T % 2 or T // 2 > rows)) or (T <= rows and P * T % (T // 2)):
            raise ValueError(
                f"llava tower: T must be at least 2; T // 2 must divide {P} * T up to T = {rows}; "
                f"T must be even and at most {2 * rows} above, got {T}"
            )

    def _embed(self, x: Tensor) -> Tensor:  # [B*T, 3, h, w] -> [B*T, 1+P, C]
        patches = self.patch_embedding(x).flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(x.shape[0], 1, -1)
        return torch.cat([cls, patches], dim=1) + self.position_embedding.weight

    def _branch_layer(
        self, j: int, x: Tensor, z: Tensor | None, B: int, T: int, mask: Tensor | None, trace: dict[str, Any], drop: Any
    ) -> Tensor:
        x = x.view(B, T, *x.shape[1:])  # [B, T, 1+P, C]
        t = T
        if self.tower == "llava":
            if T > self.config.time_length:
                x = (x[:, 0::2] + x[:, 1::2]) / 2
            t = T // 2  # also where frames were not averaged
        if j == 0:
            z = self._branch_input(x)
            if mask is not None:
                z = self._remove(z, mask)
        else:
            fused = torch.cat([x[:, :, 0].mean(dim=1, keepdim=True), _patch_major(x[:, :, 1:])], dim=1)
            if mask is not None:
                fused = self._remove(fused, mask)
            if hasattr(self, "balance2"):
                w = torch.sigmoid(self.config.gate_scale * self.balance2)
                z = (1 - w) * z + w * fused
            else:
                z = z + fused
        z = self.btadapter_T_layers[j](z, t, drop[0])
        trace[f"T.{j}"] = z
        z = self.btadapter_S_layers[j](z, t, drop[1])
        trace[f"S.{j}"] = z
        return z

    def _branch_input(self, x: Tensor) -> Tensor:  # [B, T, 1+P, C] -> [B, 1 + P*T, C]
        B, T, _, _ = x.shape
        position = self.position_embedding.weight
        seed = self.class_embedding if self.tower == "stan" else self.btadapter_cls_token[0, 0]
        cls = (x[:, :, 0].mean(dim=1, keepdim=True) + seed + position[0]) / 2
        patches = (x[:, :, 1:] + position[1:]).transpose(1, 2) + self.btadapter_time_embed.weight[:T]  # [B, P, T, C]
        return torch.cat([cls, patches.reshape(B, -1, x.shape[-1])], dim=1)

    @staticmethod
    def _remove(z: Tensor, mask: Tensor) -> Tensor:
        B, _, C = z.shape
        return torch.cat([z[:, :1], z[:, 1:][~mask.bool()].view(B, -1, C)], dim=1)

    def _output_gate(self, x: Tensor, z: Tensor) -> Tensor:  # class rows [B*T, C]
        if not hasattr(self, "balance1"):
            return z + x
        w = torch.sigmoid(self.config.output_gate_scale * self.balance1)
        return (1 - w) * z + w * x

    @staticmethod
    def _fused_tokens(x: Tensor, z: Tensor, B: int, T: int) -> Tensor:  # -> [B, 1+P, C], class last
        x = x.view(B, T, *x.shape[1:]).mean(dim=1)
        P = x.shape[1] - 1
        z_patches = z[:, 1:].view(B, P, -1, z.shape[-1]).mean(dim=2)
        return torch.cat([(x[:, 1:] + z_patches) / 2, (x[:, :1] + z[:, :1]) / 2], dim=1)


def _patch_major(x: Tensor) -> Tensor:  # [B, T, P, C] -> [B, P*T, C]
    return x.transpose(1, 2).reshape(x.shape[0], -1, x.shape[-1])
