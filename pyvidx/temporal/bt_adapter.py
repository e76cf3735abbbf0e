"""The branch of BT-Adapter (One For All, arXiv:2309.15785): time and space attention beside a frozen CLIP tower.

Branch layer j reads the output X of backbone layer L - d + j. Its tokens are patches z [B, S, K, C] (S frame slots, K
patches; see pyvidx.temporal.grouping) and one class token [B, C] per video; nothing is transposed.

    layer 0        z = X + position + time             cls = (mean_t X_cls + seed + position[0]) / 2
    layers 1..     z = (1 - w) z + w X                 cls = (1 - w) cls + w mean_t X_cls,   w = sigmoid(100 * gate)
    time           z = z + FC(MHA_t(LN z))             over the slots of one group; the class token passes by
    space          [cls; z_s] + MHA(LN [cls; z_s])     in each slot s, all with the same class token; its results are
                                                       averaged over the slots. Then both + MLP(LN)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyvidx.layers.attention import gather, gathered_values
from pyvidx.layers.block import Block
from pyvidx.layers.int8 import is_product
from pyvidx.layers.linear import dense
from pyvidx.layers.norm import foldable, writable
from pyvidx.layers.plain import held, plain, untouched
from pyvidx.ops import fusion_input, gated_fusion, residual_norm
from pyvidx.ops.gated_fusion_reference import mix
from pyvidx.temporal.frames import attend_over_frames, frame_mean
from pyvidx.temporal.grouping import Grouping
from pyvidx.temporal.masking import Drops


class Mixed(NamedTuple):
    """A layer's tokens up to its space attention: fusion, and what time attention adds to it.

    Attributes:
        z: [B, S, K, C].
        cls: [B, C].
        added: to z by time attention, [B, S, K, C].
    """

    z: Tensor
    cls: Tensor
    added: Tensor

    def with_class(self, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """[cls; z + added] of every slot, [B, S, 1 + K, C], and its LayerNorm."""
        return _residual_norm(self.z, self.added, norm, cls=self.cls)


def _residual_norm(x: Tensor, y: Tensor, norm: nn.Module, **options: Any) -> tuple[Tensor, Tensor]:
    """residual_norm with a LayerNorm that may have to be called."""
    known = foldable(norm, x)
    if known is not None:
        return residual_norm(x, y, known, **options)
    ones = x.new_ones(x.shape[-1])
    rows, _ = residual_norm(x, y, (ones, torch.zeros_like(ones)), **options)
    return rows, norm(rows)


class TemporalLayer(nn.Module):
    """FC(DropPath(MHA(LN z))) over the slots of each group. `fc`, zero at first, may be None: left out, or folded into
    `out`."""

    def __init__(self, width: int, heads: int, eps: float, *, fc: bool = True):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.fc = nn.Linear(width, width) if fc else None
        if fc:
            nn.init.zeros_(self.fc.weight)
            nn.init.zeros_(self.fc.bias)

    def forward(self, normed: Tensor, drop: Tensor | None = None, frame_mask: Tensor | None = None) -> Tensor:
        """Of LN z [B, S, K, C], what is added to z.

        drop [B, K]: see masking.drop_path_draws. frame_mask [B, S]: the slots attended to, see pyvidx.temporal.frames.
        """
        qkv = dense(normed, self.qkv).unflatten(-1, (3, self.heads, -1))
        y = dense(attend_over_frames(qkv, frame_mask), self.out)
        if self.fc is None:
            return y
        # drop comes before fc: a dropped group still gets its bias
        return dense(y if drop is None else y * drop[:, None, :, None].to(y.dtype), self.fc)


class SpatialLayer(Block):
    """A CLIP block over [class; patches of a slot]. Patches z [B, S, K, C], class cls [B, C].

    The class row is repeated in front of every slot, so that LayerNorm, projections and MLP run on one contiguous
    [B, S, 1 + K, C]: a repeated row costs 1 / (1 + K) more arithmetic, gathering the class rows apart costs copies of
    q, k and v.
    """

    def forward(self, mixed: Mixed, drop: Tensor | None = None, frame_mask: Tensor | None = None) -> Tensor:
        """The layer's tokens [B, S, 1 + K, C], every slot with the same class row in front.

        drop [B, S]: see masking. frame_mask [B, S]: the slots whose class results are averaged.
        """
        x, normed = self.space(mixed, drop, frame_mask)
        return x + dense(self.hidden(normed), self.fc2)

    def space(
        self, mixed: Mixed, drop: Tensor | None = None, frame_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The attention half, [B, S, 1 + K, C], every slot with the same class row in front, and its LayerNorm."""
        x, normed = mixed.with_class(self.norm1)
        y = dense(self.attention(normed), self.out)
        share = _share(drop, frame_mask, y)
        out = writable(x, y, normed, self.out, self.norm1, self.norm2)
        return _residual_norm(x, y, self.norm2, factor=drop, share=share, out=out)

    def mean_tokens(self, mixed: Mixed, group: Grouping) -> tuple[Tensor, Tensor]:
        """Frame means of forward's z, [B, P, C], and cls. The MLP's second layer, being linear, runs on the means."""
        if not (untouched(self) and is_product(self.fc2)):
            z, cls = split_rows(self(mixed, frame_mask=group.frame_mask))
            return group.patch_mean(z), cls
        x, normed = self.space(mixed, frame_mask=group.frame_mask)
        h = self.hidden(normed)
        patches = group.patch_mean(x[:, :, 1:]) + dense(group.patch_mean(h[:, :, 1:]), self.fc2)
        return patches, x[:, 0, 0] + dense(h[:, 0, 0], self.fc2)

    def class_token(self, mixed: Mixed, frame_mask: Tensor | None = None) -> Tensor:
        """forward's cls [B, C] alone: one query per slot, and no projection of the patches."""
        if not (untouched(self) and plain(self.qkv)):
            return self(mixed, frame_mask=frame_mask)[:, 0, 0]
        n = mixed.with_class(self.norm1)[1]  # [B, S, 1 + K, C]
        rows = gather(n[:, :1, 0], n, self.qkv, self.heads)
        y = gathered_values(frame_mean(rows, frame_mask), self.qkv)  # over the slots
        return self.feed_forward(mixed.cls + dense(y, self.out))


