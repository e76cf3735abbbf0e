"""The linear layers of a block: what is written by hand against what torch makes of the same lines."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyvidx.layers.block import Block
from pyvidx.layers.linear import add_linear, composed_product, product, project_qkv, shifted_product, value_bias
from pyvidx.models import BTAdapter, flops
from pyvidx.ops import temporal_attention
from tests.test_models import CONFIG, clip, close, randomized

ROWS, N, HEADS, C = 6, 5, 2, 8


class Adapted(nn.Module):
    """What an adapter library puts in a linear layer's place: its weight and bias are those of the frozen layer."""

    def __init__(self, base):
        super().__init__()
        self.base, self.more = base, nn.Linear(base.in_features, base.out_features, bias=False).to(base.weight)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.more(x)

    def merged(self):
        with torch.no_grad():
            self.base.weight += self.more.weight
        return self.base


def layer(width_in=C, width_out=3 * C, dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Linear(width_in, width_out).to(dtype)


def attended(*parts, mask=None):
    q, k, v = torch.cat(parts, dim=-1).view(ROWS, N, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def over_slots(qkv):
    return temporal_attention(qkv.view(2, 3, N, 3, HEADS, -1))


PROJECTIONS = {  # attention of x [ROWS, N, C] by hand, and of what the layer gives
    "split": (lambda x, linear: attended(*project_qkv(x, linear, (1, 1, 1))), attended),
    "q apart": (lambda x, linear: attended(*project_qkv(x, linear, (1, 2))), attended),
    "packed": (lambda x, linear: over_slots(*project_qkv(x, linear)), over_slots),
}


def gradients(y, *inputs):
    torch.manual_seed(4)
    grad = torch.randn(y.shape).to(y.dtype)  # the same in every dtype
    return y.detach(), *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], grad)


@pytest.mark.parametrize("frozen", ["nothing", "x", "layer"])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_projection(name, frozen):
    by_hand, plain = PROJECTIONS[name]
    linear = layer().requires_grad_(frozen != "layer")
    x = torch.randn(ROWS, N, C, dtype=torch.float64, requires_grad=frozen != "x")
    results = [gradients(y, x, *linear.parameters()) for y in (by_hand(x, linear), plain(linear(x)))]
    for got, want in zip(*results, strict=True):
        close(got, want, 1e-13)
    if frozen != "layer":
        assert (results[0][-1][C : 2 * C] == 0).all()  # keys have no use for a bias


@pytest.mark.parametrize("frozen", ["nothing", "x", "qkv", "out"])
@pytest.mark.parametrize("masked", [False, True])
def test_value_bias_may_wait(masked, frozen):
    """In the next product's bias; and so it may where two layers are one product."""
    qkv, out, last = layer(), layer(C, C), layer(C, 2 * C)
    x = torch.randn(ROWS, N, C, dtype=torch.float64, requires_grad=frozen != "x")
    for name, module in (("qkv", qkv), ("out", out)):
        module.requires_grad_(frozen != name)
    mask = torch.ones(N, N, dtype=torch.bool).tril() if masked else None
    leaves = (x, *qkv.parameters(), *out.parameters(), *last.parameters())
    for layers in ((out,), (out, last)):
        shift = value_bias(x, qkv, out)
        y = attended(*project_qkv(x, qkv, (1, 1, 1), biased_values=False), mask=mask)
        if len(layers) == 1:
            got = sum(shifted_product(y, out, shift))
        else:
            got = sum(composed_product(y, out, last, shift)) + last.bias
        want = nn.Sequential(*layers)(attended(qkv(x), mask=mask))
        used = leaves[: 3 + 2 * len(layers)]
        for a, b in zip(gradients(got, *used), gradients(want, *used), strict=True):
            close(a, b, 1e-13)


