import pytest
import torch

from pyvidx.ops.residual_norm import reference, residual_norm
from tests.harness import DEVICES, DTYPES, assert_close_to_reference, assert_gradients_close, poisoned, randn

# B, S, K, C: one row, odd, several parts, a long row, a whole number of vectors
SIZES = [(1, 1, 1, 8), (2, 3, 5, 17), (2, 2, 37, 64), (1, 2, 3, 2051), (1, 2, 4, 1024)]
FORMS = ["plain", "cls", "share"]


def inputs(size, form, dtype=torch.float32, *, y_dtype=None, factor=True, device="cpu"):
    """Arguments of the reference."""
    B, S, K, C = size
    own = {"dtype": dtype, "device": device}
    x, y = randn(B, S, K + 1, C, **own), randn(B, S, K + 1, C, dtype=y_dtype or dtype, device=device, seed=1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    drop = torch.tensor([0, 1.25] * B * S, device=device, dtype=wide)[: B * S].view(B, S) if factor else None
    share = torch.ones(B, S, device=device, dtype=wide) / S if form == "share" else None
    return [
        x,
        y,
        randn(B, C, seed=2, **own) if form == "cls" else None,
        drop,
        share,
        1 + randn(C, seed=4, **own, sliced=False) / 4,
        randn(C, seed=5, **own, sliced=False),
        1e-5,
    ]


def run(x, y, cls, factor, share, weight, shift, eps):
    return residual_norm(x, y, (weight, shift, eps), factor=factor, cls=cls, share=share)


def plain(*args):
    return reference(*args)[:2]


def wanting_grad(args):
    return [a.requires_grad_() if torch.is_tensor(a) and i not in (3, 4) else a for i, a in enumerate(args)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [False, True], ids=["whole", "factor"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size, form, factor, dtype, device):
    args = inputs(size, form, dtype, factor=factor, device=device)
    assert_close_to_reference(run, plain, args)
    assert_gradients_close(run, plain, wanting_grad(args))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("y_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_narrower_layer_beside_a_float32_stream(form, y_dtype, device):
    """As autocast makes it: what goes to the next product is rounded once, the stream is not."""
    args = wanting_grad(inputs((2, 3, 5, 64), form, y_dtype=y_dtype, device=device))
    out, normed = run(*args)
    want = plain(*[a.float() if torch.is_tensor(a) else a for a in args])
    assert out.dtype == torch.float32 and normed.dtype == y_dtype
    torch.testing.assert_close(out, want[0])
    torch.testing.assert_close(normed, want[1].to(y_dtype), atol=1e-2, rtol=1e-2)
    leaves = [a for a in args if torch.is_tensor(a) and a.requires_grad]
    weights = randn(*out.shape, device=device, seed=6), randn(*out.shape, device=device, seed=7).to(y_dtype)
    loss = [(o * w).sum(dtype=torch.float32) for o, w in zip((out, normed), weights)]
    expected = [(o * w.float()).sum() for o, w in zip(want, weights)]
    for a, b in zip(torch.autograd.grad(sum(loss), leaves), torch.autograd.grad(sum(expected), leaves)):
        tight = {} if a.dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
        torch.testing.assert_close(a, b, **tight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", [0, 1], ids=["out", "normed"])
@pytest.mark.parametrize("form", FORMS)
def test_one_output_alone_has_gradients(form, which, device):
    args = wanting_grad(inputs((2, 2, 5, 17), form, device=device))
    args[5:7] = [a.requires_grad_(which == 1) for a in args[5:7]]  # the norm's own
    assert_gradients_close(lambda *a: run(*a)[which], lambda *a: plain(*a)[which], args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wanted", [0, 1, 2, 5, 6])
def test_gradients_of_one_input_alone(wanted, device):
    args = inputs((2, 2, 5, 17), "cls", device=device)
    args[wanted].requires_grad_()
    assert_gradients_close(run, plain, args)


@pytest.mark.parametrize("device", DEVICES)
def test_out(device):
    for form in FORMS:
        args = inputs((2, 2, 5, 17), form, device=device)
        want = run(*args)
        x, y, cls, factor, share, weight, shift, eps = args
        options = {"factor": factor, "cls": cls, "share": share}
        for own in (poisoned(want[0].shape, x), *([] if cls is not None else [y.clone()])):
            given = y if cls is not None or own.isnan().any() else own
            out = own, poisoned(want[1].shape, y)
            result = residual_norm(x, given, (weight, shift, eps), **options, out=out)
            assert result is out and all(torch.equal(a, b) for a, b in zip(out, want))
    with pytest.raises(ValueError, match="out= has no gradient"):
        residual_norm(x.requires_grad_(), y, (weight, shift), **options, out=out)


def test_large_outputs_stream():
    """Beyond 1 MB they are written past the caches."""
    args = wanting_grad(inputs((1, 3, 700, 1024), "share"))
    assert_close_to_reference(run, plain, args)
    assert_gradients_close(run, plain, args)


def test_threads_do_not_change_the_sums():
    args = wanting_grad(inputs((2, 3, 50, 512), "share"))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out, normed = run(*args)
        leaves = [a for a in args if torch.is_tensor(a) and a.requires_grad]
        results.append(torch.autograd.grad((out * normed).sum(), leaves))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_nothing():
    x, norm = torch.empty(2, 3, 0, 8), (torch.ones(8), torch.zeros(8))
    assert residual_norm(x, x, norm)[1].shape == (2, 3, 0, 8)
    assert residual_norm(x, x, norm, cls=torch.ones(2, 8))[0].eq(1).all()


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    args = wanting_grad(inputs((2, 2, 3, 5), form, torch.float64))
    assert torch.autograd.gradcheck(run, args)


@pytest.mark.parametrize("form", FORMS)
def test_registration(form):
    args = wanting_grad(inputs((2, 2, 3, 8), form))
    torch.library.opcheck(torch.ops.pyvidx.residual_norm.default, tuple(args))
    args = inputs((2, 2, 3, 8), form)
    out = run(*args)
    torch.library.opcheck(torch.ops.pyvidx.residual_norm_out.default, (*args, *map(torch.empty_like, out)))


def test_compiled():
    args = wanting_grad(inputs((2, 2, 3, 8), "share"))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), run(*args))
    leaves = [a for a in args if torch.is_tensor(a) and a.requires_grad]
    grads = [torch.autograd.grad(f(*args)[1].square().sum(), leaves) for f in (compiled, run)]
    torch.testing.assert_close(*grads)


def test_rejects():
    x, norm = torch.ones(2, 3, 4, 8), (torch.ones(8), torch.zeros(8))
    for change, message in (
        ({"y": x[:, :2]}, "y must have"), ({"y": x.double()}, "y must have"), ({"x": x[0]}, "x must be floating"),
        ({"cls": torch.ones(3, 8)}, r"cls must be \(2, 8\)"),
        ({"factor": torch.ones(2, 4)}, r"factor must be floating \(2, 3\)"),
        ({"share": torch.ones(2, 3), "cls": torch.ones(2, 8)}, "share excludes cls"),
        ({"norm": (torch.ones(7), torch.zeros(8))}, "weight and bias of norm"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            residual_norm(**({"x": x, "y": x, "norm": norm} | change))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, 0x7FC00000])
def test_a_nan_of_any_bits_stays_one(bits, dtype, device):
    """Rounding to 16 bits must not carry a NaN over into a number."""
    args = inputs((1, 1, 3, 40), "plain", dtype, device=device)
    args[3] = torch.full((1, 1), bits, dtype=torch.int32, device=device).view(torch.float32)
    out, normed = run(*args)
    assert out.isnan().all() and normed.isnan().all()
