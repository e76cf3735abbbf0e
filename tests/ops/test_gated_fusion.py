from itertools import product

import pytest
import torch

from pyvidx.ops import fusion_input, gated_fusion, output_gate
from pyvidx.ops import gated_fusion_reference as plain
from tests.harness import (
    DEVICES,
    DTYPES,
    assert_close_to_reference,
    assert_gradients_close,
    needs_kernels,
    poisoned,
    randn,
)

# B, T, P, C: one, odd, prime, one past a vector, two 16-byte vectors past a warp, more than a block's registers
SHAPES = [(1, 2, 1, 1), (2, 6, 5, 17), (1, 4, 7, 64), (2, 2, 16, 131), (1, 2, 3, 272), (1, 2, 2, 4104)]
FORMS = ["first", "sum", "gate", "rows"]  # rows: gate, with the class rows in z
MASKS = ["all", "tube", "table"]
VARIANTS = list(product(FORMS, MASKS, [False, True], [False, True]))  # form, mask, pair, norm
SCALE = 3.0  # of the gate: w neither 0 nor 1


def keep_of(mask, B, T, P):
    g = torch.Generator().manual_seed(1)
    K = (P + 1) // 2
    if mask == "all":
        return None
    if mask == "tube":
        return torch.stack([torch.randperm(P, generator=g)[:K] for _ in range(B)])
    # any order, another number of slots than frames, shared between videos
    return torch.randperm(T * P, generator=g)[None, : (T + 1) * (T * P // (T + 1))].reshape(1, T + 1, -1)


def inputs(shape, variant=("gate", "all", False, False), dtype=torch.float32, device="cpu", sliced=True):
    """x, z, cls, gate, position, time, keep, weight, bias, scale, eps, pair: what the op takes."""
    B, T, P, C = shape
    form, mask, pair, norm = variant

    def random(seed, *sizes):
        return randn(*sizes, dtype=dtype, device=device, seed=seed, sliced=sliced)

    frames = T // 2 if pair else T
    keep = keep_of(mask, B, frames, P)
    S, K = (frames, P) if keep is None else (frames if keep.dim() == 2 else keep.shape[1], keep.shape[-1])
    first = form == "first"
    return (
        random(0, B, T, 1 + P, C),
        None if first else random(1, B, S, K + (form == "rows"), C),
        None if form == "rows" else random(2, C) if first else random(2, B, C),
        random(3, C) if form in ("gate", "rows") else None,
        random(4, 1 + P, C) if first else None,
        random(5, frames + 2, C) if first else None,
        keep if keep is None else keep.to(device),
        random(6, C) if norm else None,
        random(7, C) if norm else None,
        SCALE,
        1e-5,
        pair,
    )


def public(x, z, cls, gate, position, time, keep, weight, bias, scale, eps, pair, out=None):
    options = {"keep": keep, "pair": pair, "norm": None if weight is None else (weight, bias, eps), "out": out}
    if z is None:
        return fusion_input(x, position, time, cls, **options)
    return gated_fusion(x, z, cls, gate, scale=scale, **options)


def reference(*args):
    return plain.fuse(*args)[: 2 if args[7] is None else 3]


def output_inputs(norm, gate, dtype=torch.float32, device="cpu", shape=(2, 5, 17)):
    B, T, C = shape
    sizes = [(B, T + 1, C), (B, C), (C,) if gate else None, (C,) if norm else None, (C,) if norm else None]
    made = [None if s is None else randn(*s, dtype=dtype, device=device, seed=i) for i, s in enumerate(sizes)]
    return made[0][:, 1:], *made[1:]


def output_public(x_cls, cls, gate, weight, bias):
    return output_gate(x_cls, cls, gate, scale=SCALE, norm=None if weight is None else (weight, bias))


def output_reference(x_cls, cls, gate, weight, bias):
    return plain.output(x_cls, cls, gate, weight, bias, SCALE, 1e-5)[0]


def wanting_grad(args):
    return [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_forward(variant, dtype, device):
    assert_close_to_reference(public, reference, inputs((2, 6, 5, 17), variant, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sliced", [False, True], ids=["aligned", "sliced"])
def test_shapes(shape, sliced, form, norm, dtype, device):
    args = inputs(shape, (form, "all", False, norm), dtype, device, sliced)
    assert_close_to_reference(public, reference, args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_backward(variant, dtype, device):
    args = wanting_grad(inputs((2, 6, 5, 17), variant, dtype, device))
    assert_gradients_close(public, reference, args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form, norm", [("gate", False), ("gate", True), ("sum", True), ("first", True)])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("sliced", [False, True], ids=["aligned", "sliced"])
def test_backward_shapes(shape, sliced, form, norm, device):
    args = wanting_grad(inputs(shape, (form, "all", False, norm), device=device, sliced=sliced))
    assert_gradients_close(public, reference, args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", ["x", "z", "cls", "gate", "weight"])
def test_gradient_of_one_input(which, device):
    """A frozen backbone, a frozen gate: what is not asked for is not computed, and the rest does not change."""
    names = ["x", "z", "cls", "gate", "position", "time", "keep", "weight", "bias"]
    args = list(inputs((2, 6, 5, 17), ("gate", "tube", True, True), device=device))
    args[names.index(which)].requires_grad_()
    assert_gradients_close(public, reference, args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("wanted", ["x", "z", "xz", "x of sums", "z of sums", "xz of sums", "gate"])
def test_gradient_of_rows(wanted, norm, device):
    """Class rows in z: one gradient, or none."""
    args = list(inputs((2, 6, 5, 17), ("rows", "tube", False, norm), device=device))
    if wanted.endswith("of sums"):
        args[3] = None
    for i in [3] if wanted == "gate" else ["xz".index(name) for name in wanted.split()[0]]:
        args[i].requires_grad_()
    assert_gradients_close(public, reference, args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("used", [0, 1, 2])
def test_gradient_of_one_output(used, device):
    """Autograd gives None for the outputs that were not used."""
    args = wanting_grad(inputs((2, 6, 5, 17), ("gate", "tube", False, True), device=device))
    run = [lambda *a, f=f: [f(*a)[used] + 0 * sum(t.sum() for t in a[:4] + a[7:9])] for f in (public, reference)]
    assert_gradients_close(*run, args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [False, True], ids=["sum", "gate"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_output_gate(norm, gate, dtype, device):
    args = output_inputs(norm, gate, dtype, device)
    assert_close_to_reference(output_public, output_reference, args)
    assert_gradients_close(output_public, output_reference, wanting_grad(args))


@pytest.mark.parametrize("device", DEVICES)
def test_a_closed_gate_is_exact(device):
    """The official scale of 1e4 saturates w: then one side passes unchanged."""
    x, z, cls, gate, *_ = inputs((1, 2, 3, 8), device=device)
    for sign, patches, row in [(-1, z, cls), (1, x[:, :, 1:], x[:, :, 0].mean(1))]:
        out, out_cls = gated_fusion(x, z, cls, sign * gate.abs().add(0.1), scale=1e4)
        assert torch.equal(out, patches)
        torch.testing.assert_close(out_cls, row)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", [("first", "tube", True, True), ("gate", "table", False, True),
                                     ("sum", "all", False, False)], ids=str)  # fmt: skip
def test_out(variant, device):
    args = inputs((2, 6, 5, 17), variant, device=device)
    expected = public(*args)
    out = tuple(poisoned(t.shape, t) for t in expected)
    assert all(a is b for a, b in zip(public(*args, out=out), out))
    assert all(torch.equal(a, b) for a, b in zip(out, expected))
    with pytest.raises(ValueError, match="out= has no gradient"):
        public(args[0].requires_grad_(), *args[1:], out=out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_in_place(norm, device):
    args = inputs((2, 6, 5, 17), ("gate", "table", True, norm), device=device)
    expected = public(*args)
    out = (args[1], args[2], *[poisoned(t.shape, t) for t in expected[2:]])
    public(*args, out=out)
    assert all(torch.equal(a, b) for a, b in zip(out, expected))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_output_gate_out(norm, device):
    x_cls, cls, gate, weight, bias = output_inputs(norm, True, device=device)
    out = poisoned(x_cls.shape, x_cls)
    norm = (weight, bias) if norm else None
    assert output_gate(x_cls, cls, gate, norm=norm, out=out) is out
    assert torch.equal(out, output_gate(x_cls, cls, gate, norm=norm))


@needs_kernels
@pytest.mark.parametrize("device", DEVICES)
def test_transposed_input(device):
    """A last stride other than 1 is copied, not misread."""
    args = inputs((2, 6, 5, 17), ("gate", "all", False, True), device=device)
    turned = [t.mT.contiguous().mT if isinstance(t, torch.Tensor) and t.dim() > 1 else t for t in args]
    assert all(torch.equal(a, b) for a, b in zip(public(*turned), public(*args)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_nothing_kept(form, norm, device):
    args = list(inputs((2, 6, 5, 17), (form, "all", False, norm), device=device))
    args[6] = torch.empty(2, 0, dtype=torch.int64, device=device)
    args[1] = None if args[1] is None else args[1][:, :, : args[2] is None]
    out, out_cls, *_ = public(*wanting_grad(args))
    assert out.shape == (2, 6, 0, 17)
    torch.testing.assert_close(out_cls, reference(*args)[1])
    (out_cls.sum() + out.sum()).backward()
    assert args[0].grad[:, :, 1:].abs().max() == 0 and args[0].grad[:, :, 0].abs().min() > 0


def test_no_videos():
    args = inputs((0, 2, 3, 4), ("gate", "all", False, True))
    assert [t.shape[0] for t in public(*args)] == [0, 0, 0]


def test_large_rows_stream():
    """Outputs beyond 1 MB are written past the caches."""
    x, z, cls, gate, *_ = inputs((1, 8, 256, 1024), sliced=False)
    norm = (torch.ones(1024), torch.zeros(1024))
    expected = plain.fuse(x, z, cls, gate, None, None, None, *norm, SCALE, 1e-5, False)
    for got in (gated_fusion(x, z, cls, gate, scale=SCALE), gated_fusion(x, z, cls, gate, scale=SCALE, norm=norm)):
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v[2] == (v[1] == "tube")], ids=str)
def test_gradcheck(variant):
    args = inputs((2, 2, 3, 3), variant, torch.float64, sliced=False)
    where = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]

    def run(*tensors):
        full = list(args)
        for i, t in zip(where, tensors):
            full[i] = t
        return public(*full)

    assert torch.autograd.gradcheck(run, wanting_grad([args[i] for i in where]))


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_gradcheck_output(norm):
    args = output_inputs(norm, True, torch.float64, shape=(2, 2, 3))
    present = wanting_grad([a.contiguous() for a in args if a is not None])
    assert torch.autograd.gradcheck(lambda *a: output_public(*a, *(None,) * (5 - len(a))), present)


@pytest.mark.parametrize(
    "variant", [("first", "tube", True, True), ("sum", "all", False, False), ("rows", "all", False, True)], ids=str
)
def test_registration(variant):
    args = inputs((2, 2, 3, 4), variant)
    torch.library.opcheck(torch.ops.pyvidx.gated_fusion.default, tuple(wanting_grad(args)))


def test_registration_of_the_rest():
    args = inputs((2, 2, 3, 4), ("gate", "table", False, True))
    out = tuple(poisoned(t.shape, t) for t in public(*args))
    torch.library.opcheck(torch.ops.pyvidx.gated_fusion_out.default, (*args, *out))
    args = (*output_inputs(True, True, shape=(2, 3, 4)), SCALE, 1e-5)
    torch.library.opcheck(torch.ops.pyvidx.gated_output_out.default, (*args, torch.empty(2, 3, 4)))
    torch.library.opcheck(torch.ops.pyvidx.gated_output.default, tuple(wanting_grad(args)))


def test_compiled():
    args = wanting_grad(inputs((2, 2, 3, 4), ("gate", "tube", False, True)))
    f = torch.compile(lambda *a: [t * 2 for t in public(*a)], fullgraph=True, backend="aot_eager")
    results = []
    for run in (f, lambda *a: [t * 2 for t in public(*a)]):
        outputs = run(*args)
        leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
        results.append([*outputs, *torch.autograd.grad(sum(t.square().sum() for t in outputs), leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_compiled_in_place():
    def run(x, z, cls, gate):
        return gated_fusion(x, z, cls, gate, out=(z, cls))[0] * 2

    x, z, cls, gate, *_ = inputs((2, 2, 3, 4), sliced=False)
    ours, theirs = [(z.clone(), cls.clone()) for _ in range(2)]
    a = run(x, *ours, gate)
    b = torch.compile(run, fullgraph=True, backend="aot_eager")(x, *theirs, gate)
    torch.testing.assert_close((a, *ours), (b, *theirs))


def test_autocast_takes_the_widest():
    x, z, cls, gate, *_ = inputs((2, 2, 3, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert [t.dtype for t in gated_fusion(x.bfloat16(), z, cls, gate)] == [torch.float32] * 2
        assert output_gate(x[:, :, 0].bfloat16(), cls, gate).dtype == torch.float32
        with pytest.raises(ValueError, match="one dtype"):
            gated_fusion(x.bfloat16(), z, cls, gate, out=(z.bfloat16(), cls.bfloat16()))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": lambda x: x[0]}, ValueError, r"x must be \[B, T, 1 \+ P, C\]"),
        ({"x": lambda x: x[:, :3], "pair": True}, ValueError, "pair needs an even number"),
        ({"z": lambda z: z[:, :, 1:]}, ValueError, r"z must be \(2, 4, 3, 4\)"),
        ({"z": lambda z: z.double()}, ValueError, "z must have the dtype"),
        ({"cls": lambda c: c[0]}, ValueError, r"cls must be \[B, C\]"),
        ({"cls": None}, ValueError, r"z must be \(2, 4, 4, 4\)"),
        ({"gate": lambda g: g[:3]}, ValueError, r"gate must be \[C\]"),
        ({"keep": torch.zeros(2, 3)}, ValueError, "keep must be int64"),
        ({"keep": torch.zeros(3, 3, dtype=torch.int64)}, ValueError, "keep must be"),
        ({"keep": torch.full((2, 3), 3)}, IndexError, r"in \[0, 3\)"),
        ({"norm": (torch.ones(3), torch.ones(4))}, ValueError, "weight and bias of norm"),
        ({"norm": (torch.ones(4),)}, ValueError, "norm must be"),
        ({"out": (torch.empty(2, 4, 3, 4),)}, ValueError, "one tensor per output"),
        ({"out": (torch.empty(2, 4, 3, 4), torch.empty(2, 3))}, ValueError, "out must be"),
    ],
)
def test_gated_fusion_rejects(change, error, message):
    x, z, cls, gate, *_ = inputs((2, 4, 3, 4))
    args = {"x": x, "z": z, "cls": cls, "gate": gate}
    for name, value in change.items():
        args[name] = value(args[name]) if name in args and callable(value) else value
    with pytest.raises(error, match=message):
        gated_fusion(**args)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, p, t, s: (x, p[1:], t, s), r"position must be \[1 \+ P, C\]"),
        (lambda x, p, t, s: (x, p, t[:3], s), "time must be"),
        (lambda x, p, t, s: (x, p, t, s[None]), r"seed must be \[C\]"),
    ],
)
def test_fusion_input_rejects(change, message):
    x, _, seed, _, position, time, *_ = inputs((2, 4, 3, 4), ("first", "all", False, False))
    with pytest.raises(ValueError, match=message):
        fusion_input(*change(x, position, time, seed))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, c, g: (x[0], c, g), r"x_cls must be \[B, T, C\]"),
        (lambda x, c, g: (x, c[:, :3], g), r"cls must be \[B, C\]"),
        (lambda x, c, g: (x, c, g[None]), r"gate must be \[C\]"),
    ],
)
def test_output_gate_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        output_gate(*change(*output_inputs(False, True)[:3]))
