"""Both libraries for products, whatever this machine's choice is, against plain torch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyvidx.layers import attention, products
from pyvidx.layers.attention import self_attention
from pyvidx.layers.block import Block
from pyvidx.layers.linear import dense, linear
from pyvidx.layers.products import _amd, _choose
from pyvidx.models import flops
from pyvidx.ops import bank_attention
from tests.test_layers import gradients

ROWS, N, HEADS, C = 6, 5, 2, 16  # heads wide enough for the kernel of bank_attention


@pytest.fixture(params=["torch", "onednn"])
def calls(request, monkeypatch):
    """The products that oneDNN has been given, as a list; None where it is to be given none."""
    seen, onednn = [], products._onednn
    monkeypatch.setattr(products, "LIBRARY", request.param)
    monkeypatch.setattr(products, "LEAST", 1)
    monkeypatch.setattr(products, "_onednn", lambda x, *more: seen.append(x.shape) or onednn(x, *more))
    yield seen if request.param == "onednn" else None
    assert seen if request.param == "onednn" else not seen


def agree(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.float(), atol=1e-5, rtol=1e-5)


def layer(width_in, width_out, bias=True):
    torch.manual_seed(3)
    return nn.Linear(width_in, width_out, bias=bias)


@pytest.mark.parametrize("frozen", ["nothing", "x", "layer"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(C,), (3, C), (2, 3, N, C), (9 * C, C)], ids=str)
@pytest.mark.parametrize("width", [3 * C, C // 2])
def test_linear(width, shape, bias, frozen, calls):
    module = layer(C, width, bias).requires_grad_(frozen != "layer")
    x = torch.randn(shape, requires_grad=frozen != "x")
    want = gradients(F.linear(x, module.weight, module.bias), x, *module.parameters())
    agree(gradients(dense(x, module), x, *module.parameters()), want)
    agree(gradients(linear(x, *[*module.parameters(), None][:2]), x, *module.parameters()), want)
    with torch.no_grad():
        agree([dense(x, module)], want[:1])
    # forward and each gradient twice, and forward without one
    assert calls is None or len(calls) == 2 * (1 + (frozen != "x") + (frozen != "layer")) + 1


def test_views(calls):
    """Rows apart from each other, and a part of a layer's weight."""
    module, x = layer(C, 3 * C), torch.randn(3, N + 1, 2 * C)[:, 1:, ::2].requires_grad_()
    part = module.weight[C:], module.bias[C:]
    agree(gradients(linear(x, *part), x, *module.parameters()), gradients(F.linear(x, *part), x, *module.parameters()))


def test_block(calls):
    torch.manual_seed(6)
    block, x = Block(C, HEADS, 4 * C), torch.randn(ROWS, N, C, requires_grad=True)
    wide = copy.deepcopy(block).double()
    x_wide = x.detach().double().requires_grad_()
    want = gradients(wide(x_wide), x_wide, *wide.parameters())
    agree(gradients(block(x), x, *block.parameters()), want)
    with torch.no_grad():
        agree([block(x)], want[:1])
    assert flops.count(lambda: block(x).sum().backward()) == flops.count(lambda: wide(x_wide).sum().backward()) > 0


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_kernel(dtype, autocast, monkeypatch):
    """As near to float64 as torch's, in 16 bits and under autocast too."""
    module, x = layer(C, 3 * C), torch.randn(ROWS, N, C)
    wide = self_attention(x.double().requires_grad_(), copy.deepcopy(module).double(), HEADS)
    if not autocast:
        module, x = module.to(dtype), x.to(dtype)
    x.requires_grad_()
    low = torch.bfloat16 if autocast else dtype
    seen = []
    monkeypatch.setattr(attention, "bank_attention", lambda *a: seen.append(a[0].dtype) or bank_attention(*a))
    results = []
    monkeypatch.setattr(products, "LIBRARY", "torch")
    for slow, most in ((True, 0), (False, N), (False, N - 1)):
        monkeypatch.setattr(products, "MKL_IS_SLOW", slow)
        monkeypatch.setattr(attention, "MOST", dict.fromkeys(attention.MOST, most))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(gradients(self_attention(x, module, HEADS), x, *module.parameters()))
    assert len(seen) == 2 and results[0][0].dtype == low
    assert all(a.equal(b) for a, b in zip(*results[:2]))
    eps = torch.finfo(low).eps
    torch.testing.assert_close(results[0][0].double(), wide, atol=4 * eps, rtol=4 * eps)
    for name, got, want in zip(("x", "weight", "bias"), results[0][1:], results[2][1:]):
        got, want = got.float(), want.float()
        if name == "bias":  # torch sums rounding for the keys'
            got, want = (torch.cat([b[:C], b[2 * C :]]) for b in (got, want))
        torch.testing.assert_close(got, want, atol=16 * eps * want.abs().max().item(), rtol=0)


def test_where_torch_multiplies(monkeypatch):
    monkeypatch.setattr(products, "LIBRARY", "onednn")
    x, weight = torch.randn(1024, 64), torch.randn(64, 64)
    assert products.onednn(x, weight) and products.onednn(x[None], nn.Parameter(weight))
    assert not products.onednn(x[:64], weight) and not products.onednn(x[:0], weight)
    assert not products.onednn(x.double(), weight.double()) and not products.onednn(x.bfloat16(), weight.bfloat16())
    assert not products.onednn(x.to("meta"), weight.to("meta"))
    assert not products.onednn(x.as_subclass(Other), weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not products.onednn(x, weight)
        assert linear(x, weight).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not products.onednn(x, weight)


class Other(torch.Tensor):
    """What a library for quantized or distributed weights makes of a tensor."""


def test_compiled(monkeypatch):
    """The compiler sees torch's own product."""
    monkeypatch.setattr(products, "LIBRARY", "onednn")
    module, x = layer(64, 64), torch.randn(1024, 64)
    compiled = torch.compile(lambda x: module(x).sin(), fullgraph=True, backend="aot_eager")
    got = gradients(compiled(x), *module.parameters())
    agree(got, gradients(F.linear(x, module.weight, module.bias).sin(), *module.parameters()))


ZEN4, ZEN5, INTEL = (
    f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 2\n"
    for vendor, family in (("AuthenticAMD", 25), ("AuthenticAMD", 26), ("GenuineIntel", 6))
)


def test_choice(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert [_amd(text) for text in (ZEN4, ZEN5, INTEL, "")] == [25, 26, 0, 0]
    assert [_choose("", family) for family in (0, 25, 26)] == ["torch", "onednn", "onednn"]
    assert [_choose("torch", 26), _choose("onednn", 0)] == ["torch", "onednn"]
    with pytest.raises(ValueError, match="PYVIDX_PRODUCTS must be torch or onednn, got 'blas'"):
        _choose("blas", 26)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")  # Zen 3 is of family 25 too
    assert _amd(ZEN4) == 0
