"""Nothing on the way of a CUDA tensor waits for the host, or has a size that depends on what a tensor holds: otherwise
the GPU runs dry between launches, and CUDA graphs cannot be captured.

Shown without a GPU: fake tensors that say they are on one, under a mode that refuses whatever would read a value back.
"""

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyvidx import memory, ops
from pyvidx.backbones.clip import CLIPVisionConfig
from pyvidx.backbones.clip_text import CLIPText, CLIPTextConfig
from pyvidx.backbones.eva import EVAVisionConfig
from pyvidx.memory.qformer import QFormerConfig
from pyvidx.models import MALMM, BTAdapter, BTAdapterConfig, MALMMConfig
from pyvidx.models.pretraining import Pretraining
from pyvidx.ops.memory_merge import new_state
from pyvidx.temporal.masking import tube_mask

VISION = CLIPVisionConfig(image_size=12, patch_size=4, width=16, heads=2, layers=5, mlp_width=24, embed_dim=6)
CONFIG = BTAdapterConfig(VISION, depth=3, time_length=8)
SMALL = MALMMConfig(
    EVAVisionConfig(image_size=12, patch_size=4, width=48, heads=2, layers=1),
    QFormerConfig(width=16, heads=2, layers=4, mlp_width=32, encoder_width=48, vocab=30),
    llm_width=8,
    time_length=30,
)
B, T, M = 2, 4, 3
P, C = 1 + SMALL.vision.patches, SMALL.vision.width

# Results whose values the host needs, or whose sizes depend on values.
READS = (
    "_local_scalar_dense", "is_nonzero", "item", "equal", "allclose", "nonzero", "nonzero_static", "argwhere",
    "masked_select", "unique_consecutive", "unique_dim", "_unique", "_unique2", "bincount", "repeat_interleave",
)  # fmt: skip


class NoTraffic(TorchDispatchMode):
    """Fails where a value or a tensor goes from the GPU to the host, or (a stream's graph would not know) back."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = any(x.is_cuda for x in tensors)
        if on_gpu and name in READS and not (name == "repeat_interleave" and kwargs.get("output_size") is not None):
            raise AssertionError(f"{func} reads what a CUDA tensor holds")
        if on_gpu and name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{func} by a mask has a size that depends on values"
        out = func(*args, **kwargs)
        devices = {x.device.type for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        if name in ("_to_copy", "copy_", "_copy_from", "lift_fresh", "pin_memory", "_pin_memory"):
            devices |= {x.device.type for x in tensors}
            assert len(devices) <= 1, f"{func} copies between {' and '.join(sorted(devices))}"
        return out


@contextmanager
def gpu():
    """New tensors are fake ones on a GPU."""
    with FakeTensorMode(), torch.device("cuda:0"):
        yield


def half(*shape):
    return torch.randn(*shape, dtype=torch.float16)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        lambda x: torch.equal(x, x),
        lambda x: x.cpu(),
        lambda x: x.add_(x.to("cpu")),
        lambda x: x + torch.tensor([1.0, 2.0], device="cpu").to(x.device),
        lambda x: torch.nonzero(x),
        lambda x: x[x > 0],
        lambda x: torch.masked_select(x, x > 0),
        lambda x: torch.unique(x),
        lambda x: x.repeat_interleave((x > 0).long().flatten()),
    ],
)
def test_reading_is_caught(read):
    with gpu():
        x = torch.randn(3, 2)
        # RuntimeError: a CPU build of torch refuses some of these by itself.
        with NoTraffic(), pytest.raises((AssertionError, RuntimeError)):
            read(x)


# ---- ops ----


def op_calls():
    """name -> a call of every public op with every kind of argument, forward and backward."""
    x, z = half(B, T, 1 + 6, 16).requires_grad_(), half(B, T, 4, 16).requires_grad_()
    keep, cls, gate = torch.zeros(B, 4, dtype=torch.int64), half(B, 16), half(16).requires_grad_()
    weight, bias = half(16), half(16)
    position, time = half(7, 16), half(T, 16)
    frame_mask = torch.ones(B, T, dtype=torch.bool)
    state, frame = new_state(B, M, 5, 16, torch.float32, "cuda:0", [8]), torch.randn(B, 5, 16)
    active = torch.ones(B, dtype=torch.bool)
    clip, rows = torch.randn(B, T, 5, 16), torch.randn(B, T, 5, 8)
    q, banked = half(B, 1, 3, 16).requires_grad_(), half(B, M + 1, 5, 32).requires_grad_()
    table = torch.zeros(B, 1, 5, M, dtype=torch.int32)
    yield "temporal_attention", lambda: ops.temporal_attention(half(B, T, 6, 3, 2, 8).requires_grad_())
    yield "token_gather", lambda: ops.token_gather(x[:, :, 1:], keep, position[1:], time)
    yield "fusion_input", lambda: ops.fusion_input(x, position, time, cls[0], keep=keep, norm=(weight, bias, 1e-5))
    yield "gated_fusion", lambda: ops.gated_fusion(x, z, cls, gate, keep=keep, norm=(weight, bias, 1e-5))
    yield "quick_gelu", lambda: ops.quick_gelu(x, bias)
    yield "residual_norm", lambda: ops.residual_norm(x, x * 2, weight, bias)
    yield "st_pool", lambda: ops.st_pool(x, frame_mask)
    yield "temporal_scale", lambda: ops.temporal_scale(x, half(16, 3), bias, mask=frame_mask)
    yield "bank_attention", lambda: ops.bank_attention(q, banked, 2)
    yield "bank_attention by a table", lambda: ops.bank_attention(q, banked, 2, table=table, sizes=table)
    yield "memory_merge", lambda: ops.memory_merge(clip.requires_grad_(), torch.ones(B, T, 5))
    yield "memory_merge_", lambda: ops.memory_merge_(*state[:5], frame, state.attached, [rows[:, 0]], active=active)

    def scan():
        plan = ops.memory_scan_(*state[:5], clip, active=active)
        ops.memory_replay_(state.attached[0], rows, plan, state.order)

    yield "memory_scan_", scan


@pytest.mark.parametrize("name", [])
def test_ops(name):
    with gpu():
        call = dict(op_calls())[name]
        with NoTraffic():
            out = call()
            loss = [t.float().sum() for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
            if loss:
                sum(loss).backward()
