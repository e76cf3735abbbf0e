"""A residual stream takes in what a layer adds to it, and the LayerNorm that follows, in one pass."""

import torch
from torch import Tensor

from pyvidx.ops._library import FLOATING, LOW, define, require, require_out
from pyvidx.ops.gated_fusion import Norm, check_norm, wide_dtype
from pyvidx.ops.gated_fusion_reference import layer_norm, row_gradients


def residual_norm(
    x: Tensor,
    y: Tensor,
    norm: Norm,
    *,
    factor: Tensor | None = None,
    cls: Tensor | None = None,
    share: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The two lines between two layers of a pre-norm transformer.

        out[b, s, k] = x[b, s, k] + factor[b, s] y[b, s, k]
        normed       = LayerNorm(out)

    Class rows, which stand in front of every slot s of a video and are the same in all of them, as in the branch of
    BT-Adapter (arXiv:2309.15785, section 3.1):

        cls:    out[b, s, 0] = cls[b]; row 1 + k of out is made of rows k of x and y
        share:  out[b, s, 0] = x[b, 0, 0] + sum_s' share[b, s'] y[b, s', 0]

    Args:
        x: [B, S, K, C] the residual stream, any strides; with share its first row of a slot is a class row, of which
            that of slot 0 is read.
        y: as x, what the layer's last product gave. Of the dtype of x, or float16 or bfloat16 beside a float32 x, as
            under torch.autocast.
        norm: (weight, bias) or (weight, bias, eps) of the LayerNorm, [C] each, eps 1e-5 if not given.
        factor: [B, S], DropPath: what of y is taken in. Not differentiable. Default 1.
        cls: [B, C]; see above.
        share: [B, S]; see above. Not differentiable. Not together with cls.
        out: (out, normed) to write into; out may be x, y or, with the dtypes equal, any other tensor of its shape. Not
            differentiable.

    Returns:
        out, dtype of x, and normed, dtype of y: [B, S, K, C], with cls [B, S, 1 + K, C]. Sums are kept in float32
        (float64 for float64). Differentiable in x, y, cls and the norm's parameters; the gradient keeps out.

    Raises:
        ValueError: a shape, dtype or device does not fit, or out shares memory with an input it may not be.
    """
    op = "residual_norm"
    require(x.dim() == 4 and x.dtype in FLOATING, f"{op}: x must be floating [B, S, K, C]", x)
    B, S, K, C = x.shape
    mixed = x.dtype == torch.float32 and y.dtype in LOW
    fits = y.shape == x.shape and (y.dtype == x.dtype or mixed) and y.device == x.device
    require(fits, f"{op}: y must have the shape, device and dtype of x (or 16 bits beside a float32 x)", y, x)
    weight, shift, eps = check_norm(op, norm, C)
    own = (
        ("cls", cls, (B, C)),
        ("norm", weight, (C,)),
        ("norm", shift, (C,)),
    )
    for name, t, shape in own:
        fits = t is None or (tuple(t.shape) == shape and t.dtype == x.dtype and t.device == x.device)
        text = "{op}: {name} must be {shape} with the dtype and device of x"
        require(fits, text, t, x, op=op, name=name, shape=shape)
    for name, t in (("factor", factor), ("share", share)):
        fits = t is None or (tuple(t.shape) == (B, S) and t.is_floating_point() and not t.requires_grad)
        text = "{op}: {name} must be floating {shape} and ask for no gradient"
        require(fits, text, t, op=op, name=name, shape=(B, S))
    require(share is None or cls is None, f"{op}: share excludes cls")
    require(share is None or min(S, K) > 0, f"{op}: with share x must have a class row in every slot", x)
    factor, share = (None if t is None else t.to(x.device, wide_dtype(x)) for t in (factor, share))
    inputs = x, y, cls, factor, share, weight, shift, eps
    if out is None:
        return _op(*inputs)[:2]
    rows, normed = out
    shape = (B, S, K + int(cls is not None), C)
    require_out(op, rows, shape, x, x, cls, weight, shift)
    require_out(op, normed, shape, y, y)
    _op_out(*inputs, rows, normed)
    return out


def add_norm(x: Tensor, y: Tensor, norm: Norm, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """x + y and its LayerNorm, for layers, which know what they hand over: of residual_norm's 24 microseconds in Python
    its checks take 16. What the kernels check stays checked.

    Args:
        x, y: [..., C]. norm: (weight, bias, eps). out: as in residual_norm, contiguous.
    """
    weight, shift, eps = norm
    wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, weight, shift))
    if wants_grad or torch.compiler.is_compiling():
        rows = [t.reshape(1, 1, -1, t.shape[-1]) for t in (x, y)]
        found = _op(*rows, None, None, None, weight, shift, eps)[:2]
        return found[0].view(x.shape), found[1].view(x.shape)
    out = (x.new_empty(x.shape), y.new_empty(y.shape)) if out is None else out
    rows = (x, y, *out) if x.dim() == 4 else [t.reshape(1, 1, -1, t.shape[-1]) for t in (x, y, *out)]
    _op_out(*rows[:2], None, None, None, weight, shift, eps, *rows[2:])
    return out


def _per_slot(t, like):
    return t[:, :, None, None].to(like.dtype)


def reference(x, y, cls, factor, share, weight, shift, eps):
    added = y.to(x.dtype)
    rows = x + (added if factor is None else added * _per_slot(factor, x))
    if share is not None:
        head = x[:, :1, :1] + (added[:, :, :1] * _per_slot(share, x)).sum(1, keepdim=True)
        rows = torch.cat([head.expand(-1, x.shape[1], -1, -1), rows[:, :, 1:]], dim=2)
    if cls is not None:
        rows = torch.cat([cls[:, None, None].expand(-1, x.shape[1], 1, -1), rows], dim=2)
    normed, stats = layer_norm(rows, weight, shift, eps)
    return rows, normed.to(y.dtype), stats


def reference_backward(grad_out, grad_normed, value, stats, factor, share, weight, cls, need_y):
    g, grad_weight, grad_shift = row_gradients(grad_out, grad_normed, value, weight, stats)
    grad_cls, first = value.new_empty(0), g[:, :, :1].sum(1, keepdim=True)
    if cls:
        g, grad_cls = g[:, :, 1:], first[:, 0, 0].to(value.dtype)
    to_y = g if factor is None else g * _per_slot(factor, g)
    if share is not None:
        rest = first.new_zeros(first.shape[0], g.shape[1] - 1, *first.shape[2:])
        g = torch.cat([torch.cat([first, rest], dim=1), g[:, :, 1:]], dim=2)
        to_y = torch.cat([first * _per_slot(share, g), to_y[:, :, 1:]], dim=2)
    grad_y = to_y.to(grad_normed.dtype, copy=True) if need_y else grad_normed.new_empty(0)
    grad_x = g.to(value.dtype, copy=True).contiguous()
    return grad_x, grad_y.contiguous(), grad_cls, grad_weight, grad_shift


def _reference_out(*args):
    *inputs, out, normed = args
    results = reference(*inputs)
    out.copy_(results[0])
    normed.copy_(results[1])


def _fake(x, y, cls, factor, share, weight, shift, eps):
    B, S, K, C = x.shape
    rows = (B, S, K if cls is None else K + 1)
    return x.new_empty(*rows, C), y.new_empty(*rows, C), x.new_empty(*rows, 2, dtype=wide_dtype(x))


def _fake_backward(grad_out, grad_normed, value, stats, factor, share, weight, cls, need_y):
    B, S, N, C = value.shape
    rows = (B, S, N - 1 if cls else N, C)
    return (
        value.new_empty(rows), grad_normed.new_empty(rows if need_y else 0), value.new_empty((B, C) if cls else 0),
        value.new_empty(C), value.new_empty(C),
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    x, y, cls, factor, share, weight, _, _ = inputs
    rows, _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(rows, stats, factor, share, weight)
    ctx.cls = cls is not None
    # Where all of x's gradient goes to y as well, one tensor is both.
    ctx.same = factor is None and share is None and x.dtype == y.dtype


def _backward(ctx, grad_out, grad_normed, _):
    rows, stats, factor, share, weight = ctx.saved_tensors
    need = ctx.needs_input_grad
    need_y = need[1] and not ctx.same
    grad_x, grad_y, grad_cls, grad_weight, grad_shift = _op_backward(
        grad_out, grad_normed, rows, stats, factor, share, weight, ctx.cls, need_y
    )
    return (
        grad_x if need[0] else None, (grad_y if need_y else grad_x) if need[1] else None, grad_cls if need[2] else None,
        None, None, grad_weight if need[5] else None, grad_shift if need[6] else None, None,
    )  # fmt: skip


_INPUTS = "Tensor x, Tensor y, Tensor? cls, Tensor? factor, Tensor? share, Tensor weight, Tensor shift, float eps"
_op = define(
    f"residual_norm({_INPUTS}) -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
_op_out = define(
    f"residual_norm_out({_INPUTS}, Tensor(a!) out, Tensor(b!) normed) -> ()",
    reference=_reference_out,
    fake=lambda *args: None,
)
_op_backward = define(
    "residual_norm_backward(Tensor grad_out, Tensor grad_normed, Tensor value, Tensor stats, Tensor? factor, "
    "Tensor? share, Tensor weight, bool cls, bool need_y) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=_fake_backward,
)
