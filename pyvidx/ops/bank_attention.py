"""Attention of few queries over the many rows of a memory, which a table of slots names (MA-LMM, section 3.2)."""

import torch
from torch import Tensor

from pyvidx.ops._library import define, require, require_floating, require_out

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
        Differentiable in q and rows; the gradient is plain torch, one step at a time. Under torch.autocast it runs in
        the autocast dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        IndexError: a slot of the table is out of range (CPU).
    """
    _check(q, rows, table, heads, sizes, mask)
    mask = None if mask is None else mask.to(torch.int32)
    scale = (q.shape[3] // heads) ** -0.5 if scale is None else float(scale)
    if out is None:
        return _op(q, rows, table, sizes, mask, heads, scale)
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
        f"bank_attention: D must be heads * d, d a multiple of 8 up to {MAX_WIDTH}, got D = {D}, heads = {heads}",
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
    require(sizes is None or sizes.shape[3] == L, f"bank_attention: sizes must be [B, t, N, {L}]", sizes)
    require(
        mask is None or (mask.dtype == torch.bool and mask.device == q.device and mask.shape == (B, N)),
        "bank_attention: mask must be bool [B, N] on q's device",
        mask,
        rows,
    )
    if table is not None and table.numel() and q.device.type == "cpu" and not torch.compiler.is_compiling():
        high = int(table.amax())
        if high >= S:
            raise IndexError(f"bank_attention: table must name slots below {S}, got {high}")


def _step(q, rows, table, sizes, mask, heads, scale, s):
    """Of step s: q [B, H, n, d], the keys and the values [B, H, N * L, d], and the softmax [B, H, n, N * L]."""
    B, S, N, W = rows.shape
    slot = torch.arange(S, device=rows.device).expand(B, N, S) if table is None else table[:, s]
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
    absent = ~present.flatten(1)[:, None, None]
    weights = torch.softmax(scores.masked_fill(absent, torch.finfo(scores.dtype).min), dim=-1).masked_fill(absent, 0)
    return query, k, v, weights


def reference(q, rows, table, sizes, mask, heads, scale):
    if q.shape[1] == 0 or q.shape[2] == 0 or rows.numel() == 0 or (table is not None and table.shape[3] == 0):
        return q.new_zeros(q.shape)
    steps = []
    for s in range(q.shape[1]):
        _, _, v, weights = _step(q, rows, table, sizes, mask, heads, scale, s)
        steps.append((weights @ v).transpose(1, 2).flatten(2))
    return torch.stack(steps, dim=1)


def gradients(grad_out, q, rows, table, sizes, mask, heads, scale):
    """The gradients of q and rows, exact, with the softmax computed again; one step's keys in memory at a time."""
    grad_q, wide = [], torch.float64 if rows.dtype == torch.float64 else torch.float32
    B, S, N, W = rows.shape
    grad_rows = torch.zeros(B, N, S, W, dtype=wide, device=rows.device)
    for s in range(q.shape[1]):
        query, k, v, weights = _step(q, rows, table, sizes, mask, heads, scale, s)
        grad = grad_out[:, s].unflatten(-1, (heads, -1)).transpose(1, 2)
        grad_weights = grad @ v.transpose(-1, -2)
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * scale
        grad_q.append((grad_scores @ k).transpose(1, 2).flatten(2))
        found = torch.stack([grad_scores.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad])
        found = found.permute(1, 3, 0, 2, 4).flatten(2).unflatten(1, (N, -1)).to(wide)  # [B, N, L, 2D]
        if table is not None:  # a product with zeros and ones: a scatter would add in any order on a GPU
            slot = torch.arange(S, device=rows.device)[:, None]
            found = (table[:, s, :, None] == slot).to(wide) @ found
        grad_rows = grad_rows + found
    return torch.stack(grad_q, dim=1), grad_rows.transpose(1, 2).to(rows.dtype)


def _reference_out(q, rows, table, sizes, mask, heads, scale, out):
    out.copy_(reference(q, rows, table, sizes, mask, heads, scale))


def _flops(q, rows, table, sizes, mask, heads, scale, *out):
    B, t, n, D = q
    L = rows[1] if table is None else table[3]
    return 4 * B * t * n * rows[2] * L * D  # scores, and their product with the values


def _setup_context(ctx, inputs, output):
    q, rows, table, sizes, mask, ctx.heads, ctx.scale = inputs
    ctx.save_for_backward(q, rows, table, sizes, mask)


def _backward(ctx, grad_out):
    q, rows, table, sizes, mask = ctx.saved_tensors
    if q.numel() == 0 or rows.numel() == 0 or (table is not None and table.shape[3] == 0):
        return torch.zeros_like(q), torch.zeros_like(rows), *[None] * 5
    return *gradients(grad_out, q, rows, table, sizes, mask, ctx.heads, ctx.scale), *[None] * 5


_op = define(
    "bank_attention(Tensor q, Tensor rows, Tensor? table, Tensor? sizes, Tensor? mask, int heads, float scale)"
    " -> Tensor",
    reference=reference,
    fake=lambda q, rows, table, sizes, mask, heads, scale: q.new_empty(q.shape),
    backward=_backward,
    setup_context=_setup_context,
    autocast="low",
    flops=_flops,
)
_op_out = define(
    "bank_attention_out(Tensor q, Tensor rows, Tensor? table, Tensor? sizes, Tensor? mask, int heads, float scale,"
    " Tensor(a!) out) -> ()",
    reference=_reference_out,
    fake=lambda q, rows, table, sizes, mask, heads, scale, out: None,
    flops=_flops,
)
