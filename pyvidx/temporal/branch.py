"""Branches beside the tower: BT-Adapter, and the steps that led to it (arXiv:2309.15785, table 6)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyvidx.backbones.vit import ViT, ViTConfig
from pyvidx.layers.norm import foldable
from pyvidx.layers.plain import held
from pyvidx.ops import output_gate
from pyvidx.sizes import check_counts
from pyvidx.temporal.bt_adapter import BTAdapterBranch, split_rows
from pyvidx.temporal.encoding import Encoding
from pyvidx.temporal.frames import frame_mean, real_only
from pyvidx.temporal.grouping import Grouping, grouping
from pyvidx.temporal.module import OUTPUTS, Grid, TemporalModule
from pyvidx.temporal.registry import register


@register("branch")
class Branch(TemporalModule):
    """d layers of time and space attention beside the last d layers of the tower; see pyvidx.temporal.bt_adapter.

    Args:
        depth: d; layer j reads the output of backbone layer L - d + j. Of 1 layer there are no tokens, which are those
            after the last layer but one.
        time_length: rows of the time table. Longer clips, up to twice that, are averaged in pairs of frames.
        interact: every layer takes in the backbone's newest tokens. False: only the first reads the backbone and the
            two streams meet again at the output ("+ branch modeling"). True: "+ backbone-branch interaction".
        gated: mix channel by channel with sigmoid weights, 0.5 at first; otherwise plain sums.
        gate_scale, output_gate_scale: factors of the gates' logits.
        eps: of the branch's LayerNorms; None: the tower's.

    Frame masks: for clips of at most time_length frames. Masks of patches: see pyvidx.temporal.grouping.
    """

    seeded = True  # with a class seed of its own
    per_frame = False
    masks = True

    def __init__(
        self,
        vision: ViTConfig,
        *,
        depth: int = 4,
        time_length: int = 64,
        interact: bool = True,
        gated: bool = True,
        gate_scale: float = 100.0,
        output_gate_scale: float = 1e4,
        eps: float | None = None,
    ):
        super().__init__(vision)
        check_counts("Branch", depth=depth, time_length=time_length)
        if not 1 <= depth <= vision.layers:
            raise ValueError(f"Branch: depth must be in [1, {vision.layers}], got {depth}")
        self.depth, self.time_length, self.output_gate_scale = depth, time_length, output_gate_scale
        self.outputs = OUTPUTS if depth > 1 else ("pooled",)
        self.branch = BTAdapterBranch(
            vision.width,
            vision.heads,
            vision.mlp_width,
            depth=depth,
            time_length=time_length,
            gated=gated,
            gate_scale=gate_scale,
            interact=interact,
            seeded=self.seeded,
            hidden_act=vision.hidden_act,
            eps=vision.eps if eps is None else eps,
        )
        self.output_gate = nn.Parameter(torch.zeros(vision.width)) if gated else None

    @property
    def reads(self) -> range:
        return range(self.vision.layers - self.depth, self.vision.layers)

    def init_from(self, tower: ViT) -> None:
        """The official start of training: space attention and MLP copied from the backbone layers read."""
        for i, layer in zip(self.reads, self.branch.spatial):
            layer.load_state_dict(tower.blocks[str(i)].state_dict())

    def check(self, T: int, P: int, frame_mask: Tensor | None = None, mask: Tensor | None = None) -> None:
        self.grouping(T, P, mask=mask, frame_mask=frame_mask)

    def grouping(self, T: int, P: int, **options: Any) -> Grouping:
        """The arrangement of the tokens of T frames of P patches; options of pyvidx.temporal.grouping.grouping."""
        return grouping(T, P, time_length=self.time_length, **options)

    def encode(
        self,
        xs: Sequence[Tensor],
        tower: ViT,
        frame_mask: Tensor | None = None,
        outputs: Sequence[str] = OUTPUTS,
        grid: Grid | None = None,
        mask: Tensor | None = None,
        per_frame: bool | None = None,
    ) -> Encoding:
        """tokens: backbone and branch after the last layer but one, averaged over time and with each other.

        mask: True = removed from the branch, see pyvidx.temporal.grouping; not with "tokens". per_frame: pooled is
        [B, T, E], one embedding per frame and zero where a frame is not real; default as the module was made.
        """
        wanted, x = list(xs if "pooled" in outputs else xs[:-1]), xs[0]
        group = self.grouping(x.shape[1], x.shape[2] - 1, mask=mask, frame_mask=frame_mask, device=x.device)
        return encode_branch(
            self.branch,
            wanted,
            tower,
            self.positions(tower, grid),
            group,
            outputs,
            gate=held(self, "output_gate"),
            gate_scale=self.output_gate_scale,
            seed=self.seed(tower),
            per_frame=self.per_frame if per_frame is None else per_frame,
        )

    def positions(self, tower: ViT, grid: Grid | None = None) -> Tensor:
        """The tower's position table, [1+P, C], of the grid that the patches are on."""
        side = tower.config.side
        return tower.positions(*(grid or (side, side)), interpolate=grid is not None)

    def frame_vectors(self, x: Tensor, cls: Tensor, tower: ViT) -> Tensor:
        """What the projection makes of every frame's embedding, [B, T, C]; see `frame_vectors` below."""
        return frame_vectors(x, cls, tower, held(self, "output_gate"), self.output_gate_scale)

    def seed(self, tower: ViT) -> Tensor | None:
        """[C], in place of the branch's own."""
        return None


