"""A clip of scenes for the tests of commands."""

import torch
from torch import Tensor


def drawn_clip(seconds_per_scene: float = 2.0, size: tuple[int, int] = (240, 320), fps: int = 25):
    """Three scenes that look different: a red square moving right, a blue disk growing, green stripes rolling down."""
    h, w = size
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    steps = int(seconds_per_scene * fps)

    def painted(mask: Tensor, color: tuple[int, int, int], ground: tuple[int, int, int]) -> Tensor:
        return torch.where(mask[..., None], torch.tensor(color), torch.tensor(ground)).to(torch.uint8)

    for i in range(steps):
        left = i * (w - 80) // steps
        yield painted((x >= left) & (x < left + 80) & (y >= 80) & (y < 160), (220, 40, 40), (235, 235, 225))
    for i in range(steps):
        radius = 20 + i * 90 // steps
        yield painted((x - w // 2) ** 2 + (y - h // 2) ** 2 < radius**2, (40, 80, 220), (20, 20, 30))
    for i in range(steps):
        yield painted((y - 2 * i) // 20 % 2 == 0, (40, 170, 80), (240, 220, 90))
