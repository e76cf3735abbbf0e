import pytest
import torch

from pyvidx.ops.token_gather import reference, source_table, token_gather
from tests.harness import DEVICES, DTYPES, assert_close_to_reference, assert_gradients_close, poisoned, randn

# B, T, P, C: one, odd, prime, one past a vector, the papers' width
CASES = [(1, 1, 1, 1), (2, 3, 5, 17), (1, 4, 7, 64), (2, 2, 16, 131)]
op = torch.ops.pyvidx.token_gather


def inputs(shape, mask, device="cpu", dtype=torch.float32):
    B, T, P, C = shape
    g = torch.Generator().manual_seed(1)
    K = max(1, int(0.3 * P))
    if mask == "tube":
        keep = torch.stack([torch.randperm(P, generator=g)[:K] for _ in range(B)])
    elif mask == "shared":  # one table for all videos
        keep = torch.randperm(P, generator=g)[None, :K]
    else:  # any order, another number of slots than frames
        keep = torch.stack([torch.randperm(T * P, generator=g)[: K * (T + 1) // 2 * 2] for _ in range(B)])
        keep = keep.reshape(B, 2, -1) if keep.shape[1] % 2 == 0 else keep[:, None]
    tokens = randn(B, T, P + 1, C, dtype=dtype, device=device)
    return (
        tokens[:, :, 1:],
        keep.to(device),
        randn(P, C, dtype=dtype, device=device, seed=2),
        randn(T + 2, C, dtype=dtype, device=device, seed=3),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["tube", "shared", "table"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_forward(shape, mask, dtype, device):
    x, keep, position, time = inputs(shape, mask, device, dtype)
    assert_close_to_reference(op, reference, (x, keep, position, time))
    assert torch.equal(op(x, keep, None, None), reference(x, keep, None, None)), "a plain gather is exact"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["tube", "table"])
def test_backward(mask, dtype, device):
    x, keep, position, time = inputs((2, 3, 5, 17), mask, device, dtype)
    for t in (x, position, time):
        t.requires_grad_()
    assert_gradients_close(token_gather, lambda x, k, p, t: reference(x, k, p, t), (x, keep, position, time))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("missing", ["position", "time"])
def test_optional(missing, device):
    x, keep, position, time = inputs((2, 3, 5, 17), "tube", device)
    position, time = (None, time) if missing == "position" else (position, None)
    assert_close_to_reference(op, reference, (x, keep, position, time))


@pytest.mark.parametrize("device", DEVICES)
def test_out_and_transposed_input(device):
    x, keep, position, time = inputs((2, 3, 5, 17), "tube", device)
    x = x.transpose(-1, -2).contiguous().transpose(-1, -2)  # last stride is not 1
    out = poisoned((2, 3, keep.shape[1], 17), x)
    assert token_gather(x, keep, position, time, out=out) is out
    assert torch.equal(out, token_gather(x, keep, position, time))
    with pytest.raises(ValueError, match="out= has no gradient"):
        token_gather(x.requires_grad_(), keep, position, time, out=out)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_kept(device):
    x, _, position, time = inputs((2, 3, 5, 17), "tube", device)
    keep = torch.empty(2, 0, dtype=torch.int64, device=device)
    assert token_gather(x, keep, position, time).shape == (2, 3, 0, 17)
    source = source_table(keep, 2, 3, 5)
    assert torch.ops.pyvidx.token_gather_backward(x.new_empty(2, 3, 0, 17), source).abs().sum() == 0


def test_large_output_streams():
    """Outputs beyond 1 MB are written past the caches."""
    x, keep = randn(1, 8, 256, 1024, sliced=False), torch.arange(200)[None]
    assert torch.equal(token_gather(x, keep), reference(x, keep, None, None))


@pytest.mark.parametrize("mask", ["tube", "table"])
def test_gradcheck(mask):
    x, keep, position, time = inputs((2, 2, 3, 3), mask, dtype=torch.float64)
    args = [t.contiguous().requires_grad_() for t in (x, position, time)]
    assert torch.autograd.gradcheck(lambda x, p, t: token_gather(x, keep, p, t), args)


def test_registration():
    x, keep, position, time = inputs((2, 2, 3, 4), "tube")
    torch.library.opcheck(op.default, (x.detach().requires_grad_(), keep, position, time))
    torch.library.opcheck(
        torch.ops.pyvidx.token_gather_out.default, (x, keep, position, time, x.new_empty(2, 2, keep.shape[1], 4))
    )


def test_compiled():
    x, keep, position, time = inputs((2, 2, 3, 4), "tube")
    f = torch.compile(lambda *a: token_gather(*a) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(f(x, keep, position, time), token_gather(x, keep, position, time) * 2)


def test_autocast_takes_the_widest():
    x, keep, position, time = inputs((2, 2, 3, 4), "tube")
    with torch.autocast("cpu", torch.bfloat16):
        assert token_gather(x.bfloat16(), keep, position, time).dtype == torch.float32


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda x, k, p, t: (x[0], k, p, t), ValueError, r"x must be \[B, T, P, C\]"),
        (lambda x, k, p, t: (x, k.int(), p, t), ValueError, "keep must be int64"),
        (lambda x, k, p, t: (x, k[:, None, None], p, t), ValueError, "keep must be"),
        (lambda x, k, p, t: (x, k, p[1:], t), ValueError, r"position must be \[P, C\]"),
        (lambda x, k, p, t: (x, k, p, t[:1]), ValueError, "time must be"),
        (lambda x, k, p, t: (x, k, p.double(), t), ValueError, "position must have the dtype"),
        (lambda x, k, p, t: (x, k + 5, p, t), IndexError, r"in \[0, 3\)"),
    ],
)
def test_rejects(change, error, message):
    with pytest.raises(error, match=message):
        token_gather(*change(*inputs((2, 2, 3, 4), "tube")))
