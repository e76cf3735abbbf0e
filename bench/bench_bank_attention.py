"""Cross-attention of a Q-Former over MA-LMM's full visual bank: 32 queries, 257 positions, 12 heads of 64.

"slots": a stream's frame, all slots as they lie, against torch's attention, for which they are contiguous. "table": 16
frames of a clip, whose keys a table names, against a gather of each step's keys and torch's attention. The backward
pass, to queries and rows, is measured against the same formulas in plain torch, a step at a time.

"self": the attention in space of pyvidx.layers.attention, 16 heads of 64 from packed q, k and v, against torch's.
"""

import pytest
import torch
import torch.nn.functional as F

from bench.harness import Case, nbytes
from pyvidx.ops.bank_attention import bank_attention, reference_backward

QUERIES, POSITIONS, HEADS, WIDTH = 32, 257, 12, 768
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAME = lambda d: str(d).removeprefix("torch.")  # noqa: E731


def attend(q, rows, heads=HEADS):
    """q [t, n, D] over rows [t, any, 2D]"""
    k, v = rows.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    query = q.unflatten(-1, (heads, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(query, k, v).transpose(1, 2).flatten(2)


def inputs(path, M, dtype, device):
    t = 16 if path == "table" else 1
    S = M + 1 + (2 * t if path == "table" else 0)
    q = torch.randn(1, t, QUERIES, WIDTH, device=device).to(dtype)
    rows = torch.randn(1, S, POSITIONS, 2 * WIDTH, device=device).to(dtype)
    table = torch.rand(1, t, POSITIONS, S, device=device).argsort(-1)[..., : M + 1].int() if path == "table" else None
    return t, S, q, rows, table


def case(path, M, dtype, device):
    t, S, q, rows, table = inputs(path, M, dtype, device)
    positions = torch.arange(POSITIONS, device=device)[:, None]
    steps = [None] if table is None else [(table[0, s].long() * POSITIONS + positions).flatten() for s in range(t)]

    def eager():
        found = rows[0].flatten(0, 1)
        return torch.stack(
            [attend(q[:, s], (found if i is None else found.index_select(0, i))[None]) for s, i in enumerate(steps)]
        )

    return Case(
        "bank_attention",
        {"path": path, "M": M, "t": t, "S": S},
        dtype,
        lambda: bank_attention(q, rows, table, HEADS),
        eager,
        bytes=nbytes(rows, q, q),
        flops=4 * t * QUERIES * (M + 1) * POSITIONS * WIDTH,
    )


def backward_case(path, M, dtype, device):
    t, S, q, rows, table = inputs(path, M, dtype, device)
    scale = (WIDTH // HEADS) ** -0.5
    y, lse = torch.ops.pyvidx.bank_attention(q, rows, table, None, None, HEADS, scale)
    args = (torch.randn_like(y), q, rows, table, None, None, y, lse, HEADS, scale, True)
    return Case(
        "bank_attention_backward",
        {"path": path, "M": M, "t": t, "S": S},
        dtype,
        lambda: torch.ops.pyvidx.bank_attention_backward(*args),
        lambda: reference_backward(*args),
        bytes=nbytes(rows, rows, q, q, q, q),
        flops=10 * t * QUERIES * (M + 1) * POSITIONS * WIDTH,
    )


def self_case(rows, N, backward, dtype, device):
    heads, width = 16, 1024
    qkv = torch.randn(rows, N, 3 * width, device=device).to(dtype).requires_grad_(backward)
    q, kv = qkv[..., :width], qkv[..., width:]
    run, eager = lambda: bank_attention(q[:, None], kv[:, None], None, heads)[:, 0], lambda: attend(q, kv, heads)
    if backward:
        with torch.enable_grad():
            outputs, grad = [run(), eager()], torch.randn(rows, N, width, device=device).to(dtype)
        run, eager = (lambda y=y: torch.autograd.grad(y, (q, kv), grad, retain_graph=True) for y in outputs)
    return Case(
        "bank_attention self" + (" backward" if backward else ""),
        {"rows": rows, "N": N},
        dtype,
        run,
        eager,
        bytes=nbytes(qkv, qkv, q, q) if backward else nbytes(qkv, q),
        flops=(10 if backward else 4) * rows * N * N * width,
        compiled=not backward,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=NAME)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("rows, N", [(32, 78), (8, 257), (8, 577), (1, 2049)])
def test_self_attention(rows, N, backward, dtype, device, measure):
    measure(self_case(rows, N, backward, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAME)
@pytest.mark.parametrize("M", [10, 20, 40])
@pytest.mark.parametrize("path", ["slots", "table"])
def test_bank_attention(path, M, dtype, device, measure):
    measure(case(path, M, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAME)
@pytest.mark.parametrize("M", [10, 20, 40])
@pytest.mark.parametrize("path", ["slots", "table"])
def test_bank_attention_backward(path, M, dtype, device, measure):
    measure(backward_case(path, M, dtype, device))
