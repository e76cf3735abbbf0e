"""The official pretraining step, written plainly in eager torch on the official tower: one process, official order."""

from typing import Any

import torch
from torch import Tensor, nn

from pyvidx.reference.bt_adapter import ReferenceBTAdapter
from pyvidx.temporal.masking import Drops


class ReferencePretraining(nn.Module):
    """tower: a ReferenceBTAdapter("mma"); text: ids [B, L] -> [B, E]; head: the official extra_proj."""

    def __init__(self, tower: ReferenceBTAdapter, text: nn.Module):
        super().__init__()
        E, C = tower.visual_projection.weight.shape
        self.model, self.text = tower, text
        self.head = nn.Sequential(nn.Linear(C, E), nn.LayerNorm(E))

    def forward(
        self, pixels: Tensor, ids: Tensor, mask: Tensor, drops: Drops | None = None, trace: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted losses: video-text, branch-text, branch-token.

        pixels [B, T, 3, h, w]; mask bool [B, T*P], True = removed, frame-major; trace as in ReferenceBTAdapter.
        """
        trace = {} if trace is None else trace
        video, text, tower = self.model(pixels, mask, trace, drops), self.text(ids), self.model
        kept = trace[f"S.{tower.config.depth - 1}"][:, 1:]  # [B, K, C], patch-major
        with torch.no_grad():
            x = trace[f"backbone.{tower.config.vision.layers - 1}"][:, 1:]  # [B*T, P, C], frame-major
            x = tower.visual_projection(tower.post_layernorm(x)).reshape(*mask.shape, -1)
            teacher = x[~mask].view(*kept.shape[:2], -1)
        student = self.head(kept)
        student = student / student.norm(dim=-1, keepdim=True)
        teacher = teacher / teacher.norm(dim=-1, keepdim=True)
        mbta = (2 - 2 * (student * teacher).sum(dim=-1)).mean()
        return nce(video, text), 0.1 * nce(tower.visual_projection(kept).mean(dim=1), text), 0.1 * mbta


def nce(a: Tensor, b: Tensor) -> Tensor:  # [B, E]
    a, b = (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-8) for x in (a, b))
    rows = (100 * a @ b.T).log_softmax(dim=1).diagonal()
    columns = (100 * b @ a.T).log_softmax(dim=1).diagonal()
    return -rows.mean() - columns.mean()
