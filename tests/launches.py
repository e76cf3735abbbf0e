"""How many kernels a GPU is asked to launch, counted without one; tests/test_no_sync.py runs this."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pyvidx.backbones.vit import EVA_G
from pyvidx.layers import norm
from pyvidx.memory import qformer
from pyvidx.models import MALMM, BTAdapter, BTAdapterConfig, MALMMConfig
from tests.no_sync import gpu

# Ops that only name memory or ask for it.
FREE = (
    "_unsafe_view", "alias", "detach", "device", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty",
    "new_empty_strided", "promote_types", "split", "sym_size",
)  # fmt: skip
SEVERAL = {"constant_pad_nd": 2}  # ops of csrc/cuda that are called here: one each, but for bank_attention


def launches_of_bank_attention(q, rows, table, *others) -> int:
    """Of bank_attention_gpu_splits in csrc/include/pyvidx/bank_attention.h: up to 2048 keys a step need no second pass,
    nor do so many queries, steps and heads that each block has its own."""
    B, t = q.shape[:2]
    heads, groups = others[2], -(-q.shape[2] // 16)
    keys, tasks = rows.shape[2] * (rows.shape[1] if table is None else table.shape[3]), min(8, groups * min(t, 4))
    return 2 if keys > 2048 and 256 * tasks // (B * t * heads * groups) > 1 else 1


class Launches(TorchDispatchMode):
    """Every op that is no view and no allocation, by name; torch's attention is one."""

    def __init__(self):
        super().__init__()
        self.count, self.counting = Counter(), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and name not in FREE:
            one = launches_of_bank_attention(*args) if name == "bank_attention" else SEVERAL.get(name, 1)
            self.count[name] += one
        return func(*args, **(kwargs or {}))

    def attention(self, q, k, v, **options):
        """In the layout in which torch's kernels give it."""
        if self.counting:
            self.count["attention"] += 1
        *rows, H, N, _ = q.shape
        return q.new_empty(*rows, N, H, v.shape[-1]).transpose(-2, -3)

    def __enter__(self):
        self.counting = True
        return super().__enter__()


@contextmanager
def counted(dtype: str):
    """On a GPU that has this project's kernels; new tensors are of this dtype."""
    mode, before = Launches(), torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch, gpu(), torch.no_grad():
        for module in (norm, qformer):
            patch.setattr(module, "KERNELS", frozenset({"cpu", "cuda"}))
        patch.setattr(F, "scaled_dot_product_attention", mode.attention)
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            yield mode
        finally:
            torch.set_default_dtype(before)


def held(mode: Launches, most: int) -> None:
    print(mode.count.total(), dict(mode.count.most_common()), flush=True)
    assert mode.count.total() <= most, mode.count


def test_bt_adapter():
    """L/14, 8 frames, folded, its vector alone; 315 before sums and norms were one. Of these, 245 are products,
    attentions, activations, and norms with what is added before them: fewer need products that activate."""
    with counted("float16") as mode:
        model = BTAdapter(BTAdapterConfig.named("clip-l-14")).eval().fold()
        pixels = torch.randn(1, 8, 3, 224, 224)
        with mode:
            model(pixels, outputs=("pooled",))
    held(mode, 263)


@pytest.mark.parametrize("dtype, text, most", [("float32", 12, 159), ("float16", 12, 159), ("float32", 0, 129)])
def test_malmm_push(dtype, text, most):
    """A frame into full memories, with and without an instruction; 250 and 262 before. Banks in float32
    take 16-bit rows as they are. bank_attention adds up what its blocks found over the visual bank alone, 6 times."""
    config = MALMMConfig(vision=replace(EVA_G, layers=1))
    with counted(dtype) as mode:
        model = MALMM(config).eval()
        ids = torch.zeros(1, text, dtype=torch.int64) if text else None
        memories = model.start(model.prompt(ids), length=20)
        frame = torch.randn(1, 1 + config.vision.patches, config.vision.width)
        for _ in range(22):
            memories = model.push(memories, frame)
        with mode:
            model.push(memories, frame)
    held(mode, most)
