"""What a step of BT-Adapter's pretraining costs: operations and bytes, counted by running the real code on tensors
without data.

Operations are those of matrix products, convolutions and attention, two per multiply-add. Bytes are all operands and
results of every operation that is not a view, once each: what the project's fused ops move, and what torch moves one
operation at a time; attention is taken to run without its scores in memory, as on a GPU.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pyvidx.backbones import TextConfig, TextTower
from pyvidx.models import BTAdapter, flops
from pyvidx.models.config import BTAdapterConfig
from pyvidx.models.pretraining import Pretraining
from pyvidx.temporal.grouping import Grouping

UNMOVED = (torch.ops.aten._unsafe_view.default,)  # a view whose schema does not say so: of every product without a bias
TEXT_LENGTH = 64  # of the official pretraining
OPTIMIZER_BYTES = 30  # of a value: AdamW reads it, its gradient and two moments, writes three of them and a 16-bit copy


@functools.cache
def cards() -> dict:
    """Data-sheet numbers of known cards, and their source."""
    return json.loads((Path(__file__).parent / "cards.json").read_text())


@dataclass(frozen=True)
class Cost:
    """flops: of matrix products. product_bytes: that these move. other_bytes: of everything else."""

    flops: int = 0
    product_bytes: int = 0
    other_bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(self._all, other._all)))

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(*(a - b for a, b in zip(self._all, other._all)))

    @property
    def _all(self):
        return self.flops, self.product_bytes, self.other_bytes


def count(function: Callable[[], object]) -> Cost:
    """The cost of what function runs."""
    with _Bytes() as moved, _FlashAttention():
        operations = flops.count(function)
    return Cost(operations, moved.products, moved.others)


class _FlashAttention(TorchFunctionMode):
    """scaled_dot_product_attention as the op that GPUs run; tensors without data would get the plain products."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            causal = kwargs.get("is_causal", False)
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3], 0.0, causal)[0]
        return func(*args, **kwargs)


class _Bytes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.products = self.others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in UNMOVED or all(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.returns):
            return out  # a view
        moved = sum(t.numel() * t.element_size() for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
        if func._overloadpacket in flop_registry and "attention" not in func.name():
            self.products += moved
        else:
            self.others += moved
        return out


@dataclass(frozen=True)
class Plan:
    """A run to be predicted.

    Attributes:
        size: a name of pyvidx.models.config.
        frames, batch: T and the videos of one step on one card.
        mask_rate: 0 for no mask.
        checkpoint: the branch's forward pass is run again in the backward pass, as by the official code.
        cached: the frozen towers' outputs are read instead of computed.
    """

    size: str = "clip-l-14"
    frames: int = 8
    batch: int = 52
    mask_rate: float = 0.7
    checkpoint: bool = True
    cached: bool = False

    def __post_init__(self):
        if not 0 <= self.mask_rate < 1:
            raise ValueError(f"plan: the mask rate must be in [0, 1), got {self.mask_rate}")
        if not 1 <= self.frames <= self.config.time_length or self.batch < 1:
            raise ValueError(
                f"plan: frames must be in [1, {self.config.time_length}] and batch at least 1, "
                f"got {self.frames} and {self.batch}"
            )

    @property
    def config(self) -> BTAdapterConfig:
        return BTAdapterConfig.named(self.size)

    @property
    def cached_bytes(self) -> int:
        """Of one video's stored outputs, 16-bit."""
        config = self.config
        v = config.vision
        return 2 * (config.depth * self.frames * (1 + v.patches) * v.width + v.embed_dim)

    def step(self) -> Pretraining:
        """The model, without data, 16-bit. The text tower is OpenAI's: 12 layers, as wide as the embedding."""
        E = self.config.vision.embed_dim
        text = TextConfig(49408, 77, E, max(1, E // 64), 12, 4 * E, E)
        with torch.device("meta"):
            return Pretraining(BTAdapter(self.config), TextTower(text), mask_rate=self.mask_rate).half().train()


def parts(plan: Plan) -> dict[str, Cost]:
    """The cost of every part of one step of plan.batch videos."""
    step, v, B, T = plan.step(), plan.config.vision, plan.batch, plan.frames
    half = {"dtype": torch.float16, "device": "meta"}
    xs = [torch.empty(B, T, 1 + v.patches, v.width, **half) for _ in range(plan.config.depth)]
    text = torch.empty(B, v.embed_dim, **half)
    keep = torch.empty(B, v.patches - int(plan.mask_rate * v.patches), dtype=torch.int64, device="meta")
    group = Grouping(T, v.patches, keep=keep, masked=True)
    found = {}
    if not plan.cached:
        pixels = torch.empty(B, T, 3, v.image_size, v.image_size, **half)
        ids = torch.empty(B, TEXT_LENGTH, dtype=torch.int64, device="meta")
        with torch.no_grad():
            found["backbone"] = count(lambda: step.model.tower(pixels, range(plan.config.fork, v.layers)))
            found["text tower"] = count(lambda: step.text(ids))
    branch = count(lambda: step.rows(xs, group, step.draw_drops(xs[0], group)))
    found["branch forward"] = branch
    loss = []
    found["heads and losses"] = count(lambda: loss.append(step.losses(xs, text, group).total)) - branch
    if plan.checkpoint:
        found["branch forward again"] = branch
    found["backward"] = count(lambda: loss[0].backward())
    found["optimizer"] = Cost(other_bytes=OPTIMIZER_BYTES * trained(step))
    return found


def trained(step: Pretraining) -> int:
    """Number of trained values."""
    return sum(p.numel() for p in step.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Shares:
    """What part of a card's data-sheet numbers is reached.

    products: of the peak of matrix products. memory: of the bandwidth, by everything else. link: of NVLink.
    """

    products: float = 0.45
    memory: float = 0.75
    link: float = 0.5

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 < value <= 1:
                raise ValueError(f"plan: the share of {name} must be in (0, 1], got {value}")


def seconds(cost: Cost, card: dict, shares: Shares) -> tuple[float, float]:
    """Seconds of matrix products and of everything else on one card; a product takes as long as its operations or its
    bytes, whichever is longer, and nothing overlaps."""
    bandwidth = card["gbps"] * 1e9 * shares.memory
    products = max(cost.flops / (card["tflops"] * 1e12 * shares.products), cost.product_bytes / bandwidth)
    return products, cost.other_bytes / bandwidth


def reduce_seconds(values: int, cards: int, card: dict, shares: Shares) -> float:
    """Of a ring all-reduce of float32 gradients."""
    return 4 * values * 2 * (cards - 1) / cards / (card["link_gbps"] * 1e9 * shares.link)
