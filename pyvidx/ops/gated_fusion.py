"""Gated branch fusion: the branch takes in the backbone's newest tokens (BT-Adapter, section 3.1)."""

import torch
from torch import Tensor

from pyvidx.ops import gated_fusion_reference as plain
from pyvidx.ops._library import define, require, require_floating, require_out
from pyvidx.ops.token_gather import check_keep, source_table

Norm = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, float]


def fusion_input(
    x: Tensor,
    position: Tensor,
    time: Tensor,
    seed: Tensor,
    *,
    keep: Tensor | None = None,
    pair: bool = False,
    norm: Norm | None = None,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """The branch's first input, from the backbone's tokens: position and time added, masked patches left out.

        z[b, s, k] = x[b, t, 1 + p] + position[1 + p] + time[t],  (t, p) the source of (s, k)
        cls[b]     = (mean_t x[b, t, 0] + seed + position[0]) / 2

    BT-Adapter (arXiv:2309.15785), section 3.1; the class row as the official code has it.

    Args:
        x: [B, T, 1 + P, C] tokens of the backbone, class token first; any strides, read in place where the last is 1.
        position: [1 + P, C] position embedding, class row first.
        time: [T or more, C] time embedding; [T / 2 or more, C] with pair.
        seed: [C] learned class seed.
        keep: int64, which patches stay, as in token_gather; its frames are pairs where pair is set. None: all.
        pair: average frames 2u and 2u + 1 first (clips longer than the time table); T must be even.
        norm: (weight, bias) or (weight, bias, eps) of a LayerNorm over C, [C] each, eps 1e-5 if not given: also return
            LayerNorm(z), computed in the same pass from the rows before they are rounded.
        out: (z, cls) or, with norm, (z, cls, normed) to write into. Not differentiable.

    Returns:
        z [B, S, K, C] and cls [B, C], with norm also normed [B, S, K, C]; dtype of x. S and K as in token_gather
        (S = T, or T / 2 with pair; K = P without keep). Differentiable in x, position, time, seed, weight and bias.

    Raises:
        ValueError: a shape, dtype or device does not fit, or out shares memory with an input it may not be.
        IndexError: an index of keep is out of range (CPU).
    """
    op = "fusion_input"
    B, T, P, C = _check_tokens(op, x, keep, pair)
    weight, bias, eps = check_norm(op, norm, C)
    require_floating(op, x=x, position=position, time=time, seed=seed, weight=weight, bias=bias)
    require(tuple(position.shape) == (1 + P, C), f"{op}: position must be [1 + P, C] of x", position, x)
    require(
        time.dim() == 2 and time.shape[0] >= T and time.shape[1] == C,
        f"{op}: time must be [frames or more, C] of x",
        time,
        x,
    )
    require(tuple(seed.shape) == (C,), f"{op}: seed must be [C] of x", seed, x)
    return _run(op, x, None, seed, None, position, time, keep, weight, bias, 1.0, eps, pair, out=out)


def gated_fusion(
    x: Tensor,
    z: Tensor,
    cls: Tensor | None,
    gate: Tensor | None = None,
    *,
    scale: float = 100.0,
    keep: Tensor | None = None,
    pair: bool = False,
    norm: Norm | None = None,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """Mix the backbone's newest tokens into the branch, channel by channel; plain sums where there is no gate.

        out[b, s, k] = (1 - w) z[b, s, k] + w x[b, t, 1 + p],  w = sigmoid(scale * gate),  (t, p) the source of (s, k)
        out_cls[b]   = (1 - w) cls[b] + w mean_t x[b, t, 0]

    BT-Adapter (arXiv:2309.15785), section 3.1, with w on the backbone as in the official code (the paper's sigmoid
    weights the branch: the same family, mirrored).

    Args:
        x: [B, T, 1 + P, C] tokens of the backbone, class token first; any strides, read in place where the last is 1.
        z: [B, S, K, C] patch tokens of the branch, any strides; S and K as keep and pair make them (fusion_input).
        cls: [B, C] class row of the branch. None: z is [B, S, 1 + K, C] with the same class row in front of every slot,
            of which that of slot 0 is read; its gradient is then written as one tensor.
        gate: [C] logits, or None.
        scale: multiplies the logits.
        keep, pair, norm: as in fusion_input.
        out: (out, out_cls) or, with norm, (out, out_cls, normed) to write into, where out may be z itself and out_cls
            may be cls: each row is read before it is written. Not differentiable.

    Returns:
        out [B, S, K, C] and out_cls [B, C], with norm also LayerNorm(out) [B, S, K, C]; dtype of x. Differentiable in
        x, z, cls, gate, weight and bias.

    Raises:
        ValueError: a shape, dtype or device does not fit, or out shares memory with an input it may not be.
        IndexError: an index of keep is out of range (CPU).
    """
    op = "gated_fusion"
    B, S, K, C = _check_tokens(op, x, keep, pair)
    if keep is not None:
        S, K = (S if keep.dim() == 2 else keep.shape[1]), keep.shape[-1]
    weight, bias, eps = check_norm(op, norm, C)
    require_floating(op, x=x, z=z, cls=cls, gate=gate, weight=weight, bias=bias)
    shape = (B, S, K + int(cls is None), C)
    if tuple(z.shape) != shape:
        require(False, "{op}: z must be {shape}", z, op=op, shape=shape)
    require(cls is None or tuple(cls.shape) == (B, C), f"{op}: cls must be [B, C] of x", cls, x)
    _check_gate(op, gate, C)
    return _run(op, x, z, cls, gate, None, None, keep, weight, bias, scale, eps, pair, out=out)


def output_gate(
    x_cls: Tensor,
    cls: Tensor,
    gate: Tensor | None = None,
    *,
    scale: float = 1e4,
    norm: Norm | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Mix the branch's class row into the backbone's class token of each frame; a plain sum where there is no gate.

        out[b, t] = (1 - w) cls[b] + w x_cls[b, t],  w = sigmoid(scale * gate)

    BT-Adapter (arXiv:2309.15785), section 3.1. The video embedding is the mean over frames of the projected LayerNorm
    of these rows.

    Args:
        x_cls: [B, T, C] class tokens of the backbone's last layer (tokens[:, :, 0]), any strides.
        cls: [B, C] class row of the branch.
        gate: [C] logits, or None.
        scale: multiplies the logits.
        norm: (weight, bias) or (weight, bias, eps) of a LayerNorm over C: return LayerNorm(out) instead of out.
        out: [B, T, C] to write into. Not differentiable.

    Returns:
        [B, T, C], dtype of x_cls. Differentiable in x_cls, cls, gate, weight and bias.

    Raises:
        ValueError: a shape, dtype or device does not fit, or out shares memory with an input it may not be.
    """
    op = "output_gate"
    require(x_cls.dim() == 3 and x_cls.shape[1] > 0, f"{op}: x_cls must be [B, T, C] with T > 0", x_cls)
    B, T, C = x_cls.shape
    weight, bias, eps = check_norm(op, norm, C)
    require_floating(op, x_cls=x_cls, cls=cls, gate=gate, weight=weight, bias=bias)
    require(tuple(cls.shape) == (B, C), f"{op}: cls must be [B, C] of x_cls", cls, x_cls)
    _check_gate(op, gate, C)
    if out is None:
        return _output(x_cls, cls, gate, weight, bias, scale, eps)[0]
    require_out(op, out, x_cls.shape, x_cls, x_cls, cls, gate, weight, bias)
    _output_out(x_cls, cls, gate, weight, bias, scale, eps, out)
    return out


def _check_tokens(op, x, keep, pair):
    """B, frames (pairs of them with pair), P, C"""
    require(x.dim() == 4 and min(x.shape[1:3]) > 0, f"{op}: x must be [B, T, 1 + P, C] with T > 0", x)
    B, T, N, C = x.shape
    require(not pair or T % 2 == 0, f"{op}: pair needs an even number of frames", x)
    T, P = T // 2 if pair else T, N - 1
    if keep is not None:
        check_keep(op, keep, x)
    return B, T, P, C


def _check_gate(op, gate, C):
    if gate is not None and tuple(gate.shape) != (C,):
        require(False, "{op}: gate must be [C], C = {C}", gate, op=op, C=C)


def check_norm(op, norm, C):
    """(weight, bias, eps) of a LayerNorm over C; (None, None, 0) where there is none."""
    if norm is None:
        return None, None, 0.0
    require(len(norm) in (2, 3), f"{op}: norm must be (weight, bias) or (weight, bias, eps)")
    weight, bias, eps = norm if len(norm) == 3 else (*norm, 1e-5)
    affine = C > 0 and all(isinstance(t, Tensor) and tuple(t.shape) == (C,) for t in (weight, bias))
    require(affine, "{op}: weight and bias of norm must be [C], C = {C}", weight, bias, op=op, C=C)
    return weight, bias, float(eps)


def _run(op, *args, out):
    x, z, cls, gate, position, time, keep, weight, bias, scale, eps, pair = args
    if out is None:
        result = _fuse(*args)
        return result[:2] if weight is None else result[:3]
    require(len(out) == (2 if weight is None else 3), f"{op}: out must have one tensor per output")
    shape = _out_shape(x, keep, pair)
    require_out(op, out[0], shape, x, x, z, cls, gate, position, time, weight, bias)
    for tensor, size in zip(out[1:], ((x.shape[0], x.shape[3]), shape)):
        require_out(op, tensor, size, x)
    _fuse_out(*args, *out, *(None,) * (3 - len(out)))
    return tuple(out)


def _out_shape(x, keep, pair):
    B, T, N, C = x.shape
    S, K = T // 2 if pair else T, N - 1
    if keep is not None:
        S, K = (S if keep.dim() == 2 else keep.shape[1]), keep.shape[-1]
    return B, S, K, C


def wide_dtype(x: Tensor) -> torch.dtype:
    """What sums over x are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- registration -----------------------------------------------------------------------------------------------------


def _fake(x, z, cls, gate, position, time, keep, weight, bias, scale, eps, pair):
    shape = _out_shape(x, keep, pair)
    out, out_cls = x.new_empty(shape), x.new_empty(x.shape[0], x.shape[3])
    if weight is None:
        return out, out_cls, x.new_empty(0), x.new_empty(0)
    return out, out_cls, x.new_empty(shape), x.new_empty(*shape[:3], 2, dtype=wide_dtype(x))


def _setup_context(ctx, inputs, output):
    x, z, cls, gate, position, time, keep, weight, bias, scale, eps, pair = inputs
    out, _, normed, stats = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats, *([normed] if weight is None else []))
    need_gate = gate is not None and ctx.needs_input_grad[3]
    # The gate's gradient reads x and z: then the row before the norm is computed from them, else it is the saved out.
    inputs_too = (x, z, cls) if need_gate else (None, None, None)
    value = out if weight is not None and not need_gate else None
    ctx.save_for_backward(value, *inputs_too, gate, keep, weight, None if weight is None else stats)
    ctx.sizes, ctx.shape, ctx.scale, ctx.pair, ctx.need_gate = x.shape, out.shape, scale, pair, need_gate
    ctx.time_rows, ctx.packed = None if time is None else time.shape[0], cls is None


def _backward(ctx, grad_out, grad_out_cls, grad_normed, _):
    value, x, z, cls, gate, keep, weight, stats = ctx.saved_tensors
    B, T, N, C = ctx.sizes
    need_x, need_z, need_cls, need_gate, need_position, need_time = ctx.needs_input_grad[:6]
    given = [g for g in (grad_out, grad_out_cls, grad_normed) if g is not None]
    if not given:
        return (None,) * 12
    first, like = ctx.time_rows is not None, given[0]
    if grad_out_cls is None:
        grad_out_cls = like.new_zeros(B, C)
    if grad_normed is None:
        value = stats = weight = None
        grad_out = like.new_zeros(ctx.shape) if grad_out is None else grad_out
    pooled = T // 2 if ctx.pair else T
    by_source = keep is not None and (need_position or (need_time and keep.dim() == 3))
    wants_x, wants_rows = need_x or by_source, need_z or need_position or need_time
    plain_sum = gate is None and grad_normed is None and not ctx.packed
    grad_x, grad_z, grad_cls, grad_gate, grad_weight, grad_bias = _fuse_backward(
        grad_out, grad_out_cls, grad_normed, value, x, z, cls, gate, keep,
        source_table(keep, B, pooled, N - 1) if keep is not None and wants_x else None, weight, stats, T, N - 1,
        ctx.scale, ctx.pair, first, ctx.packed, wants_x, wants_rows and not plain_sum, need_gate,
    )  # fmt: skip
    rows = grad_out if plain_sum else grad_z
    grad_position = grad_time = None
    if first:
        grad_cls = grad_cls.sum(0)
        if need_position:
            over = grad_x.flatten(0, 1).sum(0)[1:] if by_source else rows.flatten(0, 1).sum(0)
            grad_position = torch.cat([grad_cls[None], over])
        if need_time:
            per_frame = rows.sum(2, dtype=wide_dtype(rows)).sum(0).to(rows.dtype)  # 20 times as fast as of both
            if by_source and keep.dim() == 3:
                per_frame = grad_x[:, :, 1:].unflatten(1, (pooled, -1)).sum((0, 2, 3))
            grad_time = torch.cat([per_frame, per_frame.new_zeros(ctx.time_rows - pooled, C)])
    with_norm = grad_normed is not None
    return (
        grad_x if need_x else None, rows if need_z else None, grad_cls if need_cls else None,
        grad_gate if need_gate else None, grad_position, grad_time, None, grad_weight if with_norm else None,
        grad_bias if with_norm else None, None, None, None,
    )  # fmt: skip


def _fake_backward(
    grad_out, grad_out_cls, grad_normed, value, x, z, cls, gate, keep, source, weight, stats, T, P, scale, pair, first,
    packed, need_x, need_z, need_gate,
):  # fmt: skip
    rows, norm = (grad_out, False) if grad_normed is None else (grad_normed, True)
    B, S, K, C = rows.shape
    packed = packed and need_z
    sizes = [(B, T, 1 + P, C), (B, S, K + int(packed), C), (B, C), (C,), (C,), (C,)]
    wanted = [need_x, need_z, not packed, need_gate, norm, norm]
    return tuple(rows.new_empty(size if there else 0) for size, there in zip(sizes, wanted))


def _fake_output(x_cls, cls, gate, weight, bias, scale, eps):
    B, T, C = x_cls.shape
    stats = x_cls.new_empty(0) if weight is None else x_cls.new_empty(B, 1, T, 2, dtype=wide_dtype(x_cls))
    return x_cls.new_empty(B, T, C), stats


def _setup_output(ctx, inputs, output):
    x_cls, cls, gate, weight, _, ctx.scale, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x_cls, cls, gate, weight, None if weight is None else output[1])


def _backward_output(ctx, grad, _):
    if grad is None:
        return (None,) * 7
    x_cls, cls, gate, weight, stats = ctx.saved_tensors
    need_x, need_cls, need_gate, need_weight, need_bias = ctx.needs_input_grad[:5]
    grad_x, grad_rows, grad_gate, grad_weight, grad_bias = _output_backward(
        grad, x_cls, cls, gate, weight, stats, ctx.scale, need_gate
    )
    return (
        grad_x if need_x else None, grad_rows.sum(1) if need_cls else None, grad_gate if need_gate else None,
        grad_weight if need_weight else None, grad_bias if need_bias else None, None, None,
    )  # fmt: skip


def _fake_output_backward(grad, x_cls, cls, gate, weight, stats, scale, need_gate):
    C = grad.shape[2]
    channels = [grad.new_empty(C if wanted else 0) for wanted in (need_gate, weight is not None, weight is not None)]
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape), *channels


