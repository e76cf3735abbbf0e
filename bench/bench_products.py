"""A linear layer's three products in float32 on a CPU by oneDNN, against torch's own: does PYVIDX_PRODUCTS=onednn
pay here? Sizes of BT-Adapter's branch, 70 % masked, B = 4, and a frame's rows in MA-LMM's Q-Former."""

import pytest
import torch
import torch.nn.functional as F

from bench.harness import Case, nbytes
from pyvidx.layers import products

SIZES = [(64, 32, 48), (2496, 1024, 1024), (2496, 1024, 4096), (2496, 4096, 1024), (44, 768, 3072)]


@pytest.mark.parametrize("rows, K, N", SIZES, ids=str)
@pytest.mark.parametrize("name", ["forward", "input_gradient", "weight_gradient"])
def test_products(name, rows, K, N, device, measure, monkeypatch):
    if device != "cpu":
        pytest.skip("of a CPU")
    monkeypatch.setattr(products, "LIBRARY", "onednn")
    monkeypatch.setattr(products, "LEAST", 1)
    x, weight, bias, grad = torch.randn(rows, K), torch.randn(N, K), torch.randn(N), torch.randn(rows, N)
    run, eager, moved = {
        "forward": (
            lambda: products.forward(x, weight, bias),
            lambda: F.linear(x, weight, bias),
            (x, weight, bias, grad),
        ),
        "input_gradient": (lambda: products.input_gradient(grad, weight), lambda: grad @ weight, (x, weight, grad)),
        "weight_gradient": (lambda: products.weight_gradient(grad, x), lambda: grad.t() @ x, (x, weight, grad)),
    }[name]
    shape = {"of": name, "rows": rows, "K": K, "N": N}
    measure(Case("products", shape, x.dtype, run, eager, bytes=nbytes(*moved), flops=2 * rows * K * N, compiled=False))
