import pytest
import torch
import torch.nn.functional as F

from pyvidx.ops.temporal_scale import MAX_TAPS, reference, temporal_scale
from tests.harness import DEVICES, DTYPES, assert_close_to_reference, assert_gradients_close, poisoned, randn

# B, T, N, C, K: one; odd and prime; one past the rows and frames of a part; whole 16 bytes; more taps than frames; one
# and a half blocks of channels
CASES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 17, 3),
    (1, 17, 9, 40, 3),
    (2, 5, 7, 64, 3),
    (1, 4, 6, 24, 5),
    (1, 2, 3, 8, MAX_TAPS),
    (1, 6, 2, 384, 3),
]
op = torch.ops.pyvidx.temporal_scale


def inputs(shape, masked=False, device="cpu", dtype=torch.float32, sliced=True):
    B, T, N, C, K = shape
    rows = {"dtype": dtype, "device": device, "sliced": sliced}
    x, residual = randn(B, T, N, C, **rows), randn(B, T, N, C, seed=2, **rows)
    mask = None
    if masked:
        mask = (randn(B, T, seed=3, sliced=False, device=device) > -0.5).to(torch.int32)
        mask[:, -1] = 0
    weight = randn(C, K, dtype=dtype, device=device, seed=4, sliced=False)
    return x, weight, randn(C, dtype=dtype, device=device, seed=5, sliced=False), mask, residual


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_forward(shape, masked, dtype, device):
    assert_close_to_reference(op, reference, inputs(shape, masked, device, dtype))
    x, weight, bias, mask, residual = inputs(shape, masked, device, dtype, sliced=False)  # whole, aligned rows
    assert_close_to_reference(op, reference, (x, weight, bias, mask, residual))
    assert_close_to_reference(op, reference, (x, weight, None, mask, None))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("shape", CASES[1:], ids=str)