_INPUTS = (
    "Tensor x, Tensor? z, Tensor? cls, Tensor? gate, Tensor? position, Tensor? time, Tensor? keep, Tensor? weight, "
    "Tensor? bias, float scale, float eps, bool pair"
)
_OUTPUT_INPUTS = "Tensor x_cls, Tensor cls, Tensor? gate, Tensor? weight, Tensor? bias, float scale, float eps"
_fuse = define(
    f"gated_fusion({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=plain.fuse, fake=_fake, backward=_backward, setup_context=_setup_context, autocast="widest",
)  # fmt: skip
_fuse_out = define(
    f"gated_fusion_out({_INPUTS}, Tensor(a!) out, Tensor(b!) out_cls, Tensor(c!)? normed) -> ()",
    reference=plain.fuse_out, fake=lambda *args: None,
)  # fmt: skip
_fuse_backward = define(
    "gated_fusion_backward(Tensor? grad_out, Tensor grad_out_cls, Tensor? grad_normed, Tensor? value, Tensor? x, "
    "Tensor? z, Tensor? cls, Tensor? gate, Tensor? keep, Tensor? source, Tensor? weight, Tensor? stats, SymInt T, "
    "SymInt P, float scale, bool pair, bool first, bool packed, bool need_x, bool need_z, bool need_gate) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=plain.fuse_backward, fake=_fake_backward,
)  # fmt: skip
_output = define(
    f"gated_output({_OUTPUT_INPUTS}) -> (Tensor, Tensor)",
    reference=plain.output, fake=_fake_output, backward=_backward_output, setup_context=_setup_output,
    autocast="widest",
)  # fmt: skip
_output_out = define(
    f"gated_output_out({_OUTPUT_INPUTS}, Tensor(a!) out) -> ()", reference=plain.output_out, fake=lambda *args: None
)
_output_backward = define(
    "gated_output_backward(Tensor grad, Tensor x_cls, Tensor cls, Tensor? gate, Tensor? weight, Tensor? stats, "
    "float scale, bool need_gate) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=plain.output_backward, fake=_fake_output_backward,
)  # fmt: skip
