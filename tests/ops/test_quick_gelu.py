import pytest
import torch

from pyvidx.ops._library import has_kernel
from pyvidx.ops.quick_gelu import quick_gelu, reference
from tests.harness import DEVICES, DTYPES, assert_close_to_reference, assert_gradients_close, poisoned, randn

# one, odd, one past a vector, more than a piece of the CPU kernel or a block, a whole number of vectors
SHAPES = [(1,), (5, 17), (3, 131), (2, 3, 1031), (4, 64)]
# with a bias also: rows of several parts, rows of several blocks of channels, whole and not
BIAS_SHAPES = [*SHAPES, (150, 5), (2, 65, 24), (18, 4096), (3, 4099)]
WITH_BIAS = pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])


def inputs(*shape, with_bias, **options):
    x = randn(*shape, **options).mul_(4)  # in place: a slice stays one
    return (x, randn(shape[-1], seed=1, **options)) if with_bias else (x,)


def wanting(tensors):
    return tuple(t.detach().requires_grad_() for t in tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sliced", [False, True], ids=["contiguous", "sliced"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, sliced, dtype, device):
    (x,) = inputs(*shape, with_bias=False, dtype=dtype, device=device, sliced=sliced)
    assert_close_to_reference(quick_gelu, reference, (x,))
    assert_gradients_close(quick_gelu, reference, (x.requires_grad_(),))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sliced", [False, True], ids=["contiguous", "sliced"])
@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
def test_values_and_gradients_with_a_bias(shape, sliced, dtype, device):
    both = inputs(*shape, with_bias=True, dtype=dtype, device=device, sliced=sliced)
    assert_close_to_reference(quick_gelu, reference, both)
    assert_gradients_close(quick_gelu, reference, wanting(both))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wanted", [0, 1], ids=["x", "bias"])
def test_one_gradient_alone(wanted, device):
    both = inputs(70, 40, with_bias=True, device=device)
    both[wanted].requires_grad_()
    assert_gradients_close(quick_gelu, reference, both)
    y, x, bias = quick_gelu(*both), *both
    grads = torch.ops.pyvidx.quick_gelu_backward(
        torch.ones_like(y), x.detach(), bias.detach(), wanted == 0, wanted == 1
    )
    assert torch.equal(grads[wanted], torch.autograd.grad(y.sum(), both[wanted])[0]) and grads[1 - wanted].numel() == 0


@pytest.mark.parametrize("device", DEVICES)
@WITH_BIAS
def test_large_and_odd_values(with_bias, device):
    x = torch.tensor([0.0, 1e4, -1e4, float("inf"), float("nan")], device=device).requires_grad_()
    y = quick_gelu(x, torch.zeros_like(x) if with_bias else None)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y[:4].tolist() == pytest.approx([0, 1e4, 0, float("inf")]) and y[4].isnan()
    assert grad[:3].tolist() == pytest.approx([0.5, 1, 0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("starts", [(1, 0), (0, 1), (1, 1)], ids=str)
def test_an_unaligned_start(starts, device):
    x, bias = (
        randn(n, device=device, sliced=False)[start:] for n, start in zip((160 + starts[0], 16 + starts[1]), starts)
    )
    for case in [(x,), (x.view(10, 16), bias)]:
        assert_close_to_reference(quick_gelu, reference, case)
        assert_gradients_close(quick_gelu, reference, wanting(case))


@pytest.mark.parametrize("device", DEVICES)
@WITH_BIAS
def test_out(with_bias, device):
    x, *bias = inputs(5, 17, with_bias=with_bias, device=device)
    want, out = quick_gelu(x, *bias), poisoned((5, 17), x)
    assert quick_gelu(x, *bias, out=out) is out and torch.equal(out, want)
    own = x.contiguous()
    assert torch.equal(quick_gelu(own, *bias, out=own), want)
    with pytest.raises(ValueError, match="contiguous"):
        quick_gelu(x, *bias, out=x)
    with pytest.raises(ValueError, match="out= has no gradient"):
        quick_gelu(own, *wanting(bias), out=out) if bias else quick_gelu(own.requires_grad_(), out=out)


@WITH_BIAS
@pytest.mark.parametrize("C", [1031, 1024])
def test_large_outputs_stream(C, with_bias):
    """Beyond 4 MiB they are written past the caches."""
    both = wanting(inputs(1040, C, with_bias=with_bias, sliced=False))
    torch.testing.assert_close(quick_gelu(*both), reference(*both))
    grads = [torch.autograd.grad(f(*both).sum(), both) for f in (quick_gelu, reference)]
    for ours, plain, atol in zip(*grads, [1e-6, 1e-3]):  # sums of 1040
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=atol)


@pytest.mark.skipif(not has_kernel("quick_gelu", "cpu"), reason="the reference has torch's sum, which depends on them")
def test_the_number_of_threads_changes_nothing():
    both, results = wanting(inputs(700, 515, with_bias=True)), []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = quick_gelu(*both)
        results.append((y, *torch.autograd.grad(y.square().sum(), both)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)], ids=str)
def test_nothing(shape):
    assert quick_gelu(torch.empty(shape)).shape == shape
    both = wanting((torch.empty(shape), torch.ones(shape[-1])))
    y = quick_gelu(*both)
    grad_x, grad_bias = torch.autograd.grad(y.sum(), both)
    assert y.shape == grad_x.shape == shape and torch.equal(grad_bias, torch.zeros(shape[-1]))


def test_gradcheck():
    x, bias = wanting(inputs(3, 5, with_bias=True, dtype=torch.float64))
    assert torch.autograd.gradcheck(quick_gelu, x) and torch.autograd.gradcheck(quick_gelu, (x, bias))


@WITH_BIAS
def test_registration(with_bias):
    x, *bias = inputs(3, 5, with_bias=with_bias)
    ops = torch.ops.pyvidx
    torch.library.opcheck(ops.quick_gelu.default, wanting((x, *bias)))
    torch.library.opcheck(ops.quick_gelu_out.default, (x, *(bias or [None]), torch.empty(3, 5)))
    torch.library.opcheck(ops.quick_gelu_backward.default, (x, x, *bias))
    if bias:
        for need in [(False, True), (True, False)]:
            torch.library.opcheck(ops.quick_gelu_backward.default, (x, x, *bias, *need))


@WITH_BIAS
def test_compiled(with_bias):
    both = wanting(inputs(3, 5, with_bias=with_bias))

    def twice(*both):
        return quick_gelu(*both) * 2

    run = torch.compile(twice, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(*both), twice(*both))
    grads = [torch.autograd.grad(f(*both).sum(), both) for f in (run, twice)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_casts_the_bias(dtype):
    """x is taken as it is, a parameter comes along, and its gradient arrives in its own dtype."""
    x, bias = inputs(4, 7, with_bias=True)
    x, bias = x.to(dtype).requires_grad_(), bias.requires_grad_()

    def run(x, bias):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return quick_gelu(x), quick_gelu(x, bias)

    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        plain, y = call(x, bias)
        assert plain.dtype == y.dtype == dtype
        assert torch.equal(plain, quick_gelu(x)) and torch.equal(y, quick_gelu(x, bias.to(dtype)))
        grads = torch.autograd.grad(y.sum(), (x, bias))
        want = torch.autograd.grad(quick_gelu(x, bias.to(dtype)).sum(), (x, bias))
        assert [g.dtype for g in grads] == [dtype, torch.float32] and all(map(torch.equal, grads, want))


def test_rejects():
    with pytest.raises(ValueError, match="x must be float32"):
        quick_gelu(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="out must be"):
        quick_gelu(torch.ones(3), out=torch.ones(4))
    with pytest.raises(ValueError, match="bias must have the dtype"):
        quick_gelu(torch.ones(3), torch.ones(3, dtype=torch.float64))
    for x, bias in [((2, 3), (2,)), ((2, 3), (1, 3)), ((), (1,)), ((2, 3), (1,))]:
        with pytest.raises(ValueError, match=r"bias must be \[C\], with C the last dimension of x, got \("):
            quick_gelu(torch.ones(x), torch.ones(bias))