def _share(drop: Tensor | None, frame_mask: Tensor | None, like: Tensor) -> Tensor:
    """What is taken in of every slot's class result, [B, S]: the mean over the real slots, of what is not dropped."""
    share = like.new_full(like.shape[:2], 1 / like.shape[1], dtype=torch.promote_types(like.dtype, torch.float32))
    if frame_mask is not None:
        share = frame_mask.to(share.dtype) / frame_mask.sum(dim=1, keepdim=True)
    return share if drop is None else share * drop


def split_rows(x: Tensor, *, mean: bool = False) -> tuple[Tensor, ...]:
    """x [B, S, 1 + K, C], every slot with the same class row -> views: patches [B, S, K, C] and class [B, C].

    mean: and the mean of all patches, [B, C].
    """
    return _slices(x, mean) if torch.compiler.is_compiling() else _Split.apply(x, mean)


def _slices(x: Tensor, mean: bool) -> tuple[Tensor, ...]:
    z, cls = x[:, :, 1:], x[:, 0, 0]
    return (z, cls, z.mean(dim=2).mean(dim=1)) if mean else (z, cls)  # torch is slow at one mean over both


class _Split(torch.autograd.Function):
    """The gradient is written once; those of two slices would each fill a whole tensor, to be added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: bool) -> tuple[Tensor, ...]:
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        return _slices(x, mean)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, grad_cls: Tensor, grad_mean: Tensor | None = None) -> tuple[Tensor, None]:
        _, S, N, _ = ctx.shape
        given = [g for g in (grad_z, grad_cls, grad_mean) if g is not None]
        if not given:
            return None, None
        grad = given[0].new_empty(ctx.shape)
        patches = grad[:, :, 1:]
        every = 0 if grad_mean is None else grad_mean[:, None, None] / (S * (N - 1))
        if grad_z is None or grad_mean is None:
            patches[:] = every if grad_z is None else grad_z
        else:
            torch.add(grad_z, every, out=patches)
        grad[:, 1:, 0] = 0
        grad[:, 0, 0] = 0 if grad_cls is None else grad_cls
        return grad, None


class BTAdapterBranch(nn.Module):
    """The branch: seed, time table, gate and d layers. It never feeds the backbone, so it runs after it from d layer
    outputs. The position table is the backbone's own, handed in.

    Args:
        width, heads, mlp_width, hidden_act, eps: sizes of a CLIP block.
        depth: number of layers.
        time_length: rows of the time table.
        gated: with a gate for layers 1..; otherwise plain sums.
        gate_scale: the gate's weight is sigmoid(gate_scale * gate), 0.5 at first.
        interact: layers 1.. take in the backbone's newest tokens; otherwise only layer 0 reads the backbone.
        seeded: with a class seed of its own; otherwise one is handed in.

    Attributes:
        checkpointing: compute the inside of every temporal and spatial layer again in the backward pass instead of
            keeping it; the same gradients. Off at first.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        *,
        depth: int,
        time_length: int = 64,
        gated: bool = True,
        gate_scale: float = 100.0,
        interact: bool = True,
        seeded: bool = True,
        hidden_act: str = "quick_gelu",
        eps: float = 1e-5,
    ):
        super().__init__()
        self.gate_scale, self.interact, self.checkpointing = gate_scale, interact, False
        self.seed = nn.Parameter(torch.zeros(width)) if seeded else None
        self.time = nn.Parameter(torch.randn(time_length, width))
        self.gate = nn.Parameter(torch.zeros(width)) if gated and interact else None
        self.temporal = nn.ModuleList(TemporalLayer(width, heads, eps) for _ in range(depth))
        self.spatial = nn.ModuleList(SpatialLayer(width, heads, mlp_width, hidden_act, eps) for _ in range(depth))

    def forward(
        self,
        xs: Sequence[Tensor],
        position: Tensor,
        group: Grouping,
        drops: Drops | None = None,
        seed: Tensor | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Every layer's state.

        Args:
            xs: one [B, T, 1+P, C] per layer to run: the outputs of backbone layers L-d, L-d+1, ...
            position: [1+P, C], the backbone's position table.
            group: from pyvidx.temporal.grouping.grouping(T, P, ...).
            drops: DropPath, from pyvidx.temporal.masking.drop_path_draws; only training has it.
            seed: [C], in place of the branch's own.

        Returns:
            (z [B, S, K, C], cls [B, C]) per layer.
        """
        return [split_rows(rows) for rows in self.rows(xs, position, group, drops, seed)]

    def rows(
        self,
        xs: Sequence[Tensor],
        position: Tensor,
        group: Grouping,
        drops: Drops | None = None,
        seed: Tensor | None = None,
    ) -> list[Tensor]:
        """The same in one tensor per layer, [B, S, 1 + K, C], with the class row in front of every slot."""
        layers = []
        for j, x in enumerate(xs):
            time, space = (drops and drops[j]) or (None, None)
            mixed = self.mix(j, x, layers[-1] if layers else None, position, group, time, seed)
            layers.append(self._run(self.spatial[j], mixed, space, group.frame_mask))
        return layers

    def mix(
        self,
        j: int,
        x: Tensor,
        rows: Tensor | None,
        position: Tensor,
        group: Grouping,
        drop: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> Mixed:
        """Fusion and time attention of layer j. rows: what the method of that name gives for layer j - 1."""
        layer = self.temporal[j]
        where = {"keep": group.keep, "pair": group.pair, "norm": foldable(layer.norm, x)}
        real = group.frame_mask
        if rows is None:
            seed = held(self, "seed") if seed is None else seed
            z, cls, *normed = fusion_input(x, position, held(self, "time"), seed, **where)
            if real is not None:  # the op averages all class tokens
                cls = (frame_mean(x[:, :, 0], real) + seed + position[0]) / 2
        elif self.interact:
            gate = held(self, "gate")
            z, cls, *normed = gated_fusion(x, rows, None, gate, scale=self.gate_scale, **where)
            if real is not None:
                cls = mix(rows[:, 0, 0], frame_mean(x[:, :, 0], real), gate, self.gate_scale)
        else:
            (z, cls), normed = split_rows(rows), []
        normed = normed[0] if normed else layer.norm(z)
        return Mixed(z, cls, self._run(layer, normed, drop, real))

    def _run(self, layer: nn.Module, *inputs: Mixed | Tensor | None) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            # Nothing is drawn inside: the drops come in.
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(*inputs)
