"""The linear layers of a block against what torch makes of the same lines, and those that are more than a layer."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyvidx.layers.attention import self_attention
from pyvidx.layers.block import Block
from pyvidx.layers.linear import dense, dense_rows
from pyvidx.layers.sincos import sincos_table
from pyvidx.models import BTAdapter, flops
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


def attended(qkv, mask=None):
    q, k, v = qkv.view(ROWS, N, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def gradients(y, *inputs):
    torch.manual_seed(4)
    grad = torch.randn(y.shape).to(y.dtype)  # the same in every dtype
    return y.detach(), *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], grad)


@pytest.mark.parametrize("kind", ["adapter", "hook"])
def test_other_layers_are_called(kind):
    """They read no parameters past an adapter, and no hook is passed by."""
    module, x = layer(), torch.randn(ROWS, N, C, dtype=torch.float64, requires_grad=True)
    if kind == "adapter":
        module = Adapted(module)
    else:
        module.register_forward_hook(lambda module, inputs, output: output.sin())
    close(dense(x, module), module(x))
    close(dense_rows(x, module, slice(C, None)), module(x)[..., C:])
    close(self_attention(x, module, HEADS), attended(module(x)))


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


def test_sincos_table():
    table = sincos_table(7, 6, torch.zeros((), dtype=torch.float64))
    for p, j in ((0, 0), (3, 2), (6, 5)):
        angle = p / 10000 ** (2 * (j // 2) / 6)
        assert table[p, j].item() == pytest.approx(math.cos(angle) if j % 2 else math.sin(angle), abs=1e-15)
