import pytest
import torch

from pyvidx.ops.quick_gelu import quick_gelu, reference
from tests.harness import DEVICES, DTYPES, assert_close_to_reference, assert_gradients_close, poisoned, randn

# one, odd, one past a vector, more than a piece of the CPU kernel or a block, a whole number of vectors
SHAPES = [(1,), (5, 17), (3, 131), (2, 3, 1031), (4, 64)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sliced", [False, True], ids=["contiguous", "sliced"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, sliced, dtype, device):
    x = 4 * randn(*shape, dtype=dtype, device=device, sliced=sliced)
    assert_close_to_reference(quick_gelu, reference, (x,))
    assert_gradients_close(quick_gelu, reference, (x.requires_grad_(),))


@pytest.mark.parametrize("device", DEVICES)
def test_large_and_odd_values(device):
    x = torch.tensor([0.0, 1e4, -1e4, float("inf"), float("nan")], device=device).requires_grad_()
    y = quick_gelu(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y[:4].tolist() == pytest.approx([0, 1e4, 0, float("inf")]) and y[4].isnan()
    assert grad[:3].tolist() == pytest.approx([0.5, 1, 0])


@pytest.mark.parametrize("device", DEVICES)
def test_an_unaligned_start(device):
    x = randn(70, device=device, sliced=False)[1:]
    assert_close_to_reference(quick_gelu, reference, (x,))
    assert_gradients_close(quick_gelu, reference, (x.requires_grad_(),))


@pytest.mark.parametrize("device", DEVICES)
def test_out(device):
    x = randn(5, 17, device=device)
    want, out = quick_gelu(x), poisoned((5, 17), x)
    assert quick_gelu(x, out=out) is out and torch.equal(out, want)
    own = x.contiguous()
    assert torch.equal(quick_gelu(own, out=own), want)
    with pytest.raises(ValueError, match="contiguous"):
        quick_gelu(x, out=x)
    with pytest.raises(ValueError, match="out= has no gradient"):
        quick_gelu(own.requires_grad_(), out=out)


def test_large_outputs_stream():
    """Beyond 4 MiB they are written past the caches."""
    x = randn(1024, 1031, sliced=False).requires_grad_()
    y = quick_gelu(x)
    torch.testing.assert_close(y, reference(x))
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(reference(x).sum(), x)[0], rtol=1e-5, atol=1e-6
    )


def test_nothing():
    assert quick_gelu(torch.empty(0, 3)).shape == (0, 3)


def test_gradcheck():
    assert torch.autograd.gradcheck(quick_gelu, randn(3, 5, dtype=torch.float64).requires_grad_())


def test_registration():
    torch.library.opcheck(torch.ops.pyvidx.quick_gelu.default, (randn(3, 5).requires_grad_(),))
    torch.library.opcheck(torch.ops.pyvidx.quick_gelu_out.default, (randn(3, 5), torch.empty(3, 5)))


def test_compiled():
    x = randn(3, 5).requires_grad_()
    run = torch.compile(lambda x: quick_gelu(x) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x), quick_gelu(x) * 2)
    grads = [torch.autograd.grad(f(x).sum(), x)[0] for f in (run, lambda x: quick_gelu(x) * 2)]
    torch.testing.assert_close(*grads)


def test_rejects():
    with pytest.raises(ValueError, match="x must be float32"):
        quick_gelu(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="out must be"):
        quick_gelu(torch.ones(3), out=torch.ones(4))
