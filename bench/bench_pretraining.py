"""One step of BT-Adapter's pretraining, T = 8: forward, losses, backward, against the official step in plain torch.

From pixels (the frozen towers included) and from the outputs of the last backbone layers, with the tube mask of 0.7 and
without. Of the branch's own step a profile tells matrix products and attention from the rest, and in the rest this
project's ops; the least traffic of both is counted below, and `rest_floor_share` and `ops_floor_share` are a copy of as
many bytes over them. Wall times of a busy machine drift by more than the ratio: `vs_eager_cpu` is that of the
process's CPU time.
"""

import collections
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench.harness import Case, compare, copy_of, nbytes
from pyvidx.backbones import TextConfig, TextTower
from pyvidx.models import BTAdapter
from pyvidx.models.config import BTAdapterConfig
from pyvidx.models.pretraining import Pretraining
from pyvidx.reference.bt_adapter import ReferenceBTAdapter
from pyvidx.reference.pretraining import ReferencePretraining
from pyvidx.temporal.masking import drop_path_draws, tube_mask
from pyvidx.weights.bt_adapter import load_weights

T, LENGTH = 8, 64
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "attention", "convolution", "_linear_pointwise")
# The least passes of each op over the kept tokens [B, T, K, C] in a layer; QuickGELU's are over 4 C. Layer 0, which has
# no z to read, saves one of fusion's and one of its backward's.
PASSES = {
    "gated_fusion": 4, "temporal_attention": 4, "residual_norm": 4 + 4, "quick_gelu": 8, "gated_fusion_backward": 5,
    "temporal_attention_backward": 7, "residual_norm_backward": 4 + 4, "quick_gelu_backward": 12,
}  # fmt: skip


class Given(nn.Module):
    """A frozen part whose output is known."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return self.output


@functools.lru_cache(maxsize=1)
def models(size: str, whole: bool, device: str) -> tuple[Pretraining, ReferencePretraining]:
    """With the same weights. Not whole: only as many backbone layers as the branch reads, which are not run."""
    torch.manual_seed(0)
    config = BTAdapterConfig.named(size)
    if not whole:
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, layers=config.depth))
    E = config.vision.embed_dim
    text = TextTower(TextConfig(1000, 77, E, max(1, E // 64), 12 if whole else 1, 4 * E, E)).to(device)
    tower = ReferenceBTAdapter(config, "mma").to(device)
    tower.requires_grad_(False)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(name.startswith(("btadapter", "balance")))
    model = BTAdapter(config).to(device)
    load_weights(model, tower.state_dict())
    ours, theirs = Pretraining(model, text).to(device).train(), ReferencePretraining(tower, text).to(device)
    theirs.head.load_state_dict(ours.head.state_dict())
    return ours, theirs


def steps(size: str, source: str, B: int, rate: float, device: str) -> tuple[Callable, Callable, Pretraining, int]:
    """Our step, the official one, our model and the patches kept. Both leave gradients on parameters without any."""
    ours, theirs = models(size, source == "pixels", device)
    v, depth = ours.model.config.vision, ours.model.config.depth
    mask = tube_mask(B, v.patches, rate, device=device)
    K = int((~mask[0]).sum())
    drops = drop_path_draws(0.1, depth, B, T, K, device=device)
    ids = torch.randint(1, 1000, (B, LENGTH), device=device)
    pixels = torch.randn(B, T, 3, v.image_size, v.image_size, device=device)
    if source == "layers":
        xs = [torch.randn(B, T, 1 + v.patches, v.width, device=device) for _ in range(depth)]
        theirs.model.layers = nn.ModuleList(Given(x.flatten(0, 1)) for x in xs)
        with torch.no_grad():
            text = ours.text(ids)
        theirs.text = Given(text)
        theirs.model.pre_layrnorm, theirs.model._embed = nn.Identity(), lambda pixels: pixels

    def run():
        ours.zero_grad(set_to_none=True)
        if source == "layers":
            losses = ours.from_layers(xs, text, mask=mask, drops=drops)
        else:
            losses = ours(pixels, ids, mask=mask, drops=drops)
        losses.total.backward()
        return losses

    frame_major = mask.repeat(1, T)

    def eager():
        theirs.zero_grad(set_to_none=True)
        losses = theirs(pixels, ids, frame_major, drops)
        sum(losses).backward()
        return losses

    return run, eager, ours, K


def least_bytes(ours: Pretraining, B: int, K: int) -> tuple[int, int]:
    """Bytes of the ops in PASSES in one step; and of all of it that is neither products' nor attention's.

    The latter has in addition the last residual of a layer with 3 passes; of width E the token loss with 2 and 3 and
    the head's LayerNorm with 2 and 4; and LayerNorm of the teacher's tokens with 2. Each tensor once per fused pass.
    """
    config = ours.model.config
    item = next(ours.parameters()).element_size()
    rows = B * T * K * item
    C, E = config.vision.width, config.vision.embed_dim
    ops = rows * C * (config.depth * sum(PASSES.values()) - 2)
    return ops, ops + rows * (C * (config.depth * 3 + 2) + E * 11)


def parts(run: Callable) -> dict[str, float]:
    """Milliseconds of one run: of products with attention, of the rest, and in the rest of each op in PASSES."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    spent = collections.Counter({"products_ms": 0.0, "rest_ms": 0.0})
    for event in profiled.events():
        spent["products_ms" if _is_product(event) else "rest_ms"] += event.self_cpu_time_total / 1e3
        op = event.name.removeprefix("pyvidx::")
        if op in PASSES and event.name not in (above.name for above in _above(event)):
            spent[op + "_ms"] += event.cpu_time_total / 1e3
    return dict(spent)


