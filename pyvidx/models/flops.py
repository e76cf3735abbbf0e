"""What a computation costs, without running it: arithmetic and memory, counted from the code itself on meta tensors.

    count(lambda: encoder(pixels))          # FLOPs: matrix products and attention, 2 per multiply-add
    peak_bytes(lambda: encoder(pixels))     # the most that is alive at once besides what was there before

`family` does both for every temporal module.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from pyvidx import temporal
from pyvidx.backbones.vit import ViT, ViTConfig
from pyvidx.layers import int8, products
from pyvidx.models.video_encoder import VideoEncoder
from pyvidx.ops._library import FLOPS
from pyvidx.pictures import drawn

# label, name, options: the modules, and the steps of BT-Adapter's table 6 (arXiv:2309.15785)
FAMILY = (
    ("mean", "mean", {}),
    ("st_pool", "st_pool", {}),
    ("grid_pool", "grid_pool", {}),
    ("joint", "joint", {}),
    ("separate", "separate", {}),
    ("separate, no fc", "separate", {"fc": False, "every": True}),
    ("separate, last 4", "separate", {"layers": 4}),
    ("st_adapter", "st_adapter", {}),
    ("st_adapter, mlp", "st_adapter", {"places": "mlp"}),
    ("clip_vip", "clip_vip", {}),
    ("stan", "stan", {}),
    ("branch, apart", "branch", {"interact": False}),
    ("bt_adapter", "bt_adapter", {}),
)


def count(run: Callable[[], object]) -> int:
    """FLOPs of what `run` does in matrix products, convolutions and attention, 2 per multiply-add; elementwise work and
    norms are not counted. Backward passes inside `run` are. Tensors may be on any device, "meta" computes nothing."""
    formulas = {getattr(torch.ops.pyvidx, name): _with_out_shape(formula) for name, formula in FLOPS.items()}
    aten = torch.ops.aten  # torch knows the attention kernels of CUDA only
    formulas[aten._scaled_dot_product_flash_attention_for_cpu] = _cpu_attention
    formulas[aten._scaled_dot_product_flash_attention_for_cpu_backward] = _cpu_attention_backward
    if products.OP is not None:
        formulas[products.OP] = _onednn_product
    if int8.OP is not None:
        formulas[int8.OP] = _onednn_product
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    # Not torch's, which puts hooks on all modules to know which of them counts: hooked layers are called as they are,
    # so that other ops would run than without it.
    counter.mod_tracker = _OneModule()
    with counter:
        run()
    return counter.get_total_flops()


class _OneModule(nullcontext[None]):
    """Of which all operations are."""

    parents = {"Global"}


def _with_out_shape(formula: Callable[..., int]) -> Callable[..., int]:
    return lambda *args, out_shape=None, **kwargs: formula(*args, **kwargs)


def _cpu_attention(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _cpu_attention_backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def _onednn_product(x: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(out_shape) * x[-1]


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of new tensors that are alive at once during `run`, without gradients: what the eager code holds,
    with attention counted as a fused kernel, which does not write its scores."""
    with torch.no_grad(), _Fused(), _Live() as live:
        result = run()
    del result
    return live.peak


class _Fused(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


class _Live(TorchDispatchMode):
    """Storages made while it is on, and the most bytes of them at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._sizes, self._outside = 0, {}, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in self._sizes:
                self._outside[key] = StorageWeakRef(t.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in self._outside:
                # A weak reference keeps the key from being used again.
                self._sizes.setdefault(key, (StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes()))
        self._sizes = {k: v for k, v in self._sizes.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._sizes.values()))
        return result


@dataclass(frozen=True)
class Cost:
    """What one clip of T frames costs.

    Attributes:
        module: a label of FAMILY.
        frames: T.
        parameters, trained: of tower and module; those that ask for a gradient.
        flops: of a forward pass to tokens and pooled embedding.
        ratio: flops over those of "mean".
        weight_bytes, activation_bytes: in the dtype counted; see `peak_bytes`.
    """

    module: str
    frames: int
    parameters: int
    trained: int
    flops: int
    ratio: float
    weight_bytes: int
    activation_bytes: int


def family(vision: ViTConfig, frames: list[int], dtype: torch.dtype = torch.float16) -> list[Cost]:
    """Costs of every module at every number of frames.

    Raises:
        ValueError: a module does not take that many frames.
    """
    longest = max(64, *frames)
    costs, base = [], {}
    for label, name, options in FAMILY:
        if name in ("joint", "separate"):
            options = {**options, "time_length": longest}
        encoder = meta_encoder(vision, name, options, dtype)
        for T in frames:
            pixels = torch.empty(1, T, 3, vision.image_size, vision.image_size, dtype=dtype, device="meta")
            with torch.no_grad():
                flops = count(lambda: encoder(pixels))  # noqa: B023
            costs.append(
                Cost(
                    label,
                    T,
                    sum(p.numel() for p in encoder.parameters()),
                    sum(p.numel() for p in encoder.parameters() if p.requires_grad),
                    flops,
                    flops / base.setdefault(T, flops),
                    sum(p.numel() * p.element_size() for p in encoder.parameters()),
                    peak_bytes(lambda: encoder(pixels)),  # noqa: B023
                )
            )
    return costs


def meta_encoder(
    vision: ViTConfig, name: str, options: dict[str, Any], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A VideoEncoder without values, on the device "meta"."""
    with torch.device("meta"):
        return VideoEncoder(ViT(vision), temporal.create(name, vision, **options)).to(dtype).eval()


def table(costs: list[Cost]) -> str:
    """One block per number of frames."""
    lines = []
    for T in sorted({c.frames for c in costs}):
        lines.append(f"T = {T}")
        lines.append(f"{'module':18} {'trained M':>10} {'GFLOP':>10} {'x mean':>7} {'weights MiB':>12} {'peak MiB':>9}")
        for c in costs:
            if c.frames == T:
                lines.append(
                    f"{c.module:18} {c.trained / 1e6:10.2f} {c.flops / 1e9:10.1f} {c.ratio:7.3f} "
                    f"{c.weight_bytes / 2**20:12.0f} {c.activation_bytes / 2**20:9.0f}"
                )
        lines.append("")
    return "\n".join(lines[:-1])


def plot(costs: list[Cost], path: str | Path, title: str = "") -> Path:
    """Arithmetic over that of single frames, and activation memory, against the number of frames.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    with drawn(path, 11, 5, "flops") as figure:
        left, right = figure.subplots(1, 2)
        for i, label in enumerate(dict.fromkeys(c.module for c in costs)):
            own = [c for c in costs if c.module == label]
            frames, style = [c.frames for c in own], "o-" if i < 10 else "s--"
            left.plot(frames, [c.ratio for c in own], style, label=label)
            right.plot(frames, [c.activation_bytes / 2**20 for c in own], style)
        left.set(xlabel="frames", ylabel="FLOPs, times those of single frames")
        right.set(xlabel="frames", ylabel="most alive at once (MiB)", yscale="log")
        for axis in (left, right):
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted({c.frames for c in costs}), sorted({c.frames for c in costs}))
            axis.grid(True)
        figure.legend(loc="outside right upper")
        figure.suptitle(title)
    return Path(path)
