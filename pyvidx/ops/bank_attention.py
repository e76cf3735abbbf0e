"""Attention of few queries over the many rows of a memory, which a table of slots names (MA-LMM, section 3.2)."""

import torch
from torch import Tensor

from pyvidx.ops._library import define, require, require_floating, require_index, require_out

MAX_WIDTH = 128  # csrc/include/pyvidx/bank_attention.h


def bank_attention(
    q: Tensor,
    rows: Tensor,
    table: Tensor | None,
    heads: int,
    *,
    sizes: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Let the queries of each step attend to the entries that a memory held then, at all positions at once.

        y[b, s, i] = sum_(p, j) softmax_(p, j)(scale <q[b, s, i], k> + log sizes[b, s, p, j]) v,   for each head,
        (k, v) = rows[b, table[b, s, p, j], p]

    The Q-Former's attention over MA-LMM's memory banks (arXiv:2404.05726, section 3.2), with a running softmax over
    blocks of keys: neither the gathered rows nor the scores reach memory. The sizes are those of proportional attention
    (Token Merging, arXiv:2210.09461, section 3.2); the paper of MA-LMM has none.

    Args:
        q: [B, t, n, D], n queries at each of t steps, D = heads * d with d a multiple of 8 up to 128. Any strides; read
            in place where the last one is 1. Likewise rows.
        rows: [B, S, N, 2D], dtype of q: the keys, then the values, of S slots at N positions.
        table: int32 [B, t, N, L]: the slots that step s reads at position p, each below S; negative where there is
            none. A slot named twice counts twice. None: all S slots at every step. A slot out of range raises on the
            CPU; on CUDA it stops the kernel.
        heads: how many.
        sizes: int32 [B, t, N, L] (L = S without a table), 1 or more where there is a key: the frames merged into it.
        mask: bool [B, N], False at positions nobody attends to (padding). Shared by all steps.
        scale: of the scores; d ** -0.5 by default.
        out: [B, t, n, D] to write into, or None for a new tensor. Not differentiable.

    Returns:
        [B, t, n, D], dtype of q; sums are kept in float32 (float64 for float64). 0 at a step without any key.
        Differentiable in q and rows: the gradients compute the softmax again, from the log of its sums. Under
        torch.autocast it runs in the autocast dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit, or out shares memory with an input.
        IndexError: a slot of the table is out of range (CPU).
    """
    _check(q, rows, table, heads, sizes, mask)
    mask = None if mask is None else mask.to(torch.int32)
    scale = (q.shape[3] // heads) ** -0.5 if scale is None else float(scale)
    if out is None:
        return _op(q, rows, table, sizes, mask, heads, scale)[0]
    require_out("bank_attention", out, q.shape, q, q, rows)
    _op_out(q, rows, table, sizes, mask, heads, scale, out)
    return out


def _check(q, rows, table, heads, sizes, mask):
    require(q.dim() == 4, "bank_attention: q must be [B, t, n, D]", q)
    B, t, _, D = q.shape
    fits = rows.dim() == 4 and rows.shape[0] == B and rows.shape[3] == 2 * D
    require(fits, "bank_attention: rows must be [B, S, N, 2D] of q", rows, q)
    require_floating("bank_attention", q=q, rows=rows)
    width = D // heads if heads > 0 and D % heads == 0 else 0
    require(
        width > 0 and width % 8 == 0 and width <= MAX_WIDTH,
        "bank_attention: D must be heads * d, d a multiple of 8 up to {most}, got D = {D}, heads = {heads}",
        most=MAX_WIDTH,
        D=D,
        heads=heads,
    )
    S, N = rows.shape[1:3]
    for name, x in (("table", table), ("sizes", sizes)):
        require(
            x is None
            or (x.dtype == torch.int32 and x.device == q.device and x.dim() == 4 and x.shape[:3] == (B, t, N)),
            f"bank_attention: {name} must be int32 [B, t, N, L] on q's device",
            x,
            q,
            rows,
        )
    L = S if table is None else table.shape[3]
    require(sizes is None or sizes.shape[3] == L, "bank_attention: sizes must be [B, t, N, {L}]", sizes, L=L)
    require(
        mask is None or (mask.dtype == torch.bool and mask.device == q.device and mask.shape == (B, N)),
        "bank_attention: mask must be bool [B, N] on q's device",
        mask,
        rows,
    )


def _scores(q, rows, table, sizes, mask, heads, scale, s):
    """Of step s: q [B, H, n, d], keys and values [B, H, N * L, d], scores [B, H, n, N * L], and where they are none."""
    B, S, N, W = rows.shape
    slot = torch.arange(S, device=rows.device).expand(B, N, S) if table is None else table[:, s]
    if table is not None:
        slot = slot if mask is None else slot.where((mask != 0)[..., None], -1)
        require_index("bank_attention: table must name slots", slot, S, absent=True)
    index = (slot.clamp_min(0).long() * N + torch.arange(N, device=rows.device)[:, None]).flatten(1)
    found = rows.reshape(B, S * N, W).gather(1, index[..., None].expand(-1, -1, W))
    k, v = found.view(B, index.shape[1], 2, heads, -1).permute(2, 0, 3, 1, 4)
    query = q[:, s].unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = (query * scale) @ k.transpose(-1, -2)
    if sizes is not None:
        scores = scores + sizes[:, s].clamp_min(1).to(scores.dtype).log().flatten(1)[:, None, None]
    present = slot >= 0
    if mask is not None:
        present = present & (mask != 0)[..., None]
    return query, k, v, scores, ~present.flatten(1)[:, None, None]


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)


def _empty(q, rows, table):
    return q.numel() == 0 or rows.numel() == 0 or (table is not None and table.shape[3] == 0)


def reference(q, rows, table, sizes, mask, heads, scale):
    """y, and the log of the sum of e^scores [B, t, H, n], 0 where there is no key."""
    lse = q.new_zeros(q.shape[0], q.shape[1], heads, q.shape[2], dtype=_wide(q))
    if _empty(q, rows, table):
        return q.new_zeros(q.shape), lse
    steps = []
    for s in range(q.shape[1]):
        _, _, v, scores, absent = _scores(q, rows, table, sizes, mask, heads, scale, s)
        weights = torch.softmax(scores.masked_fill(absent, torch.finfo(scores.dtype).min), dim=-1)
        steps.append((weights.masked_fill(absent, 0) @ v).transpose(1, 2).flatten(2))
        wide = scores.detach().to(lse.dtype).masked_fill(absent, float("-inf"))
        lse[:, s] = wide.logsumexp(-1).masked_fill(absent.all(-1), 0)
    return torch.stack(steps, dim=1), lse


def reference_backward(grad_out, q, rows, table, sizes, mask, out, lse, heads, scale, need_rows):
    """The gradients of q and rows, one step's keys in memory at a time."""
    B, S, N, W = rows.shape
    if _empty(q, rows, table):
        return torch.zeros_like(q), rows.new_zeros(rows.shape if need_rows else 0)
    grad_q, grad_rows = [], torch.zeros(B, N, S, W, dtype=_wide(rows), device=rows.device)
    for s in range(q.shape[1]):
        query, k, v, scores, absent = _scores(q, rows, table, sizes, mask, heads, scale, s)
        weights = (scores - lse[:, s, ..., None]).exp().masked_fill(absent, 0).to(q.dtype)
        grad, y = (x[:, s].unflatten(-1, (heads, -1)).transpose(1, 2) for x in (grad_out, out))
        delta = (grad * y).sum(-1, keepdim=True)
        grad_scores = weights * (grad @ v.transpose(-1, -2) - delta) * scale
        grad_q.append((grad_scores @ k).transpose(1, 2).flatten(2))
        if not need_rows:
            continue
        found = torch.stack([grad_scores.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad])
        found = found.permute(1, 3, 0, 2, 4).flatten(2).unflatten(1, (N, -1)).to(grad_rows.dtype)  # [B, N, L, 2D]
        if table is not None:  # a product with zeros and ones: a scatter would add in any order on a GPU
            slot = torch.arange(S, device=rows.device)[:, None]
            found = (table[:, s, :, None] == slot).to(found.dtype) @ found
        grad_rows += found
    grad_rows = grad_rows.transpose(1, 2).to(rows.dtype).contiguous() if need_rows else rows.new_empty(0)
    return torch.stack(grad_q, dim=1), grad_rows


def _reference_out(q, rows, table, sizes, mask, heads, scale, out):
    out.copy_(reference(q, rows, table, sizes, mask, heads, scale)[0])


def _fake(q, rows, table, sizes, mask, heads, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[1], heads, q.shape[2], dtype=_wide(q))


def _flops(q, rows, table, sizes, mask, heads, scale, *out):
    B, t, n, D = q
    L = rows[1] if table is None else table[3]
    return 4 * B * t * n * rows[2] * L * D  # scores, and their product with the values


def _flops_backward(grad_out, q, rows, table, sizes, mask, out, lse, heads, scale, need_rows):
    """Five products where forward has two, or three."""
    return _flops(q, rows, table, sizes, mask, heads, scale) // 2 * (5 if need_rows else 3)


def _setup_context(ctx, inputs, output):
    q, rows, table, sizes, mask, ctx.heads, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, rows, table, sizes, mask, *output)


def _backward(ctx, grad_out, _):
    need_rows = ctx.needs_input_grad[1]
    grad_q, grad_rows = _op_backward(grad_out, *ctx.saved_tensors, ctx.heads, ctx.scale, need_rows)
    return grad_q, grad_rows if need_rows else None, *[None] * 5


_INPUTS = "Tensor q, Tensor rows, Tensor? table, Tensor? sizes, Tensor? mask"
_op = define(
    f"bank_attention({_INPUTS}, int heads, float scale) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    autocast="low",
    flops=_flops,
)
_op_out = define(
    f"bank_attention_out({_INPUTS}, int heads, float scale, Tensor(a!) out) -> ()",
    reference=_reference_out,
    fake=lambda q, rows, table, sizes, mask, heads, scale, out: None,
    flops=_flops,
)
_op_backward = define(
    f"bank_attention_backward(Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, int heads, float scale, "
    "bool need_rows) -> (Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda grad_out, q, rows, table, sizes, mask, out, lse, heads, scale, need_rows: (
        q.new_empty(q.shape),
        rows.new_empty(rows.shape if need_rows else 0),
    ),
    flops=_flops_backward,
)