def test_backward(shape, sliced, masked, dtype, device):
    x, weight, bias, mask, residual = inputs(shape, masked, device, dtype, sliced)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    assert_gradients_close(op, reference, (*leaves, mask, residual.requires_grad_()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [CASES[1], CASES[3]], ids=str)
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_gradient_of_one_input(wanted, shape, device):
    x, weight, bias, mask, _ = inputs(shape, True, device, sliced=False)
    arguments = [x, weight, bias]
    arguments[wanted].requires_grad_()
    assert_gradients_close(
        lambda x, w, b: temporal_scale(x, w, b, mask=mask != 0), lambda *a: reference(*a, mask, None), arguments
    )


def conv3d(x, weight, bias):
    """The convolution of the public code, in its layout."""
    B, T, N, C = x.shape
    grid = x.permute(0, 3, 1, 2).reshape(B, C, T, N, 1)
    K = weight.shape[1]
    y = F.conv3d(grid, weight.view(C, 1, K, 1, 1), bias, padding=(K // 2, 0, 0), groups=C)
    return y.flatten(3).permute(0, 2, 3, 1)


@pytest.mark.parametrize("K", [1, 3, 7])
def test_is_the_depthwise_convolution(K):
    x, weight, bias, *_ = inputs((2, 5, 4, 6, K), dtype=torch.float64)
    torch.testing.assert_close(temporal_scale(x, weight, bias), conv3d(x, weight, bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("C", [17, 64])
def test_what_a_masked_frame_holds_does_not_matter(C, device):
    x, weight, bias, _, _ = inputs((2, 5, 7, C, 3), device=device)
    mask = torch.tensor([[True, True, True, False, False], [True, False, True, True, True]], device=device)
    filled = x.clone()
    filled[~mask] = float("nan")
    assert torch.equal(
        temporal_scale(filled, weight, bias, mask=mask), temporal_scale(x * mask[..., None, None], weight, bias)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_out_and_awkward_strides(device):
    x, weight, bias, _, residual = inputs((2, 3, 5, 17, 3), device=device)
    want = temporal_scale(x, weight, bias, residual=residual)
    x = x.transpose(-1, -2).contiguous().transpose(-1, -2)  # last stride is not 1
    weight = weight.T.contiguous().T
    out = poisoned(x.shape, x)
    assert temporal_scale(x, weight, bias, residual=residual, out=out) is out
    assert torch.equal(out, want)
    one = residual[:, :1, :1].expand(x.shape)  # the same row for all: strides of 0
    torch.testing.assert_close(
        temporal_scale(x, weight, bias, residual=one), temporal_scale(x, weight, bias, residual=one.contiguous())
    )
    with pytest.raises(ValueError, match="out= has no gradient"):
        temporal_scale(x.requires_grad_(), weight, bias, out=out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 0, 5, 8), (2, 3, 0, 8), (2, 3, 5, 0)], ids=str)
def test_empty(shape, device):
    x, weight, bias, *_ = inputs((*shape, 3), device=device, sliced=False)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    grads = torch.autograd.grad(temporal_scale(*leaves).sum(), leaves)
    assert [g.shape for g in grads] == [t.shape for t in leaves]
    assert all(not g.any() for g in grads)


def test_large_output_streams():
    """Outputs beyond 1 MB are written past the caches."""
    x, weight, bias, *_ = inputs((1, 8, 197, 768, 3), sliced=False)
    torch.testing.assert_close(temporal_scale(x, weight, bias), reference(x, weight, bias, None, None))


@pytest.mark.parametrize("device", DEVICES)
def test_sums_are_repeatable(device):
    x, weight, bias, *_ = inputs((2, 17, 33, 64, 3), device=device, sliced=False)
    grads = [torch.ops.pyvidx.temporal_scale_backward(x, x, weight, None)[1:] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked):
    x, weight, bias, mask, residual = inputs((2, 3, 2, 3, 3), masked, dtype=torch.float64)
    args = [t.contiguous().requires_grad_() for t in (x, weight, bias, residual)]
    assert torch.autograd.gradcheck(lambda x, w, b, r: op(x, w, b, mask, r), args)


def test_registration():
    x, weight, bias, mask, residual = inputs((2, 3, 2, 4, 3), True)
    torch.library.opcheck(
        op.default, (x.detach().requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), mask, residual)
    )
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    out = torch.ops.pyvidx.temporal_scale_out.default
    torch.library.opcheck(out, (x, weight, bias, mask, residual, x.new_empty(x.shape)))
    torch.library.opcheck(torch.ops.pyvidx.temporal_scale_backward.default, (x, x, weight, mask))
    torch.library.opcheck(torch.ops.pyvidx.temporal_scale_backward.default, (x, None, weight, mask))


def test_compiled():
    x, weight, bias, *_ = inputs((2, 3, 2, 4, 3))
    f = torch.compile(lambda *a: temporal_scale(*a) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(f(x, weight, bias), temporal_scale(x, weight, bias) * 2)


def test_autocast_as_a_convolution():
    x, weight, bias, *_ = inputs((2, 3, 2, 4, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert temporal_scale(x.bfloat16(), weight, bias).dtype == torch.bfloat16
        assert temporal_scale(x, weight, bias).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, w, b: ((x[0], w, b), {}), r"x must be \[B, T, N, C\]"),
        (lambda x, w, b: ((x, w[1:], b), {}), r"weight must be \[C, K\]"),
        (lambda x, w, b: ((x, w[:, :2], b), {}), "K odd"),
        (lambda x, w, b: ((x, w.repeat(1, 7), b), {}), "at most 15"),
        (lambda x, w, b: ((x, w, b[1:]), {}), r"bias must be \[C\]"),
        (lambda x, w, b: ((x, w.double(), b), {}), "weight must have the dtype"),
        (lambda x, w, b: ((x, w, b), {"mask": torch.ones(2, 3)}), r"mask must be bool \[B, T\]"),
        (lambda x, w, b: ((x, w, b), {"mask": torch.ones(3, 2).bool()}), r"mask must be bool \[B, T\]"),
        (lambda x, w, b: ((x, w, b), {"residual": x[:1]}), "residual must be like x"),
        (lambda x, w, b: ((x, w, b), {"out": x[:1]}), "out must be"),
    ],
)
def test_rejects(change, message):
    arguments, keywords = change(*inputs((2, 3, 5, 4, 3))[:3])
    with pytest.raises(ValueError, match=message):
        temporal_scale(*arguments, **keywords)
