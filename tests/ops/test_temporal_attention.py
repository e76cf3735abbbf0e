import os

import pytest
import torch

from pyvidx.ops.temporal_attention import reference, reference_backward, temporal_attention
from tests.harness import (
    DEVICES,
    DTYPES,
    assert_close_to_reference,
    assert_gradients_close,
    needs_kernels,
    poisoned,
    randn,
)

# B, T, P, H, D: one of each, odd, the papers' widths (64; 88 in EVA-g), around the tiles of 8, 16, 32 and 64 frames
CASES = [
    (1, 1, 1, 1, 1),
    (2, 2, 5, 3, 16),
    (1, 7, 5, 1, 40),
    (2, 8, 1, 3, 64),
    (1, 8, 3, 2, 48),
    (1, 8, 2, 2, 60),
    (1, 9, 2, 2, 88),
    (1, 16, 1, 3, 17),
    (1, 33, 1, 2, 64),
    (1, 64, 1, 2, 64),
    (1, 65, 1, 1, 88),
    (1, 128, 1, 1, 32),
]
op, op_backward = torch.ops.pyvidx.temporal_attention, torch.ops.pyvidx.temporal_attention_backward


def inputs(shape, device="cpu", dtype=torch.float32):
    """qkv as a class token's neighbors: a slice over P of a projection's [B, T, 1 + P, 3 * H * D]."""
    B, T, P, H, D = shape
    tokens = randn(B, T, P + 1, 3 * H * D, dtype=dtype, device=device, sliced=False)
    return tokens.view(B, T, P + 1, 3, H, D)[:, :, 1:]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_forward(shape, dtype, device):
    assert_close_to_reference(op, reference, (inputs(shape, device, dtype), shape[-1] ** -0.5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_backward(shape, dtype, device):
    B, T, P, H, D = shape
    grad_out = randn(B, T, P, H * D, dtype=dtype, device=device, seed=1)
    assert_close_to_reference(op_backward, reference_backward, (grad_out, inputs(shape, device, dtype), D**-0.5))


def test_reference_backward():
    """The gradient's reference is the derivative of the reference."""
    qkv = inputs((2, 7, 2, 3, 5), dtype=torch.float64).requires_grad_()
    out = reference(qkv, 0.7)
    grad_out = randn(*out.shape, dtype=torch.float64)
    (grad,) = torch.autograd.grad(out, qkv, grad_out)
    torch.testing.assert_close(reference_backward(grad_out, qkv, 0.7), grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_awkward_strides(dtype, device):
    """Every dimension is a window of a larger one, so no row is aligned; then the last stride is not 1."""
    qkv = randn(2, 5, 3, 3, 2, 24, dtype=dtype, device=device)
    assert_close_to_reference(op, reference, (qkv, 0.2))
    grad_out = randn(2, 5, 3, 48, dtype=dtype, device=device, seed=1)
    assert_close_to_reference(op_backward, reference_backward, (grad_out, qkv, 0.2))
    turned = qkv.transpose(2, 5).contiguous().transpose(2, 5)
    assert torch.equal(op(turned, 0.2), op(turned.contiguous(), 0.2))
    spread = torch.ones((), dtype=dtype, device=device).expand(2, 5, 3, 48)  # the gradient of a sum
    assert torch.equal(op_backward(spread, turned, 0.2), op_backward(spread.contiguous(), turned.contiguous(), 0.2))


@needs_kernels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [8, 40])
def test_huge_scores(T, dtype, device):
    """Scores of hundreds: e^score overflows, the softmax does not."""
    qkv = inputs((1, T, 2, 2, 32), device, dtype)
    slack = 40 if dtype == torch.float32 else 1  # a score of 600 is itself rounded by 3e-5, whatever the order of sums
    assert_close_to_reference(op, reference, (qkv, 30.0), slack=slack)
    assert_close_to_reference(op, reference, (qkv, -30.0), slack=slack)
    qkv[:, :, :, :2] = 9.0  # all scores equal and huge: the plain mean of v
    mean = qkv[:, :, :, 2].double().mean(1, keepdim=True).expand(-1, T, -1, -1, -1).flatten(3)
    torch.testing.assert_close(op(qkv, 100.0), mean.to(dtype), atol=1e-6, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 3, 2, 2, 2), (1, 10, 1, 1, 3)], ids=str)
