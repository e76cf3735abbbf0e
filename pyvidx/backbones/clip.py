"""The image tower of CLIP (arXiv:2103.00020): a ViT whose chosen layers' tokens are returned."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyvidx.layers.block import Block
from pyvidx.layers.linear import dense
from pyvidx.layers.patch import patch_rows, resize_positions
from pyvidx.layers.plain import held
from pyvidx.sizes import check


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes of a CLIP image tower.

    Attributes:
        image_size, patch_size: pixels; images are square.
        width, heads, layers, mlp_width: C, H, L and the width of the MLP.
        embed_dim: E of the projection to the shared space; None where the weights have none.
        hidden_act: "quick_gelu" (OpenAI, MetaCLIP, DFN weights) or "gelu" (LAION, DataComp). Both have the same weight
            names and shapes: a wrong one loads without complaint and gives wrong numbers.
        eps: of every LayerNorm.
    """

    image_size: int
    patch_size: int
    width: int
    heads: int
    layers: int
    mlp_width: int
    embed_dim: int | None = None
    hidden_act: str = "quick_gelu"
    eps: float = 1e-5

    def __post_init__(self):
        check(self)
        if self.width % self.heads:
            raise ValueError(f"CLIPVisionConfig: width must be a multiple of heads, got {self.width} and {self.heads}")
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(f"CLIPVisionConfig: hidden_act must be quick_gelu or gelu, got {self.hidden_act!r}")
        if self.image_size % self.patch_size:
            raise ValueError(
                "CLIPVisionConfig: image_size must be a multiple of patch_size, "
                f"got {self.image_size} and {self.patch_size}"
            )

    @property
    def patches(self) -> int:
        """P, patches of an image."""
        return (self.image_size // self.patch_size) ** 2


class CLIPVision(nn.Module):
    """CLIP's image tower, with one parameter naming for every source of weights (pyvidx.weights).

    Args:
        config: sizes.
        layers: original indices of the transformer layers to hold; default all.
        embeddings: hold the patch embedding, class token and first LayerNorm.
        head: hold the last LayerNorm and the projection.
    """

    def __init__(
        self, config: CLIPVisionConfig, *, layers: range | None = None, embeddings: bool = True, head: bool = True
    ):
        super().__init__()
        self.config = config
        C, P, p = config.width, config.patches, config.patch_size
        self.position = nn.Parameter(torch.randn(1 + P, C) * C**-0.5)
        if embeddings:
            self.class_token = nn.Parameter(torch.randn(C) * C**-0.5)
            self.patch = nn.Parameter(torch.randn(C, 3, p, p) * (3 * p * p) ** -0.5)
            self.norm_pre = nn.LayerNorm(C, eps=config.eps)
        indices = range(config.layers) if layers is None else layers
        # A dict by original index: a tower that lacks layers can not be filled with the wrong ones.
        self.blocks = nn.ModuleDict(
            {str(i): Block(C, config.heads, config.mlp_width, config.hidden_act, config.eps) for i in indices}
        )
        self.norm_post = nn.LayerNorm(C, eps=config.eps) if head else None
        has_projection = head and config.embed_dim is not None
        self.projection = nn.Linear(C, config.embed_dim, bias=False) if has_projection else None

    @property
    def layers(self) -> range:
        """Original indices of the layers held."""
        indices = [int(i) for i in self.blocks]
        return range(indices[0], indices[-1] + 1)

    def forward(
        self, pixels: Tensor, layers: Sequence[int] | None = None, *, interpolate: bool = False
    ) -> tuple[Tensor, ...]:
        """Tokens of the chosen layers.

        Args:
            pixels: [..., 3, h, w], normalized; any leading axes, [B, T] for video.
            layers: original indices of the layers whose outputs are wanted, ascending; default the last one held.
                Layers after the last wanted one are not run.
            interpolate: resize the position table for images of another size; otherwise such images are an error.

        Returns:
            one [..., N, C] per wanted layer, N = 1 + patches, class token first. Not normalized.

        Raises:
            ValueError: pixels or layers do not fit.
        """
        return self.run(self.embed(pixels, interpolate=interpolate), layers)

    def run(self, x: Tensor, layers: Sequence[int] | None = None) -> tuple[Tensor, ...]:
        """The same from the input of the first layer held, [..., N, C]."""
        held = self.layers
        wanted = [held[-1]] if layers is None else list(layers)
        if not wanted or wanted != sorted(set(wanted)) or wanted[0] < held[0] or wanted[-1] > held[-1]:
            raise ValueError(f"CLIPVision: layers must be ascending and in [{held[0]}, {held[-1]}], got {wanted}")
        found = []
        for i in range(held[0], wanted[-1] + 1):
            x = self.blocks[str(i)](x)
            if i == wanted[len(found)]:
                found.append(x)
        return tuple(found)

    def embed(self, pixels: Tensor, *, interpolate: bool = False) -> Tensor:
        """LN([class; patches W] + position): the input of layer 0. [..., 3, h, w] -> [..., 1+P, C]."""
        return self.norm_pre(self.tokens(pixels, interpolate=interpolate))

    def tokens(self, pixels: Tensor, *, interpolate: bool = False) -> Tensor:
        """[class; patches W] + position, before the first LayerNorm. [..., 3, h, w] -> [..., 1+P, C]."""
        x, rows, columns = patch_rows("CLIPVision", pixels, held(self, "patch"))
        x = torch.cat([held(self, "class_token").expand(x.shape[0], 1, -1), x], dim=1)
        x = x + self.positions(rows, columns, interpolate=interpolate)
        return x.view(*pixels.shape[:-3], *x.shape[1:])

    def positions(self, rows: int, columns: int, *, interpolate: bool = False) -> Tensor:
        """The position table for a grid of patches, [1 + rows * columns, C], class token first.

        Raises:
            ValueError: without interpolate, the grid is not that of the configuration.
        """
        side, position = math.isqrt(self.config.patches), held(self, "position")
        if (rows, columns) == (side, side):
            return position
        if not interpolate:
            size, p = self.config.image_size, self.config.patch_size
            raise ValueError(
                f"CLIPVision: images must be {size}x{size}, got {rows * p}x{columns * p}; "
                "pass interpolate=True to resize the position table"
            )
        return resize_positions(position, rows, columns)

    def grid(self, patches: int, interpolate: bool | tuple[int, int] = False) -> tuple[int, int]:
        """Rows and columns of so many patches, of stored tokens.

        Args:
            interpolate: False: those of the configuration; True: any square; (rows, columns): these.

        Raises:
            ValueError: the number of patches is another.
        """
        side = math.isqrt(patches if interpolate else self.config.patches)
        rows, columns = (side, side) if isinstance(interpolate, bool) else interpolate
        if rows * columns != patches:
            raise ValueError(
                f"CLIPVision: tokens must be of {1 + rows * columns} rows, class token first, got {1 + patches}; for "
                "pixels of another size pass interpolate=True, or (rows, columns) of the patches if they are no square"
            )
        return rows, columns

    def embedding(self, tokens: Tensor) -> Tensor:
        """The image embedding, projection(LN(class token)). Last tokens [..., N, C] -> [..., E], not normalized."""
        if self.norm_post is None:
            raise ValueError("CLIPVision: this tower was built without its head")
        x = self.norm_post(tokens[..., 0, :])
        return x if self.projection is None else dense(x, self.projection)
