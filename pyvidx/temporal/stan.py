"""STAN (arXiv:2301.11116): the ungated branch, which starts its class token from the tower's own."""

from torch import Tensor

from pyvidx.backbones.vit import ViT, ViTConfig
from pyvidx.temporal.branch import Branch
from pyvidx.temporal.registry import register


@register("stan")
class STAN(Branch):
    """Plain sums of backbone and branch, in every layer and at the output. The paper trains CLIP as well.

    Args:
        depth, time_length: as in Branch.
        per_frame: pooled is [B, T, E], one embedding per frame and zero where a frame is not real, for losses that
            weigh the frames; otherwise their mean.
    """

    seeded = False

    def __init__(self, vision: ViTConfig, *, depth: int = 4, time_length: int = 64, per_frame: bool = False):
        super().__init__(vision, depth=depth, time_length=time_length, gated=False)
        self.per_frame = per_frame

    def seed(self, tower: ViT) -> Tensor:
        return tower.class_seed()