def test_gradcheck(shape, device):
    qkv = inputs(shape, device, torch.float64).contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: temporal_attention(x, scale=0.9), qkv)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autograd(dtype, device):
    qkv = inputs((2, 8, 3, 2, 16), device, dtype).requires_grad_()
    assert_gradients_close(temporal_attention, lambda x: reference(x, 0.25), (qkv,))


@pytest.mark.parametrize("device", DEVICES)
def test_out_and_scale(device):
    qkv = inputs((2, 8, 3, 2, 16), device)
    for shape in ((2, 8, 3, 32), (2, 8, 3, 40)):  # the second one's rows lie apart
        out = poisoned(shape, qkv)[..., :32]
        assert temporal_attention(qkv, out=out) is out
        assert torch.equal(out, op(qkv, 0.25)), "the default scale is D ** -0.5"
    assert torch.equal(temporal_attention(qkv, scale=1.0), op(qkv, 1.0))
    with pytest.raises(ValueError, match="out= has no gradient"):
        temporal_attention(qkv.requires_grad_(), out=out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 2, 3, 2, 4), (2, 0, 3, 2, 4), (2, 3, 0, 2, 4), (2, 3, 2, 0, 4), (2, 3, 2, 2, 0)])
def test_empty(shape, device):
    B, T, P, H, D = shape
    qkv = torch.empty(B, T, P, 3, H, D, device=device, requires_grad=True)
    out = temporal_attention(qkv)
    assert out.shape == (B, T, P, H * D)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


@pytest.mark.skipif("PYVIDX_OPS_LIBRARY" in os.environ, reason="about the CPU kernel, and too large to emulate")
@pytest.mark.parametrize("T, dtype", [(8, torch.float32), (8, torch.bfloat16), (16, torch.float32)], ids=str)
def test_large_output_streams(T, dtype):
    """Outputs beyond 1 MB are written past the caches, forward and backward."""
    qkv = inputs((1, T, 140, 16, 64), dtype=dtype)
    assert_close_to_reference(op, reference, (qkv, 0.125))
    grad_out = randn(1, T, 140, 1024, dtype=dtype, seed=1)
    assert_close_to_reference(op_backward, reference_backward, (grad_out, qkv, 0.125))


def test_registration():
    qkv = inputs((1, 3, 2, 2, 4))
    torch.library.opcheck(op.default, (qkv.detach().requires_grad_(), 0.5))
    torch.library.opcheck(torch.ops.pyvidx.temporal_attention_out.default, (qkv, 0.5, qkv.new_empty(1, 3, 2, 8)))
    torch.library.opcheck(op_backward.default, (qkv.new_ones(1, 3, 2, 8), qkv, 0.5))


def test_compiled():
    qkv = inputs((1, 3, 2, 2, 4))
    f = torch.compile(lambda x: temporal_attention(x) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(f(qkv), temporal_attention(qkv) * 2)


def test_autocast_takes_the_low_dtype():
    qkv = inputs((1, 3, 2, 2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(temporal_attention(qkv), temporal_attention(qkv.bfloat16()))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x[0], r"qkv must be \[B, T, P, 3, H, D\]"),
        (lambda x: x[:, :, :, :2], r"qkv must be \[B, T, P, 3, H, D\]"),
        (lambda x: x.expand(-1, 129, -1, -1, -1, -1), "at most 128 frames"),
        (lambda x: x.int(), "qkv must be float32, float16, bfloat16 or float64"),
    ],
)
def test_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        temporal_attention(change(inputs((1, 1, 2, 2, 4))))


def test_rejects_out():
    qkv = inputs((1, 3, 2, 2, 4))
    with pytest.raises(ValueError, match=r"out must be \(1, 3, 2, 8\)"):
        temporal_attention(qkv, out=qkv.new_empty(1, 3, 2, 2, 4))
    with pytest.raises(ValueError, match="the last stride of out"):
        temporal_attention(qkv, out=qkv.new_empty(1, 3, 8, 2).transpose(2, 3))
