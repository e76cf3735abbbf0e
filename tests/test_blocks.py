"""Sums and norms in one pass, between blocks and inside them: the numbers of one step after the other."""

import pytest
import torch
from torch import nn

from pyvidx.layers import norm
from pyvidx.layers.block import Block, run_blocks
from pyvidx.layers.norm import add_norm, writable
from pyvidx.memory.qformer import FeedForward, QFormerConfig, _feed_both
from tests.tools import differ


@pytest.mark.parametrize("shape", [(2, 3, 7, 64), (300, 8, 64), (5000, 64)])
@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16"), None])
def test_add_norm(shape, dtypes, monkeypatch):
    """With and without gradients, into new memory and over what was read; None: float32, where the op is not used."""
    ours, theirs = (getattr(torch, d) for d in dtypes or ("float32", "float32"))
    monkeypatch.setattr(norm, "_pays", lambda x, y: x.device.type in norm.KERNELS and dtypes is not None)
    layer = nn.LayerNorm(64).to(ours)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    x, y = torch.randn(shape, dtype=ours), torch.randn(shape, dtype=theirs)
    rows = x + y
    want = rows, layer(rows).to(theirs)
    close = 3e-2 if dtypes else 1e-5
    assert differ(add_norm(x.requires_grad_(), y, layer), want) < close
    with torch.no_grad():
        assert differ(add_norm(x, y, layer), want) < close
        spare = torch.empty_like(y)
        out = writable(x, y, spare, nn.Linear(64, 64), layer)
        assert (out is None) == (ours != theirs)
        got = add_norm(x, y, layer, out)
        assert differ(got, want) < close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_run_blocks(dtype):
    """As called one by one, also where a hook sits on one of them, which sees what it would see."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(64, 4, 96) for _ in range(4)).to(dtype).requires_grad_(False)
    x, seen = torch.randn(4, 600, 64, dtype=dtype), []
    want = [x]
    for block in blocks:
        want.append(block(want[-1]))
    close = 5e-2 if dtype == torch.bfloat16 else 1e-5
    assert differ(run_blocks(blocks, x, range(4)), want[1:]) < close
    assert differ(run_blocks(blocks, x, [1, 3]), want[2::2]) < close
    assert differ(run_blocks(blocks, x, [1, 3], class_row=True), [want[2], want[4][..., :1, :]]) < close
    blocks[2].register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    assert differ(run_blocks(blocks, x, [0, 3]), [want[1], want[4]]) < close
    assert differ(seen[0], want[2:4]) < close


def test_gradients_of_blocks():
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(64, 4, 96) for _ in range(2)).to(torch.bfloat16).float()
    x, found = torch.randn(3, 5, 64), []
    for run in (lambda: run_blocks(blocks, x, [1])[0], lambda: blocks[1](blocks[0](x))):
        found.append(torch.autograd.grad(run().square().mean(), list(blocks.parameters())))
    assert differ(*found) < 1e-6


@torch.no_grad()
def test_both_paths_of_a_frame():
    torch.manual_seed(0)
    config = QFormerConfig(width=64, heads=4, mlp_width=96, layers=1, encoder_width=64)
    query, text = FeedForward(config).eval(), FeedForward(config).eval()
    rows = torch.randn(1, 1, 9, 64)
    parts = rows[:, :, :4], rows[:, :, 4:]
    want = torch.cat([query(parts[0]), text(parts[1])], dim=2)
    assert differ([_feed_both(*parts, query, text)], [want]) < 1e-5
