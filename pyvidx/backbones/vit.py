"""The image tower: one ViT for CLIP (arXiv:2103.00020), EVA (arXiv:2211.07636), SigLIP (arXiv:2303.15343) and SigLIP 2
(arXiv:2502.14786). What differs between them is data, see ViTConfig.

Everything after a tower sees [..., 1+P, C], row 0 the class token. What stands for it where a tower has none is said
here and nowhere else: `with_class` (its row), `positions` (its place: zeros) and `class_seed` (the vector it starts
from).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvidx.layers.attention import gather, gathered_values
from pyvidx.layers.block import ACTIVATIONS, Block, run_blocks
from pyvidx.layers.linear import dense
from pyvidx.layers.norm import add_norm
from pyvidx.layers.patch import patch_grid, patch_rows, resize_positions
from pyvidx.layers.plain import held, plain
from pyvidx.sizes import check

HIDDEN_ACTS = ("quick_gelu", "gelu", "gelu_tanh")
POOLS = ("class", "attention", "mean")


@dataclass(frozen=True)
class ViTConfig:
    """Sizes and kind of an image tower. The defaults are those of a CLIP; EVA_G and SIGLIP_B below are others.

    Attributes:
        image_size, patch_size: pixels; images are square. Pixels beyond the last whole patch are left out.
        width, heads, layers, mlp_width: C, H, L and the width of the MLP.
        embed_dim: E of the projection to the shared space; None where the weights have none.
        hidden_act: "quick_gelu" (OpenAI, MetaCLIP, DFN weights), "gelu" (LAION, DataComp, EVA) or "gelu_tanh" (SigLIP).
            The weights of all have the same names and shapes: a wrong one loads without complaint and gives wrong
            numbers.
        eps: of the LayerNorms. norm_eps: of the last one, after the blocks; None: eps.
        pool: "class": a class token in front of the patches. "attention": none; a learned probe attends to the
            normalized tokens, and an MLP follows. "mean": none, and the mean of the normalized tokens: SigLIP without
            its head, as language models see with it.
        norm_pre: a LayerNorm before the blocks.
        patch_bias, projection_bias: whether these products have one.
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
    norm_eps: float | None = None
    pool: str = "class"
    norm_pre: bool = True
    patch_bias: bool = False
    projection_bias: bool = False

    def __post_init__(self) -> None:
        check(self, zero=("layers",))
        if self.width % self.heads:
            raise ValueError(f"ViTConfig: width must be a multiple of heads, got {self.width} and {self.heads}")
        for name, known in (("hidden_act", HIDDEN_ACTS), ("pool", POOLS)):
            if getattr(self, name) not in known:
                raise ValueError(f"ViTConfig: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.image_size < self.patch_size:
            raise ValueError(
                f"ViTConfig: image_size must be at least patch_size, got {self.image_size} and {self.patch_size}"
            )

    @property
    def class_token(self) -> bool:
        """Whether there is one."""
        return self.pool == "class"

    @property
    def before(self) -> int:
        """Tokens before the patches: 1 or 0."""
        return int(self.class_token)

    @property
    def side(self) -> int:
        """Rows and columns of the patch grid of an image."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """P, patches of an image."""
        return self.side**2


# EVA-ViT-g/14 without its last block, as all of BLIP-2's family has it. norm_eps: 1e-5 in LAVIS and MA-LMM, 1e-6 in
# transformers.
EVA_G = ViTConfig(
    224, 14, 1408, 16, 39, 6144, hidden_act="gelu", eps=1e-6, norm_eps=1e-5, norm_pre=False, patch_bias=True
)  # fmt: skip
SIGLIP_B = ViTConfig(
    224, 16, 768, 12, 12, 3072, hidden_act="gelu_tanh", eps=1e-6, pool="attention", norm_pre=False, patch_bias=True
)  # fmt: skip


class AttentionPool(nn.Module):
    """SigLIP's head: MHA(probe, tokens), then x + MLP(LN x). Here in two steps, as other modules work between them."""

    def __init__(self, width: int, heads: int, mlp_width: int, hidden_act: str, eps: float):
        super().__init__()
        self.heads, self.hidden_act = heads, hidden_act
        self.probe = nn.Parameter(torch.randn(width) * width**-0.5)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def attend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the probe gives of normalized tokens. [..., N, C] -> [..., C].

        mask: bool, True = attended to, of a shape that broadcasts to [..., N].
        """
        probe = held(self, "probe")
        if plain(self.qkv):
            return dense(gathered_values(gather(probe, x, self.qkv, self.heads, mask), self.qkv), self.out)
        q = self.qkv(probe).chunk(3, dim=-1)[0].expand(*x.shape[:-2], 1, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for t in (q, *self.qkv(x).chunk(3, dim=-1)[1:]))
        mask = None if mask is None else mask[..., None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [..., H, 1, D]
        return self.out(y.flatten(-3))

    def feed_forward(self, x: Tensor) -> Tensor:
        """x + MLP(LN x). [..., C] -> [..., C]."""
        return x + dense(ACTIVATIONS[self.hidden_act](dense(self.norm(x), self.fc1)), self.fc2)


class ViT(nn.Module):
    """An image tower, with one parameter naming for every source of weights (pyvidx.weights).

    q, k and v come from one matrix. EVA's k has no bias: zeros stand for it.

    Args:
        config: sizes and kind.
        layers: original indices of the transformer layers to hold; default all.
        embeddings: hold the patch embedding, class token and first LayerNorm.
        head: hold the last LayerNorm and the projection. Without a class token the LayerNorm and the pooling are held
            in any case.
    """

    def __init__(self, config: ViTConfig, *, layers: range | None = None, embeddings: bool = True, head: bool = True):
        super().__init__()
        self.config = c = config
        C, p = c.width, c.patch_size
        self.position = nn.Parameter(torch.randn(c.before + c.patches, C) * C**-0.5)
        if embeddings:
            if c.class_token:
                self.class_token = nn.Parameter(torch.randn(C) * C**-0.5)
            self.patch = nn.Parameter(torch.randn(C, 3, p, p) * (3 * p * p) ** -0.5)
            self.patch_bias = nn.Parameter(torch.zeros(C)) if c.patch_bias else None
            self.norm_pre = nn.LayerNorm(C, eps=c.eps) if c.norm_pre else nn.Identity()
        indices = range(c.layers) if layers is None else layers
        # A dict by original index: a tower that lacks layers can not be filled with the wrong ones.
        self.blocks = nn.ModuleDict({str(i): Block(C, c.heads, c.mlp_width, c.hidden_act, c.eps) for i in indices})
        norm_eps = c.eps if c.norm_eps is None else c.norm_eps
        self.norm_post = nn.LayerNorm(C, eps=norm_eps) if head or not c.class_token else None
        attends = c.pool == "attention"
        self.pool = AttentionPool(C, c.heads, c.mlp_width, c.hidden_act, c.eps) if attends else None
        has_projection = head and c.embed_dim is not None
        self.projection = nn.Linear(C, c.embed_dim, bias=c.projection_bias) if has_projection else None

    @property
    def layers(self) -> range:
        """Original indices of the layers held."""
        indices = [int(i) for i in self.blocks]
        return range(indices[0], indices[-1] + 1) if indices else range(0)

    def forward(
        self,
        pixels: Tensor,
        layers: Sequence[int] | None = None,
        *,
        interpolate: bool = False,
        class_row: bool = False,
    ) -> tuple[Tensor, ...]:
        """Tokens of the chosen layers.

        Args:
            pixels: [..., 3, h, w], normalized; any leading axes, [B, T] for video.
            layers: original indices of the layers whose outputs are wanted, ascending; default the last one held.
                Layers after the last wanted one are not run.
            interpolate: resize the position table (bicubic) for images of another size; otherwise such images are an
                error.
            class_row: of the last wanted layer, give the class token alone where the tower has one: `embedding` reads
                no other, and the layer takes next to no work.

        Returns:
            one [..., 1+P, C] per wanted layer, first the class token or what stands for it, see `with_class`; with
            class_row the last may be [..., 1, C]. Not normalized.

        Raises:
            ValueError: pixels or layers do not fit.
        """
        x = self.embed(pixels, interpolate=interpolate)
        return tuple(self.with_class(x) for x in self.run(x, layers, class_row=class_row))

    def run(self, x: Tensor, layers: Sequence[int] | None = None, *, class_row: bool = False) -> tuple[Tensor, ...]:
        """The tower's own tokens [..., N, C] of the chosen layers, from the input of the first layer held.

        N = 1+P with a class token, P without. class_row: as in `forward`.
        """
        own = self.layers
        wanted = list(own[-1:]) if layers is None else list(layers)
        if not own and layers is None:
            return (x,)
        if not wanted or wanted != sorted(set(wanted)) or wanted[0] not in own or wanted[-1] not in own:
            raise ValueError(f"ViT: layers must be ascending and of {[*own]}, those it holds, got {wanted}")
        layers = range(own[0], wanted[-1] + 1)
        found = run_blocks(
            [self.blocks[str(i)] for i in layers],
            x,
            [layers.index(i) for i in wanted],
            class_row=class_row and self.config.class_token,
        )
        return tuple(found)

    def embed(self, pixels: Tensor, *, interpolate: bool = False) -> Tensor:
        """The input of layer 0: LN of `tokens` where there is a first LayerNorm. [..., 3, h, w] -> [..., N, C]."""
        x, table = self._rows(pixels, interpolate)
        if isinstance(self.norm_pre, nn.Identity):
            return self.norm_pre(x + table)
        return add_norm(x, table.expand_as(x), self.norm_pre)[1]

    def tokens(self, pixels: Tensor, *, interpolate: bool = False) -> Tensor:
        """[class; patches W + b] + position, before the first LayerNorm. [..., 3, h, w] -> [..., N, C]."""
        x, table = self._rows(pixels, interpolate)
        return x + table

    def _rows(self, pixels: Tensor, interpolate: bool) -> tuple[Tensor, Tensor]:
        """The two summands of `tokens`, [..., N, C] and [N, C]."""
        whole = self._whole
        x, rows, columns = patch_rows("ViT", pixels, held(self, "patch"), held(self, "patch_bias"), whole=whole)
        if self.config.class_token:
            x = torch.cat([held(self, "class_token").expand(x.shape[0], 1, -1), x], dim=1)
        return x.view(*pixels.shape[:-3], *x.shape[1:]), self._table(rows, columns, interpolate)

    def with_class(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The tower's own tokens of any layer with a class row in front. [..., N, C] -> [..., 1+P, C].

        Without a class token it is what the pooling probe gives of the tokens, MHA(probe, LN x), or the mean of LN x:
        after the last layer `embedding` makes the tower's own of it.

        Args:
            mask: bool, True = a token that the probe attends to, of a shape that broadcasts to [..., N].
        """
        if self.config.class_token:
            return x
        normed = self.norm(x)
        if self.pool is not None:
            row = self.pool.attend(normed, mask)
        elif mask is None:
            row = normed.mean(dim=-2)
        else:
            row = normed.masked_fill(~mask[..., None], 0).sum(dim=-2) / mask.sum(dim=-1, keepdim=True)
        return torch.cat([row[..., None, :].to(x.dtype), x], dim=-2)

    def own(self, x: Tensor) -> Tensor:
        """The other way: [..., 1+P, C] -> the tower's own tokens [..., N, C]."""
        return x if self.config.class_token else x[..., 1:, :]

    def class_seed(self) -> Tensor:
        """[C], the vector that a class token starts from; the pooling probe where there is none, or zeros."""
        if self.config.class_token:
            return held(self, "class_token")
        return torch.zeros_like(self.norm_post.weight) if self.pool is None else held(self.pool, "probe")

    def positions(self, rows: int, columns: int, *, interpolate: bool = False) -> Tensor:
        """The position table for a grid of patches, [1 + rows * columns, C], class token first, or zeros for it.

        Raises:
            ValueError: without interpolate, the grid is not that of the configuration.
        """
        table = self._table(rows, columns, interpolate)
        return table if self.config.class_token else F.pad(table, (0, 0, 1, 0))

    def _table(self, rows: int, columns: int, interpolate: bool) -> Tensor:
        side, position = self.config.side, held(self, "position")
        if (rows, columns) == (side, side):
            return position
        if not interpolate:
            size, p = self.config.image_size, self.config.patch_size
            raise ValueError(
                f"ViT: images must be {size}x{size}, got {rows * p}x{columns * p}; "
                "pass interpolate=True to resize the position table"
            )
        return resize_positions(position, rows, columns, before=self.config.before)

    def grid_of(self, pixels: Tensor, op: str = "ViT") -> tuple[int, int]:
        """Rows and columns of the patches of pixels [..., 3, h, w].

        Raises:
            ValueError: pixels do not fit; op says for whom.
        """
        return patch_grid(op, pixels, self.config.patch_size, whole=self._whole)

    @property
    def _whole(self) -> bool:
        """Images must be whole patches, unless those the tower was made for are not (SigLIP: 384 = 27 x 14 + 6)."""
        return self.config.image_size % self.config.patch_size == 0

    def grid(self, patches: int, interpolate: bool | tuple[int, int] = False) -> tuple[int, int]:
        """Rows and columns of so many patches, of stored tokens.

        Args:
            interpolate: False: those of the configuration; True: any square; (rows, columns): these.

        Raises:
            ValueError: the number of patches is another, or interpolate is neither.
        """
        pair = isinstance(interpolate, Sequence) and len(interpolate) == 2 and all(n > 0 for n in interpolate)
        if not isinstance(interpolate, bool) and not pair:
            raise ValueError(f"ViT: interpolate must be a bool or (rows, columns) of the patches, got {interpolate}")
        side = math.isqrt(patches) if interpolate else self.config.side
        rows, columns = (side, side) if isinstance(interpolate, bool) else interpolate
        if rows * columns != patches:
            raise ValueError(
                f"ViT: tokens must be of {1 + rows * columns} rows, class token first, got {1 + patches}; for "
                "pixels of another size pass interpolate=True, or (rows, columns) of the patches if they are no square"
            )
        return rows, columns

    def norm(self, x: Tensor) -> Tensor:
        """The LayerNorm after the blocks ("ln_vision" of BLIP-2): computed in float32, cast back to the dtype of x."""
        n = self.norm_post
        if not plain(n):
            return n(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.layer_norm(x.to(wide), n.normalized_shape, n.weight.to(wide), n.bias.to(wide), n.eps).to(x.dtype)

    def head(self, row: Tensor) -> Tensor:
        """What is projected, of a class row: LN x; x + MLP(LN x) of what the probe gave; or the mean as it is.

        [..., C] -> [..., C].
        """
        if self.config.class_token:
            return self.norm(row)
        return row if self.pool is None else self.pool.feed_forward(row)

    def project(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., E]; without a projection E is C."""
        return x if self.projection is None else dense(x, self.projection)

    def embedding(self, tokens: Tensor) -> Tensor:
        """The image embedding of last tokens with their class row. [..., 1+P, C] -> [..., E], not normalized."""
        if self.norm_post is None:
            raise ValueError("ViT: this tower was built without its head")
        return self.project(self.head(tokens[..., 0, :]))