@register("bt_adapter")
class BTAdapterModule(Branch):
    """BT-Adapter: the branch that interacts with the backbone, gated. Its published weights are those of
    pyvidx.models.BTAdapter, whose parameters have the same names."""

    def __init__(
        self,
        vision: ViTConfig,
        *,
        depth: int = 4,
        time_length: int = 64,
        gated: bool = True,
        gate_scale: float = 100.0,
        output_gate_scale: float = 1e4,
        eps: float | None = None,
    ):
        scales = {"gate_scale": gate_scale, "output_gate_scale": output_gate_scale}
        super().__init__(vision, depth=depth, time_length=time_length, gated=gated, eps=eps, **scales)


def encode_branch(
    branch: BTAdapterBranch,
    xs: Sequence[Tensor],
    tower: ViT,
    position: Tensor,
    group: Grouping,
    outputs: Sequence[str],
    *,
    gate: Tensor | None = None,
    gate_scale: float = 1e4,
    seed: Tensor | None = None,
    per_frame: bool = False,
) -> Encoding:
    """The branch and the heads on backbone outputs. What is not asked for is not computed.

    Args:
        xs: [B, T, 1+P, C] of backbone layers L-d, L-d+1, ..., to the last one or, without "pooled", the last but one.
        position: [1+P, C], the tower's table, of the grid that the patches are on.
        gate, gate_scale: of the output, see frame_vectors.
        seed: [C], in place of the branch's own.
        per_frame: pooled is [B, T, E], zero where a frame is not real.
    """
    last, real = len(xs) - 1, group.frame_mask
    layers = branch.rows(xs[:-1], position, group, seed=seed)
    # Of the last layer less may be needed than its tokens.
    mixed = branch.mix(last, xs[-1], layers[-1] if layers else None, position, group, seed=seed)
    if "pooled" not in outputs:
        patches, cls = branch.spatial[last].mean_tokens(mixed, group)
        return Encoding(fused_tokens(xs[last], patches, cls, real))
    tokens = None
    if "tokens" in outputs:
        z, cls = split_rows(layers[-1])
        tokens = fused_tokens(xs[last - 1], group.patch_mean(z), cls, real)
    frames = frame_vectors(xs[last], branch.spatial[last].class_token(mixed, real), tower, gate, gate_scale)
    # The projection is linear: the mean of the frames' projections is the projection of their mean.
    pooled = real_only(tower.project(frames), real) if per_frame else tower.project(frame_mean(frames, real))
    return Encoding(tokens, pooled)


def frame_vectors(x: Tensor, cls: Tensor, tower: ViT, gate: Tensor | None, gate_scale: float) -> Tensor:
    """The tower's head of (1 - w) cls + w X_cls of every frame, w = sigmoid(gate_scale * gate); without a gate of
    cls + X_cls. The head is a LayerNorm, or SigLIP's residual MLP.

    x [B, T, 1+P, C] of the last backbone layer, cls [B, C] of the last branch layer -> [B, T, C].
    """
    norm = foldable(tower.norm_post, x) if tower.config.class_token else None
    frames = output_gate(x[:, :, 0], cls, gate, scale=gate_scale, norm=norm)
    return tower.head(frames) if norm is None else frames


def fused_tokens(x: Tensor, patches: Tensor, cls: Tensor, frame_mask: Tensor | None = None) -> Tensor:
    """What a language model gets: means over time of backbone and branch, averaged; patches first, class token last.

    x [B, T, 1+P, C] of the backbone, patches [B, P, C] (frame means) and cls [B, C] of the branch -> [B, 1+P, C].
    """
    x = frame_mean(x, frame_mask)
    return torch.cat([x[:, 1:] + patches, (x[:, 0] + cls)[:, None]], dim=1) / 2
