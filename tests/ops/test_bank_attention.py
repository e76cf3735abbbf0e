import pytest
import torch

from pyvidx.ops.bank_attention import bank_attention, reference, reference_backward
from tests.harness import DEVICES, DTYPES, assert_close_to_reference, assert_gradients_close, poisoned, randn

# B, t, n, N, S, L, heads, d: one of each; odd; the papers' width; more keys than a tile; several splits; the widest
CASES = [
    (1, 1, 1, 1, 1, 1, 1, 8),
    (2, 3, 5, 3, 4, 3, 2, 24),
    (1, 2, 17, 7, 6, 5, 1, 64),
    (2, 1, 33, 13, 9, 7, 2, 88),
    (1, 1, 9, 211, 12, 10, 1, 16),
    (1, 2, 4, 5, 30, 21, 1, 128),
]
op = torch.ops.pyvidx.bank_attention
op_backward = torch.ops.pyvidx.bank_attention_backward


def attend(*args):
    return op(*args)[0]


def plain(*args):
    return reference(*args)[0]


def inputs(shape, device="cpu", dtype=torch.float32, tabled=True, sliced=True):
    """q, rows, table, sizes, mask, heads, scale; a fifth of the table's entries name nothing. Not sliced: kernels can
    read 16 bytes of q and rows at a time."""
    B, t, n, N, S, L, H, d = shape
    g = torch.Generator().manual_seed(5)
    table = torch.rand(B, t, N, S, generator=g).argsort(-1)[..., :L].int()
    table[torch.rand(table.shape, generator=g) < 0.2] = -1
    sizes = torch.randint(1, 9, table.shape if tabled else (B, t, N, S), generator=g, dtype=torch.int32)
    mask = (torch.rand(B, N, generator=g) < 0.8).int()
    mask[:, 0] = 1
    q = randn(B, t, n, H * d, dtype=dtype, device=device, sliced=sliced)
    rows = randn(B, S, N, 2 * H * d, dtype=dtype, device=device, seed=2, sliced=sliced)
    return q, rows, table.to(device) if tabled else None, sizes.to(device), mask.to(device), H, d**-0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tabled", [True, False], ids=["table", "all"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_forward(shape, tabled, dtype, device):
    q, rows, table, sizes, mask, *rest = inputs(shape, device, dtype, tabled)
    assert_close_to_reference(op, reference, (q, rows, table, sizes, mask, *rest))
    assert_close_to_reference(op, reference, (q, rows, table, None, None, *rest))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_attention(dtype, device):
    """Against torch's own attention: of rows that lie aligned, and of a size k as of k copies."""
    q, rows = randn(2, 1, 8, 128, dtype=dtype, device=device, sliced=False), randn(2, 3, 5, 256, sliced=False)
    rows = rows.to(device, dtype)
    sizes = torch.randint(1, 4, (2, 1, 5, 3), dtype=torch.int32, device=device)

    def plain(q, rows):
        heads = []
        for b in range(2):
            copied = rows[b].transpose(0, 1).reshape(15, -1).repeat_interleave(sizes[b].flatten(), dim=0)
            k, v = copied.view(-1, 2, 2, 64).permute(1, 2, 0, 3)
            query = q[b, 0].view(8, 2, 64).transpose(0, 1)
            y = torch.nn.functional.scaled_dot_product_attention(query[None], k[None], v[None])[0]
            heads.append(y.transpose(0, 1).flatten(1))
        return torch.stack(heads)[:, None]

    assert_close_to_reference(lambda q, rows: bank_attention(q, rows, None, 2, sizes=sizes), plain, (q, rows))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tabled", [True, False], ids=["table", "all"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_backward(shape, tabled, dtype, device):
    q, rows, table, sizes, mask, *rest = inputs(shape, device, dtype, tabled)
    sizes, mask = (sizes, mask) if tabled else (None, None)
    assert_gradients_close(attend, plain, (q.requires_grad_(), rows.requires_grad_(), table, sizes, mask, *rest))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tabled", [True, False], ids=["table", "all"])
@pytest.mark.parametrize("width", [64, 72])
def test_aligned_rows(width, tabled, dtype, device):
    """Forward and backward of heads of the papers' width and of another, with queries and rows beyond a tile."""
    q, rows, *rest = inputs((1, 2, 19, 5, 4, 3, 1, width), device, dtype, tabled, sliced=False)
    assert_close_to_reference(op, reference, (q, rows, *rest))
    assert_gradients_close(attend, plain, (q.requires_grad_(), rows.requires_grad_(), *rest))


@pytest.mark.parametrize("device", DEVICES)
def test_a_warp_without_work(device):
    """261 heads of steps for blocks of two."""
    q, rows, *rest = inputs((1, 3, 1, 1, 2, 2, 87, 64), device, torch.float16, sliced=False)
    assert_close_to_reference(op, reference, (q, rows, *rest))
    assert_gradients_close(attend, plain, (q.requires_grad_(), rows.requires_grad_(), *rest))


