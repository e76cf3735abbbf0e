import pytest
import torch

from pyvidx.ops.st_pool import reference, st_pool
from tests.harness import DEVICES, DTYPES, assert_close_to_reference, assert_gradients_close, poisoned, randn

# B, T, P, C: one; odd and prime; one past the patches of a part; whole 16 bytes; frames enough for two parts and more;
# one past the frames that a GPU has under way; one past the patches that it sums up at once
CASES = [(1, 1, 1, 1), (2, 3, 5, 17), (1, 5, 33, 40), (2, 6, 7, 64), (1, 35, 3, 16), (2, 33, 34, 9), (1, 9, 17, 24),
         (1, 2, 257, 8)]  # fmt: skip
op = torch.ops.pyvidx.st_pool


def inputs(shape, masked=False, device="cpu", dtype=torch.float32, sliced=True):
    x = randn(*shape, dtype=dtype, device=device, sliced=sliced)
    mask = None
    if masked:
        mask = (randn(*shape[:2], seed=3, sliced=False, device=device) > -0.3).to(torch.int32)
        mask[:, -1] = 0
    return x, mask


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_forward(shape, sliced, masked, dtype, device):
    assert_close_to_reference(op, reference, inputs(shape, masked, device, dtype, sliced))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", CASES[1:], ids=str)
def test_backward(shape, masked, dtype, device):
    x, mask = inputs(shape, masked, device, dtype)
    assert_gradients_close(op, reference, (x.requires_grad_(), mask))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half", [0, 1])
def test_gradient_of_one_half(half, device):
    x, mask = inputs((2, 3, 5, 16), True, device)
    assert_gradients_close(lambda x: op(x, mask)[half], lambda x: reference(x, mask)[half], (x.requires_grad_(),))


@pytest.mark.parametrize("device", DEVICES)
def test_a_masked_clip_is_the_shorter_clip(device):
    x, _ = inputs((2, 5, 7, 24), device=device)
    mask = torch.tensor([[True, True, True, False, False], [False] * 5], device=device)
    x[~mask] = float("nan")
    spatial, temporal = st_pool(x, mask=mask)
    alone = st_pool(x[:1, :3])
    torch.testing.assert_close(spatial[:1], alone[0])
    torch.testing.assert_close(temporal[:1, :3], alone[1])
    assert not temporal[:1, 3:].any() and not spatial[1:].any() and not temporal[1:].any(), "no real frame: zeros"


@pytest.mark.parametrize("device", DEVICES)
def test_out_and_transposed_input(device):
    x, _ = inputs((2, 3, 5, 17), device=device)
    want = st_pool(x)
    x = x.transpose(-1, -2).contiguous().transpose(-1, -2)  # last stride is not 1
    out = poisoned((2, 5, 17), x), poisoned((2, 3, 17), x)
    assert st_pool(x, out=out) is out
    assert all(torch.equal(a, b) for a, b in zip(out, want))
    with pytest.raises(ValueError, match="out= has no gradient"):
        st_pool(x.requires_grad_(), out=out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 3, 5, 0)], ids=str)
def test_empty(shape, device):
    x = torch.zeros(shape, device=device, requires_grad=True)
    spatial, temporal = st_pool(x)
    assert spatial.shape == (shape[0], 5, shape[3]) and temporal.shape == (shape[0], 3, shape[3])
    (grad,) = torch.autograd.grad(spatial.sum() + temporal.sum(), x)
    assert grad.shape == x.shape


def test_large_gradient_streams():
    """Outputs beyond 1 MB are written past the caches."""
    spatial, temporal = randn(1, 256, 768, sliced=False), randn(1, 8, 768, sliced=False)
    got = torch.ops.pyvidx.st_pool_backward(spatial, temporal, None)
    torch.testing.assert_close(got, spatial[:, None] / 8 + temporal[:, :, None] / 256)


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked):
    x, mask = inputs((2, 3, 2, 3), masked, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: op(x, mask), [x.contiguous().requires_grad_()])


def test_registration():
    x, mask = inputs((2, 3, 2, 4), True)
    torch.library.opcheck(op.default, (x.detach().requires_grad_(), mask))
    out = torch.ops.pyvidx.st_pool_out.default
    torch.library.opcheck(out, (x, mask, x.new_empty(2, 2, 4), x.new_empty(2, 3, 4)))
    torch.library.opcheck(torch.ops.pyvidx.st_pool_backward.default, (*op(x, mask), mask))


def test_compiled():
    x, _ = inputs((2, 3, 2, 4))
    f = torch.compile(lambda x: [y * 2 for y in st_pool(x)], fullgraph=True, backend="aot_eager")
    for got, want in zip(f(x), st_pool(x)):
        torch.testing.assert_close(got, want * 2)


def test_autocast_leaves_the_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert st_pool(torch.ones(1, 2, 3, 4))[0].dtype == torch.float32


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: ((x[0],), {}), r"x must be \[B, T, P, C\]"),
        (lambda x: ((x[:, :0],), {}), "T, P > 0"),
        (lambda x: ((x.int(),), {}), "x must be float32"),
        (lambda x: ((x,), {"mask": torch.ones(2, 3)}), r"mask must be bool \[B, T\]"),
        (lambda x: ((x,), {"out": (x[:, 0], x[:, 0])}), "out must be"),
    ],
)
def test_rejects(change, message):
    arguments, keywords = change(inputs((2, 3, 5, 4))[0])
    with pytest.raises(ValueError, match=message):
        st_pool(*arguments, **keywords)
