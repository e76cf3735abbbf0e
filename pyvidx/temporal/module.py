"""What gives an image tower a sense of time: the interface of every temporal module.

A frozen image tower encodes frames one by one; a TemporalModule works beside it (it only reads the outputs of some
layers) or inside it (it changes what goes in, or wraps the blocks). pyvidx.models.VideoEncoder joins the two:

    x = embed(tokens + positions)                  [B, T, N, C], before the tower's first LayerNorm
    x = block(i, tower block i, x)                 for every layer up to the last that is read
    encode([outputs of the layers in `reads`])     tokens [B, *, C] and pooled [B, E]

Inside the tower N = 1+P, the class token first, or P where it has none: `self.before` is 1 or 0. What `encode` gets has
a class row in any case, [B, T, 1+P, C]: what stands for a class token is said in pyvidx.backbones.vit.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pyvidx.backbones.vit import ViT, ViTConfig
from pyvidx.layers.block import Block
from pyvidx.temporal.encoding import Encoding
from pyvidx.temporal.frames import frame_mean

OUTPUTS = ("tokens", "pooled")
Grid = tuple[int, int]


class TemporalModule(nn.Module):
    """Base class; as it is, it averages what the tower makes of each frame.

    Frame masks: frame_mask is bool [B, T], True = a real frame, or None where all are. The caller has put zeros (or
    what a tower makes of them) where frames are not real; a module leaves them out of every mean and softmax over time.

    Grids: grid is (rows, columns) of the patches where the pixels are of another size than the tower was made for, or
    None, and then left out of the call.

    Attributes:
        name: under which it is registered.
        outputs: what `encode` can give, of OUTPUTS.
        reads: original indices of the backbone layers whose outputs `encode` wants.
        reads_only: the tower runs untouched, `embed` and `block` are not called: its outputs may be cached.
        class_row: of the last layer in `reads`, `encode` looks at the class row alone: where a tower has a class token
            it may be given no other row.
        masks: `check` and `encode` take a mask of patches to leave out; see pyvidx.temporal.branch.
        sees_parts: `embed` and `block` also work on some of the patches of each frame, with grid (1, their number).
        spec: {"name": ..., options}, what `pyvidx.temporal.create` made it of.
    """

    name: str
    outputs: tuple[str, ...] = OUTPUTS
    reads_only = True
    class_row = False
    masks = False
    sees_parts = True
    spec: dict[str, Any]

    def __init__(self, vision: ViTConfig):
        super().__init__()
        if vision.layers < 2:  # tokens are those of the last layer but one
            raise ValueError(f"TemporalModule: the tower must have at least 2 layers, got {vision.layers}")
        self.vision, self.before = vision, vision.before

    @property
    def reads(self) -> range:
        return range(self.vision.layers - 2, self.vision.layers)

    def init_from(self, tower: ViT) -> None:
        """Take over from the tower what training starts from; a module that starts by itself takes nothing."""

    def check(self, T: int, P: int, frame_mask: Tensor | None = None) -> None:
        """Refuse, before any work, clips of T frames of P patches that `encode` would refuse.

        Raises:
            ValueError: T, or frame_mask, does not fit.
        """

    def embed(self, x: Tensor, tower: ViT, frame_mask: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """The tokens before the tower's first LayerNorm, positions added: [B, T, N, C] -> the same, or the module's own
        layout [B, ..., L, C], which its `block` and `encode` then take."""
        return x

    def block(
        self, i: int, block: Block, x: Tensor, frame_mask: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        """Backbone layer i with whatever the module does around it. x as `embed` left it."""
        return block(x)

    def rows(self, x: Tensor, tower: ViT, frame_mask: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """What `encode` gets of a layer's output: x as `block` left it, with a class row where the tower has none."""
        return tower.with_class(x)

    def patches(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """The patches of x as `block` left it, [B, T, P, C]."""
        return x[:, :, self.before :]

    def encode(
        self,
        xs: Sequence[Tensor | None],
        tower: ViT,
        frame_mask: Tensor | None = None,
        outputs: Sequence[str] = OUTPUTS,
        grid: Grid | None = None,
    ) -> Encoding:
        """From the outputs of the layers in `reads` to the video. Without "pooled" the last of them may be None.

        tokens: `pool` of the last layer but one, as video language models take it. pooled [B, E]: the mean of the
        frames' image embeddings. What is not in outputs is None.
        """
        tokens = self.pool(xs[-2], frame_mask, grid) if "tokens" in outputs else None
        pooled = frame_mean(tower.embedding(xs[-1]), frame_mask) if "pooled" in outputs else None
        return Encoding(tokens, pooled)

    def pool(self, x: Tensor, frame_mask: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """x [B, T, 1+P, C] -> tokens [B, 1+P, C]: the mean over the frames; patches first, class token last."""
        return frame_mean(x, frame_mask).roll(-1, dims=1)