def test_value_bias_does_not_wait():
    """For few rows, without gradients, in 16 bits, and where a layer is more than its weight and bias."""
    qkv, out, x = layer(dtype=torch.float32), layer(C, C, torch.float32), torch.randn(ROWS, N, C)
    assert value_bias(x, qkv, out) is not None
    assert value_bias(x[0], qkv, out) is None
    assert value_bias(x, qkv.requires_grad_(False), out) is None  # project_qkv has no gradient to save there
    qkv.requires_grad_()
    assert value_bias(x.double(), qkv, out) is None
    assert value_bias(x.bfloat16(), layer(dtype=torch.bfloat16), layer(C, C, torch.bfloat16)) is None
    assert value_bias(x, qkv, Adapted(out)) is None and value_bias(x, Adapted(qkv), out) is None
    with torch.no_grad():
        assert value_bias(x, qkv, out) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert value_bias(x, qkv, out) is None
    out.register_forward_hook(lambda module, inputs, output: None)
    assert value_bias(x, qkv, out) is None


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projection_under_autocast(name):
    by_hand, plain = PROJECTIONS[name]
    linear, x = layer(dtype=torch.float32), torch.randn(ROWS, N, C, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = [gradients(y, x, *linear.parameters()) for y in (by_hand(x, linear), plain(linear(x)))]
    assert [t.dtype for t in results[0]] == [torch.bfloat16] + 3 * [torch.float32]
    for got, want in zip(*results, strict=True):
        close(got, want, 2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which leaves float64 alone
        assert project_qkv(x.double(), layer())[0].dtype == torch.float64


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.0)])
def test_add_linear(dtype, tolerance):
    linear = layer(2 * C, C, dtype)
    x, h = (torch.randn(ROWS, N, width, dtype=dtype, requires_grad=True) for width in (C, 2 * C))
    by_hand = gradients(add_linear(x, h, linear), x, h, *linear.parameters())
    plain = gradients(x + linear(h), x, h, *linear.parameters())
    for got, want in zip(by_hand, plain, strict=True):
        close(got, want, tolerance)
    with torch.no_grad():
        close(add_linear(x, h, linear), plain[0], tolerance)


@pytest.mark.parametrize("kind", ["adapter", "hook"])
def test_other_layers_are_called(kind):
    """They read no parameters past an adapter, and no hook is passed by."""
    plain, x = layer(C, C), torch.randn(ROWS, N, C, dtype=torch.float64, requires_grad=True)
    wide = layer()
    if kind == "adapter":
        one, three = Adapted(plain), Adapted(wide)
    else:
        one, three = plain, wide
        for module in (one, three):
            module.register_forward_hook(lambda module, inputs, output: output.sin())
    y, bias = product(x, one)
    close(y, one(x))
    assert bias is None
    close(add_linear(x, x, one), x + one(x))
    for parts in (3,), (1, 2), (1, 1, 1):
        close(torch.cat(project_qkv(x, three, parts), dim=-1), three(x))


@torch.no_grad()
def test_hooks_may_keep_what_they_are_given():
    """Nothing is added to a layer's output after its hook has seen it."""
    block, kept = Block(C, HEADS, 2 * C).double(), []
    for linear in (block.out, block.fc2):
        linear.register_forward_hook(lambda module, inputs, output: kept.append((output, output.clone())))
    block(torch.randn(ROWS, N, C, dtype=torch.float64))
    assert len(kept) == 2 and all(output.equal(seen) for output, seen in kept)


def test_adapters_anywhere_in_the_model():
    """A model with an adapter for every linear layer gives what merged weights give, and trains all of them."""
    torch.manual_seed(5)
    model = randomized(BTAdapter(CONFIG)).double()
    places = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.bias is not None
    ]
    adapters = [Adapted(child) for _, _, child in places]
    for (parent, name, _), adapter in zip(places, adapters):
        setattr(parent, name, adapter)
    pixels = clip()
    adapted = model(pixels)
    (adapted.tokens.square().sum() + adapted.pooled.square().sum()).backward()
    for (parent, name, _), adapter in zip(places, adapters):
        assert adapter.more.weight.grad.abs().max() > 0, name
        setattr(parent, name, adapter.merged())
    merged = model(pixels)
    close(adapted.tokens, merged.tokens, 1e-10)
    close(adapted.pooled, merged.pooled, 1e-10)


def test_block_against_torch():
    """Forward and gradients, with and without a mask."""
    torch.manual_seed(6)
    block = Block(C, HEADS, 2 * C).double()
    x = torch.randn(ROWS, N, C, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(ROWS, 1, N, N) < 0.7
    mask[..., 0] = True

    def plain(x, mask):
        x = x + block.out(attended(F.linear(block.norm1(x), block.qkv.weight, block.qkv.bias), mask=mask))
        h = block.fc1(block.norm2(x))
        return x + block.fc2(h * torch.sigmoid(1.702 * h))

    for m in (None, mask):
        results = [gradients(y, x, *block.parameters()) for y in (block(x, m), plain(x, m))]
        for got, want in zip(*results, strict=True):
            close(got, want, 1e-12)
        with torch.no_grad():
            close(block(x, m), results[1][0], 1e-12)
    step, plain_step = (flops.count(lambda f=f: f(x, None).sum().backward()) for f in (block, plain))
    assert step == plain_step > 0  # a product that is not counted would make plans and reports lie
