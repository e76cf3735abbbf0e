"""EVA-ViT (arXiv:2211.07636) as BLIP-2, InstructBLIP and MA-LMM use it: the frame encoder of the memories."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvidx.layers.block import Block
from pyvidx.layers.patch import patch_grid, patch_rows, resize_positions
from pyvidx.layers.plain import held, plain
from pyvidx.sizes import check


@dataclass(frozen=True)
class EVAVisionConfig:
    """Sizes of an EVA-ViT. The defaults are EVA-ViT-g/14 without its last block, as all of BLIP-2's family has it.

    Attributes:
        image_size, patch_size: pixels; images are square.
        width, heads, layers, mlp_width: C, H, L and the width of the MLP.
        eps: of the blocks' LayerNorms.
        norm_eps: of the LayerNorm after the tower ("ln_vision"): 1e-5 in LAVIS and MA-LMM, 1e-6 in transformers.
    """

    image_size: int = 224
    patch_size: int = 14
    width: int = 1408
    heads: int = 16
    layers: int = 39
    mlp_width: int = 6144
    eps: float = 1e-6
    norm_eps: float = 1e-5

    def __post_init__(self):
        check(self, zero=("layers",))
        if self.width % self.heads:
            raise ValueError(f"EVAVisionConfig: width must be a multiple of heads, got {self.width} and {self.heads}")
        if self.image_size % self.patch_size:
            raise ValueError(
                "EVAVisionConfig: image_size must be a multiple of patch_size, "
                f"got {self.image_size} and {self.patch_size}"
            )

    @property
    def patches(self) -> int:
        """Patches of an image; its tokens are one more."""
        return (self.image_size // self.patch_size) ** 2


class EVAVision(nn.Module):
    """EVA-ViT and the LayerNorm after it, with one parameter naming for every source of weights.

    Blocks are those of CLIP with an exact GELU. q, k and v come from one matrix; its k bias is zero in all published
    weights. The tower itself starts frozen, the norm does not: that is how MA-LMM is trained.
    """

    def __init__(self, config: EVAVisionConfig):
        super().__init__()
        self.config = config
        C, p = config.width, config.patch_size
        self.class_token = nn.Parameter(torch.randn(C) * C**-0.5)
        self.position = nn.Parameter(torch.randn(1 + config.patches, C) * C**-0.5)
        self.patch = nn.Conv2d(3, C, p, stride=p)
        self.blocks = nn.ModuleList(
            Block(C, config.heads, config.mlp_width, "gelu", config.eps) for _ in range(config.layers)
        )
        self.norm_post = nn.LayerNorm(C, eps=config.norm_eps)
        self.freeze()

    def freeze(self) -> None:
        """No gradients for the tower; the norm after it keeps its own."""
        for name, p in self.named_parameters():
            p.requires_grad_(name.startswith("norm_post"))

    def forward(self, pixels: Tensor, *, interpolate: bool = False) -> Tensor:
        """LN(ViT(pixels)), the frame features of MA-LMM before their temporal embedding.

        Args:
            pixels: [..., 3, h, w], normalized; any leading axes, [B, T] for video: all frames are one batch.
            interpolate: resize the position table for images of another size; otherwise such images are an error.

        Returns:
            [..., N, C], class token first.

        Raises:
            ValueError: pixels do not fit.
        """
        x = self.embed(pixels, interpolate=interpolate)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def norm(self, x: Tensor) -> Tensor:
        """ "ln_vision": computed in float32, cast back to the dtype of x."""
        n = self.norm_post
        if not plain(n):
            return n(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.layer_norm(x.to(wide), n.normalized_shape, n.weight.to(wide), n.bias.to(wide), n.eps).to(x.dtype)

    def embed(self, pixels: Tensor, *, interpolate: bool = False) -> Tensor:
        """[class; patches W + b] + position: the input of block 0. [..., 3, h, w] -> [..., N, C]."""
        side, position = math.isqrt(self.config.patches), held(self, "position")
        if plain(self.patch):
            x, rows, columns = patch_rows("EVAVision", pixels, self.patch.weight, self.patch.bias)
        else:
            rows, columns = patch_grid("EVAVision", pixels, self.config.patch_size)
            x = self.patch(pixels.to(position.dtype).flatten(0, -4)).flatten(2).transpose(1, 2)
        if (rows, columns) != (side, side):
            if not interpolate:
                size, (h, w) = self.config.image_size, pixels.shape[-2:]
                raise ValueError(
                    f"EVAVision: images must be {size}x{size}, got {h}x{w}; "
                    "resize them, or call the tower itself with interpolate=True, which resizes the position table"
                )
            position = resize_positions(position, rows, columns)
        x = torch.cat([held(self, "class_token").expand(x.shape[0], 1, -1), x], dim=1) + position
        return x.view(*pixels.shape[:-3], *x.shape[1:])
