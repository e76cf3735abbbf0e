"""Divided space-time attention in the tower itself: TimeSformer (arXiv:2102.05095), LanguageBind (arXiv:2310.01852)."""

import torch
from torch import Tensor, nn

from pyvidx.backbones.vit import ViTConfig
from pyvidx.layers.block import Block
from pyvidx.layers.plain import held, plain
from pyvidx.sizes import check_counts
from pyvidx.temporal.bt_adapter import TemporalLayer
from pyvidx.temporal.frames import frame_mean
from pyvidx.temporal.module import Grid, TemporalModule
from pyvidx.temporal.registry import register

CLASS_TOKENS = ("frame", "clip")


@register("separate")
class Separate(TemporalModule):
    """x + time, then x + FC(MHA_t(LN x)) over the frames of every location, before the tower's own block.

    As it starts (time tables zero, FC zero) the tower's numbers are those of single frames.

    Args:
        layers: only in the last this many layers of the tower; None: in all.
        time_length: rows of each time table, the largest T.
        every: a time table of its own in every layer; otherwise one, before the first.
        fc: False: no FC after the attention, which then starts at random. LanguageBind: every=True, fc=False.
        class_token: "frame": a class token per frame, which attends over time like the patches. "clip": one of the
            clip, without a place in time: copied to every frame, its attention results averaged over them.
    """

    reads_only = False

    def __init__(
        self,
        vision: ViTConfig,
        *,
        layers: int | None = None,
        time_length: int = 64,
        every: bool = False,
        fc: bool = True,
        class_token: str = "frame",
    ):
        super().__init__(vision)
        layers = vision.layers if layers is None else layers
        check_counts("Separate", layers=layers, time_length=time_length)
        if not 1 <= layers <= vision.layers:
            raise ValueError(f"Separate: layers must be in [1, {vision.layers}], got {layers}")
        if class_token not in CLASS_TOKENS:
            raise ValueError(f"Separate: class_token must be one of {CLASS_TOKENS}, got {class_token!r}")
        if class_token == "clip" and not vision.class_token:
            raise ValueError("Separate: class_token must be 'frame' for a tower without a class token, got 'clip'")
        self.first, self.class_token = vision.layers - layers, class_token
        self.time = nn.Parameter(torch.zeros(layers if every else 1, time_length, vision.width))
        sizes = (vision.width, vision.heads, vision.eps)
        self.temporal = nn.ModuleList(TemporalLayer(*sizes, fc=fc) for _ in range(layers))

    def check(self, T: int, P: int, frame_mask: Tensor | None = None) -> None:
        rows = self.time.shape[1]
        if T > rows:
            raise ValueError(f"Separate: T must be at most {rows}, the rows of the time table, got {T}")

    def block(
        self, i: int, block: Block, x: Tensor, frame_mask: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        j, T = i - self.first, x.shape[1]
        if j < 0:
            return block(x)
        time = held(self, "time")[j, :T, None] if j < len(self.time) else None
        layer = self.temporal[j]
        if self.class_token == "frame":
            x = x if time is None else x + time
            return block(x + layer(layer.norm(x), frame_mask=frame_mask))
        cls, z = x[:, :, :1], x[:, :, 1:]
        if j == 0:
            cls = frame_mean(cls, frame_mask)[:, None].expand_as(cls)
        z = z if time is None else z + time
        z = z + layer(layer.norm(z), frame_mask=frame_mask)
        x = torch.cat([cls, z], dim=2)
        y = block.attend(x)
        y = y if plain(block.out) else y.clone()  # a hook may have kept what the layer gave
        y[:, :, 0] = frame_mean(y[:, :, 0], frame_mask)[:, None]
        return block.feed_forward(x + y)