@pytest.mark.parametrize("device", DEVICES)
def test_backward_to_the_queries_alone(device):
    q, rows, table, sizes, mask, *rest = inputs((2, 3, 5, 3, 4, 3, 2, 24), device)
    assert_gradients_close(attend, plain, (q.requires_grad_(), rows, table, None, mask, *rest))
    assert_gradients_close(attend, plain, (q.requires_grad_(), rows, None, sizes.new_ones(2, 3, 3, 4), None, *rest))


@pytest.mark.parametrize("tabled", [True, False], ids=["table", "all"])
def test_reference_backward(tabled):
    q, rows, *rest = inputs((2, 3, 5, 3, 4, 3, 2, 24), dtype=torch.float64, tabled=tabled)
    y, lse = reference(q.requires_grad_(), rows.requires_grad_(), *rest)
    grad = randn(*y.shape, dtype=torch.float64, seed=4)
    args = (grad, q, rows, *rest[:3], y.detach(), lse, *rest[3:])
    expected = torch.autograd.grad(y, (q, rows), grad)
    with torch.no_grad():
        torch.testing.assert_close(reference_backward(*args, True), expected)
        assert reference_backward(*args, False)[1].numel() == 0


@pytest.mark.parametrize("tabled", [True, False], ids=["table", "all"])
def test_gradcheck(tabled):
    q, rows, *rest = inputs((1, 2, 2, 2, 3, 2, 1, 8), dtype=torch.float64, tabled=tabled)
    q, rows = q.contiguous().requires_grad_(), rows.contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda q, rows: attend(q, rows, *rest), (q, rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_slot_named_twice(dtype):
    q, rows, table, sizes, mask, *rest = inputs((1, 2, 3, 2, 3, 3, 1, 8), dtype=dtype)
    table[...] = torch.tensor([2, 0, 2], dtype=torch.int32)
    inputs_ = (q.requires_grad_(), rows.requires_grad_(), table)
    assert_gradients_close(attend, plain, (*inputs_, sizes, mask, *rest))
    assert_gradients_close(attend, plain, (*inputs_, None, None, *rest))
    assert_close_to_reference(op, reference, (q.detach(), rows.detach(), table, sizes, mask, *rest))


@pytest.mark.parametrize("device", DEVICES)
def test_backward_writes_everything(device):
    """Rows that no step reads, steps without keys, no rows, no queries: gradients of 0, whatever the memory held."""
    q, rows, table, sizes, mask, *rest = inputs((2, 3, 5, 3, 4, 3, 2, 24), device)
    table[table == 2] = -1
    table[:, 1] = -1
    mask[:, 1] = 0
    leaves = q.requires_grad_(), rows.requires_grad_()
    y = attend(*leaves, table, sizes, mask, *rest)
    poisoned(rows.shape, rows)  # freed at once: what the allocator hands out next
    grad_q, grad_rows = torch.autograd.grad(y.sum(), leaves)
    assert grad_rows[:, 2].abs().max() == 0 and grad_rows[:, :, 1].abs().max() == 0
    assert grad_q[:, 1].abs().max() == 0 and grad_q[:, [0, 2]].abs().amax(-1).min() > 0
    nothing = [
        lambda q, rows: (q, rows[:, :0]),
        lambda q, rows: (q, rows[:, :, :0]),
        lambda q, rows: (q[:, :0], rows),
        lambda q, rows: (q[:, :, :0], rows),
    ]
    for some in nothing:
        grads = torch.autograd.grad(attend(*some(*leaves), None, None, None, *rest).sum(), leaves)
        assert all(g.abs().max() == 0 for g in grads)


@pytest.mark.parametrize("device", DEVICES)
def test_steps_without_keys(device):
    q, rows, table, sizes, mask, heads, _ = inputs((2, 3, 5, 3, 4, 3, 2, 24), device)
    table[:, 1] = -1
    y = bank_attention(q, rows, table, heads, sizes=sizes)
    assert y[:, 1].abs().max() == 0 and y[:, [0, 2]].abs().min(dim=-1).values.min() > 0
    assert bank_attention(q, rows, table, heads, mask=torch.zeros_like(mask).bool()).abs().max() == 0
    for none in (rows[:, :0], rows[:, :, :0]):
        assert bank_attention(q, none, None, heads).abs().max() == 0
    assert bank_attention(q[:, :0], rows, None, heads).shape == (2, 0, 5, 48)
    assert bank_attention(q[:, :, :0], rows, None, heads).shape == (2, 3, 0, 48)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_scores(dtype, device):
    """Scores of hundreds that grow from block to block: e^score overflows, the running softmax does not."""
    q, rows, *_ = inputs((1, 1, 5, 40, 4, 4, 1, 16), device, dtype)
    slack = 40 if dtype == torch.float32 else 1  # a score of 600 is itself rounded by 3e-5, whatever the order of sums
    for scale in (20.0, -20.0):
        assert_close_to_reference(attend, plain, (q, rows, None, None, None, 1, scale), slack=slack)


@pytest.mark.parametrize("device", DEVICES)
def test_out_and_strides(device):
    q, rows, table, sizes, mask, heads, scale = inputs((2, 3, 5, 3, 4, 3, 2, 24), device)
    expected = attend(q, rows, table, sizes, mask, heads, scale)
    out = poisoned((2, 3, 5, 50), q)[..., :48]
    assert bank_attention(q, rows, table, heads, sizes=sizes, mask=mask.bool(), out=out) is out
    assert torch.equal(out, expected)
    turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, rows)]  # last stride is not 1
    assert torch.equal(attend(*turned, table, sizes, mask, heads, scale), expected)
    leaves = [(x.requires_grad_(), y.requires_grad_()) for x, y in ((q, rows), turned)]
    ones = torch.ones(1, device=device).expand(expected.shape)
    grads = [torch.autograd.grad(attend(*x, table, sizes, mask, heads, scale), x, ones) for x in leaves]
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    with pytest.raises(ValueError, match="out= has no gradient"):
        bank_attention(q, rows, table, heads, out=out)


