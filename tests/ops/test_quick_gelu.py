import pytest
import torch

from pyvidx.ops.quick_gelu import quick_gelu, reference
from tests.harness import DEVICES, DTYPES, assert_close_to_reference, assert_gradients_close, needs_kernels, randn

# one, odd, one past a vector, more than a piece of the CPU kernel or a block, a whole number of vectors
SHAPES = [(1,), (5, 17), (3, 131), (2, 3, 1031), (4, 64)]


def inputs(*shape, **options):
    return randn(*shape, **options).mul_(4)  # in place: a slice stays one


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sliced", [False, True], ids=["contiguous", "sliced"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, sliced, dtype, device):
    x = inputs(*shape, dtype=dtype, device=device, sliced=sliced)
    assert_close_to_reference(quick_gelu, reference, (x,))
    assert_gradients_close(quick_gelu, reference, (x.requires_grad_(),))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_large_and_odd_values(dtype, device):
    """Where e^-1.702x is beyond the dtype, too."""
    given = [0.0, 1e4, -1e4, -50, -100, -600, -1e3, float("inf"), float("nan")]
    x = torch.tensor(given, device=device, dtype=dtype).requires_grad_()
    y = quick_gelu(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y[8].isnan()
    torch.testing.assert_close(y[:8], torch.tensor([0, 1e4, *[0] * 5, float("inf")], device=device, dtype=dtype))
    torch.testing.assert_close(grad[:7], torch.tensor([0.5, 1, *[0] * 5], device=device, dtype=dtype))


@needs_kernels
def test_every_bfloat16():
    """The kernel computes to 11 bits what is rounded to 8: no value is far from half a unit in the last place off."""
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    x = x[(x.abs() > 1e-30) & (x.abs() < 40)].requires_grad_()
    y = quick_gelu(x)
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    d = x.detach().double()
    s = torch.sigmoid(1.702 * d)
    unit = 2.0 ** (torch.floor(torch.log2((d * s).abs())) - 7)
    assert ((y.double() - d * s).abs() / unit)[d * s != 0].max() < 0.55
    assert (grad.double() - s * (1 + 1.702 * d * (1 - s))).abs().max() < 0.0045  # half a unit of 1: 0.0039


@pytest.mark.parametrize("device", DEVICES)
def test_an_unaligned_start(device):
    x = randn(161, device=device, sliced=False)[1:]
    assert_close_to_reference(quick_gelu, reference, (x,))
    assert_gradients_close(quick_gelu, reference, (x.detach().requires_grad_(),))


@pytest.mark.parametrize("C", [1031, 1024])
def test_large_outputs_stream(C):
    """Beyond 1 MB they are written past the caches."""
    x = inputs(1040, C, sliced=False).requires_grad_()
    torch.testing.assert_close(quick_gelu(x), reference(x))
    grads = [torch.autograd.grad(f(x).sum(), x) for f in (quick_gelu, reference)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)], ids=str)
def test_nothing(shape):
    x = torch.empty(shape).requires_grad_()
    y = quick_gelu(x)
    assert y.shape == torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_gradcheck():
    assert torch.autograd.gradcheck(quick_gelu, randn(3, 5, dtype=torch.float64).requires_grad_())


def test_registration():
    x = randn(3, 5)
    torch.library.opcheck(torch.ops.pyvidx.quick_gelu.default, (x.clone().requires_grad_(),))
    torch.library.opcheck(torch.ops.pyvidx.quick_gelu_backward.default, (x, x))


def test_compiled():
    x = inputs(3, 5).requires_grad_()

    def twice(x):
        return quick_gelu(x) * 2

    run = torch.compile(twice, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x), twice(x))
    torch.testing.assert_close(*[torch.autograd.grad(f(x).sum(), x) for f in (run, twice)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_takes_x_as_it_is(dtype):
    x = inputs(4, 7).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quick_gelu(x)
    assert y.dtype == dtype and torch.equal(y, quick_gelu(x))


def test_rejects():
    with pytest.raises(ValueError, match="x must be float32"):
        quick_gelu(torch.ones(3, dtype=torch.int64))