def _above(event) -> Iterator:
    while (event := event.cpu_parent) is not None:
        yield event


def _is_product(event) -> bool:
    """A product itself, not what it calls, such as its bias's copy; or anything inside attention in space or inside
    oneDNN's products, which copy an operand that is a transpose."""
    if "temporal_attention" in event.name:
        return False
    if any(name in event.name for name in PRODUCTS):
        return True
    whole = ("scaled_dot_product", "bank_attention", "_linear_pointwise")
    return any(name in above.name for above in _above(event) for name in whole)


def cpu_ratio(run: Callable, eager: Callable, rounds: int) -> float:
    """Medians of the process's CPU time, in turn."""
    times: dict[Callable, list[float]] = {run: [], eager: []}
    for _ in range(rounds):
        for function, spent in times.items():
            start = time.process_time()
            function()
            spent.append(time.process_time() - start)
    return statistics.median(times[eager]) / statistics.median(times[run])


def case(size: str, source: str, B: int, rate: float, device: str, rounds: int) -> Case:
    run, eager, ours, K = steps(size, source, B, rate, device)
    with torch.enable_grad():
        extra = {"vs_eager_cpu": cpu_ratio(run, eager, rounds)}
        if source == "layers" and device == "cpu":
            for prefix, function in (("", run), ("eager_", eager)):
                several = [parts(function) for _ in range(rounds)]
                for part in several[0]:
                    extra[prefix + part] = statistics.median(p[part] for p in several)
            extra["ops_ms"] = sum(extra[op + "_ms"] for op in PASSES)
            extra["ops_bytes"], extra["rest_bytes"] = least_bytes(ours, B, K)
    v = ours.model.config.vision
    shape = {"size": size, "from": source, "B": B, "T": T, "K": K, "C": v.width}
    moved = nbytes(*(p for p in ours.parameters() if p.requires_grad)) * 2 + least_bytes(ours, B, K)[1]
    with_grad = torch.enable_grad()
    return Case("pretraining", shape, torch.float32, with_grad(run), with_grad(eager), bytes=moved, compiled=False,
                extra=extra)  # fmt: skip


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "size, source, B, rate",
    [
        pytest.param(size, source, B, rate, id=f"{size}-{source}-B{B}-{'masked' if rate else 'whole'}")
        for size, source, B, rates in (
            ("tiny", "layers", 2, (0.7, 0.0)),
            ("clip-b-16", "layers", 1, (0.7, 0.0)), ("clip-b-16", "pixels", 1, (0.7, 0.0)),
            ("clip-l-14", "layers", 1, (0.7, 0.0)), ("clip-l-14", "layers", 4, (0.7,)),
            ("clip-l-14", "layers", 16, (0.7,)),
            ("clip-l-14", "pixels", 1, (0.7, 0.0)),
        )
        for rate in rates
    ],
)  # fmt: skip
def test_pretraining(size, source, B, rate, device, benchmark, request):
    """Without `measure`: a step of the real sizes takes up to a minute, and ten more of them would tell nothing."""
    option = request.config.getoption
    torch.set_num_threads(option("--threads"))
    info = measured(case(size, source, B, rate, device, 1 if option("--smallest") else 3), device, option("--seconds"))
    benchmark.pedantic(lambda: None, rounds=1)  # pytest-benchmark keeps the file
    benchmark.group = info["op"]
    benchmark.extra_info.update(info)


def measured(case: Case, device: str, seconds: float) -> dict:
    info = compare(case, device, seconds, with_compile=False)
    if "rest_ms" in info:
        copy, times = copy_of(info["rest_bytes"], device), []
        for _ in range(8):
            start = time.perf_counter()
            copy()
            times.append(time.perf_counter() - start)
        rate = info["rest_bytes"] / statistics.median(
            times[1:]
        )  # in turn with long steps its buffers would be paged out
        for name in ("rest", "ops"):
            info[name + "_floor_share"] = info[name + "_bytes"] / rate * 1e3 / info[name + "_ms"]
        info["rest_copy_gbps"] = rate / 1e9
    return info