@pytest.mark.parametrize("device", DEVICES)
def test_deterministic(device):
    q, rows, *rest = inputs((1, 3, 9, 211, 12, 10, 1, 16), device)
    leaves = q.requires_grad_(), rows.requires_grad_()
    runs = []
    for _ in range(2):
        y = attend(*leaves, *rest)
        runs.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_registration():
    q, rows, *rest = inputs((1, 2, 3, 2, 3, 2, 1, 8))
    q, rows = q.contiguous(), rows.contiguous()
    torch.library.opcheck(op.default, (q.clone().requires_grad_(), rows.clone().requires_grad_(), *rest))
    torch.library.opcheck(torch.ops.pyvidx.bank_attention_out.default, (q, rows, *rest, torch.empty_like(q)))
    y, lse = op(q, rows, *rest)
    for need_rows in (True, False):
        args = (torch.ones_like(y), q, rows, *rest[:3], y, lse, *rest[3:], need_rows)
        torch.library.opcheck(op_backward.default, args)


def test_compiled():
    q, rows, table, sizes, mask, heads, _ = inputs((1, 2, 3, 2, 3, 2, 1, 8))

    def double(q, rows):
        return bank_attention(q, rows, table, heads, sizes=sizes, mask=mask.bool()) * 2

    f = torch.compile(double, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(f(q, rows), double(q, rows))
    leaves = q.requires_grad_(), rows.requires_grad_()
    results = [torch.autograd.grad(g(*leaves).square().sum(), leaves) for g in (f, double)]
    torch.testing.assert_close(*results)


def test_autocast_takes_the_low_dtype():
    q, rows, table, _, _, heads, _ = inputs((1, 2, 3, 2, 3, 2, 1, 8))
    with torch.autocast("cpu", torch.bfloat16):
        expected = bank_attention(q.bfloat16(), rows.bfloat16(), table, heads)
        assert torch.equal(bank_attention(q, rows, table, heads), expected)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda q, r, t, s, m: (q[0], r, t, 2, s, m), ValueError, r"q must be \[B, t, n, D\]"),
        (lambda q, r, t, s, m: (q, r[..., 1:], t, 2, s, m), ValueError, r"rows must be \[B, S, N, 2D\]"),
        (lambda q, r, t, s, m: (q, r.double(), t, 2, s, m), ValueError, "rows must have the dtype"),
        (lambda q, r, t, s, m: (q, r, t, 3, s, m), ValueError, "D = 16, heads = 3"),
        (lambda q, r, t, s, m: (q, r, t, 4, s, m), ValueError, "multiple of 8"),
        (lambda q, r, t, s, m: (q, r, t.long(), 2, s, m), ValueError, "table must be int32"),
        (lambda q, r, t, s, m: (q, r, t[:, :1], 2, s, m), ValueError, r"table must be int32 \[B, t, N, L\]"),
        (lambda q, r, t, s, m: (q, r, t, 2, s.float(), m), ValueError, "sizes must be int32"),
        (lambda q, r, t, s, m: (q, r, None, 2, s, m), ValueError, r"sizes must be \[B, t, N, 4\]"),
        (lambda q, r, t, s, m: (q, r, t, 2, s, m[:, 1:]), ValueError, r"mask must be bool \[B, N\]"),
        (lambda q, r, t, s, m: (q, r, t + 2, 2, s, m), IndexError, "slots below 4, got 5"),
    ],
)
def test_rejects(change, error, message):
    q, rows, table, sizes, mask, *_ = inputs((1, 2, 3, 5, 4, 3, 2, 8))
    q, rows, table, heads, sizes, mask = change(q, rows, table, sizes, mask.bool())
    with pytest.raises(error, match=message):
        bank_attention(q, rows, table, heads, sizes=sizes, mask=mask)
