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

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyvidx.layers.block import Block, residual, wants_grad
from pyvidx.ops import fusion_input, gated_fusion
from pyvidx.ops.gated_fusion_reference import mix
from pyvidx.temporal.frames import attend_over_frames, frame_mean
from pyvidx.temporal.grouping import Grouping
from pyvidx.temporal.masking import Drops, scaled


class TemporalLayer(nn.Module):
    """FC(MHA(LN z)) over the slots of each group. `fc`, zero at first, may be None: left out, or folded into `out`."""

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
        """LN z [B, S, K, C] -> [B, S, K, C], without the residual.

        drop [B, K]: see masking.drop_path_draws. frame_mask [B, S]: the slots attended to, see pyvidx.temporal.frames.
        """
        B, S, K, C = normed.shape
        qkv = self.qkv(normed).view(B, S, K, 3, self.heads, C // self.heads)
        y = self.out(attend_over_frames(qkv, frame_mask))
        y = scaled(y, drop, (B, 1, K, 1))  # before fc: a dropped group still gets its bias
        return y if self.fc is None else self.fc(y)


class SpatialLayer(Block):
    """A CLIP block over [class; patches of a slot]. Patches z [B, S, K, C], class cls [B, C].

    The class row is repeated in front of every slot, so that LayerNorm, projections and MLP run on one contiguous
    [B, S, 1 + K, C]: a repeated row costs 1 / (1 + K) more arithmetic, gathering the class rows apart costs copies of
    q, k and v.
    """

    def forward(
        self, z: Tensor, a: Tensor, cls: Tensor, drop: Tensor | None = None, frame_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """z + a and cls -> the layer's z [B, S, K, C] (a view) and cls [B, C].

        drop [B, S]: see masking. frame_mask [B, S]: the slots whose class results are averaged.
        """
        x = self.space(z, a, cls, drop, frame_mask)
        return _split(residual(x, self.mlp(x)))

    def space(
        self, z: Tensor, a: Tensor, cls: Tensor, drop: Tensor | None = None, frame_mask: Tensor | None = None
    ) -> Tensor:
        """The attention half, [B, S, 1 + K, C], every slot with the same class row in front."""
        x = _with_class(z, a, cls)
        return _join(x, self.attend(x), drop, frame_mask)

    def mean_tokens(self, z: Tensor, a: Tensor, cls: Tensor, group: Grouping) -> tuple[Tensor, Tensor]:
        """Frame means of forward's z, [B, P, C], and cls. The MLP's second layer, being linear, runs on the means."""
        x = self.space(z, a, cls, frame_mask=group.frame_mask)
        h = self.hidden(x)
        patches = group.patch_mean(x[:, :, 1:]) + self.fc2(group.patch_mean(h[:, :, 1:]))
        return patches, x[:, 0, 0] + self.fc2(h[:, 0, 0])

    def class_token(self, z: Tensor, a: Tensor, cls: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """forward's cls [B, C] alone: one query per slot, and no projection of the patches.

        With q = Wq n_cls + bq the scores are n . (Wk^T q) up to a constant, and the values' sum is Wv (sum p n) + bv:
        the per-token work is two products with H vectors instead of two with C.
        """
        B, S, K, C = z.shape
        H, D = self.heads, C // self.heads
        n = self.norm1(_with_class(z, a, cls))  # [B, S, 1 + K, C]
        wq, wk, wv = self.qkv.weight.view(3, H, D, C)
        bq, _, bv = self.qkv.bias.view(3, H, D)
        q = F.linear(self.norm1(cls), wq.flatten(0, 1), bq.flatten()).view(B, H, D)
        probe = torch.einsum("bhd,hdc->bch", q * D**-0.5, wk)
        weights = (n @ probe[:, None]).softmax(dim=2)  # [B, S, 1 + K, H]
        mixed = frame_mean(weights.transpose(2, 3) @ n, frame_mask)  # [B, H, C], over the slots
        y = (torch.einsum("bhc,hdc->bhd", mixed, wv) + bv).reshape(B, C)
        cls = residual(cls, self.out(y))
        return residual(cls, self.mlp(cls))


def _with_class(z: Tensor, a: Tensor, cls: Tensor) -> Tensor:
    """[cls; z + a] of every slot, [B, S, 1 + K, C]."""
    if torch.compiler.is_compiling():  # a compiler makes one pass of it by itself
        return torch.cat([cls[:, None, None].expand(-1, z.shape[1], 1, -1), z + a], dim=2)
    return _WithClass.apply(z, a, cls)


class _WithClass(torch.autograd.Function):
    """One pass: a cat would copy z + a."""

    @staticmethod
    def forward(ctx, z, a, cls):
        B, S, K, C = z.shape
        x = z.new_empty(B, S, 1 + K, C, dtype=torch.promote_types(z.dtype, a.dtype))
        torch.add(z, a, out=x[:, :, 1:])
        x[:, :, 0] = cls[:, None]
        ctx.dtypes = z.dtype, a.dtype, cls.dtype
        return x

    @staticmethod
    def backward(ctx, grad):
        rows = grad[:, :, 1:]
        grads = rows, rows, grad[:, :, 0].sum(dim=1)
        return tuple(g.to(dtype) for g, dtype in zip(grads, ctx.dtypes))


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, S, 1 + K, C], every slot with the same class row -> views: patches [B, S, K, C] and class [B, C]."""
    if torch.compiler.is_compiling():
        return x[:, :, 1:], x[:, 0, 0]
    return _Split.apply(x)


class _Split(torch.autograd.Function):
    """The gradient is written once; those of two slices would each fill a whole tensor, to be added up."""

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return x[:, :, 1:], x[:, 0, 0]

    @staticmethod
    def backward(ctx, grad_z, grad_cls):
        grad = grad_z.new_empty(ctx.shape)
        grad[:, :, 1:] = grad_z
        grad[:, 0, 0], grad[:, 1:, 0] = grad_cls, 0
        return grad


def _join(x: Tensor, y: Tensor, drop: Tensor | None, frame_mask: Tensor | None = None) -> Tensor:
    """x + drop y, the class rows of drop y averaged over the slots. x, y [B, S, 1 + K, C], drop, frame_mask [B, S]."""
    if frame_mask is None and wants_grad(x, y) and not torch.compiler.is_compiling():
        return _Join.apply(x, y, None if drop is None else drop.to(y.dtype)[:, :, None, None])
    y = scaled(y, drop, (*y.shape[:2], 1, 1))
    y[:, :, 0] = frame_mean(y[:, :, 0], frame_mask)[:, None]
    return residual(x, y)


class _Join(torch.autograd.Function):
    """One pass each way. Averaging in place under autograd would copy the whole gradient."""

    @staticmethod
    def forward(ctx, x, y, factor):
        ctx.dtypes = x.dtype, y.dtype
        ctx.save_for_backward(factor)
        cls = y[:, :, :1] if factor is None else y[:, :, :1] * factor
        out = x + y if factor is None else torch.addcmul(x, y, factor)
        out[:, :, :1] = x[:, :, :1] + cls.mean(dim=1, keepdim=True)
        return out

    @staticmethod
    def backward(ctx, grad):
        (factor,) = ctx.saved_tensors
        cls = grad[:, :, :1].mean(dim=1, keepdim=True)
        grad_y = grad.clone() if factor is None else grad * factor
        grad_y[:, :, :1] = cls if factor is None else cls * factor
        return grad.to(ctx.dtypes[0]), grad_y.to(ctx.dtypes[1]), None


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
        states = []
        for j, x in enumerate(xs):
            time, space = (drops and drops[j]) or (None, None)
            mixed = self.mix(j, x, states[-1] if states else None, position, group, time, seed)
            states.append(self._run(self.spatial[j], *mixed, space, group.frame_mask))
        return states

    def mix(
        self,
        j: int,
        x: Tensor,
        state: tuple[Tensor, Tensor] | None,
        position: Tensor,
        group: Grouping,
        drop: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fusion and time attention of layer j: z [B, S, K, C], what time attention adds to it, and cls [B, C]."""
        layer = self.temporal[j]
        norm = (layer.norm.weight, layer.norm.bias, layer.norm.eps)
        where = {"keep": group.keep, "pair": group.pair, "norm": norm}
        real = group.frame_mask
        if state is None:
            seed = self.seed if seed is None else seed
            z, cls, normed = fusion_input(x, position, self.time, seed, **where)
            if real is not None:  # the op averages all class tokens
                cls = (frame_mean(x[:, :, 0], real) + seed + position[0]) / 2
        elif self.interact:
            z, cls, normed = gated_fusion(x, *state, self.gate, scale=self.gate_scale, **where)
            if real is not None:
                cls = mix(state[1], frame_mean(x[:, :, 0], real), self.gate, self.gate_scale)
        else:
            (z, cls), normed = state, layer.norm(state[0])
        return z, self._run(layer, normed, drop, real), cls

    def _run(self, layer: nn.Module, *inputs: Tensor | None):
        if self.checkpointing and torch.is_grad_enabled():
            # Nothing is drawn inside: the drops come in.
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(*inputs)
