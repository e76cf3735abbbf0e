"""MA-LMM's memory step on full memories, image encoder not included: a stream's single frame, and 16 frames of a clip.

Against the official algorithm in plain torch (whole-bank cosines, the whole bank projected in every layer), which does
one frame per call. An answer is asked for after every run. int8: ours with precision="int8"; the official one is
float32 as before.
"""

import functools
from dataclasses import replace

import pytest
import torch

from bench.harness import Case, nbytes
from pyvidx.backbones.vit import EVA_G
from pyvidx.memory.qformer import QFormerConfig
from pyvidx.models.malmm import MALMM
from pyvidx.models.malmm_config import MALMMConfig
from pyvidx.reference.malmm import Bank, ReferenceMALMM, ReferenceState
from pyvidx.weights.malmm import export_malmm

TEXT, CLIP_FRAMES = 12, 16
SIZES = {
    "small": MALMMConfig(
        replace(EVA_G, image_size=112, width=128, heads=2, layers=0),
        QFormerConfig(width=64, heads=4, layers=4, mlp_width=128, encoder_width=128, vocab=100),
        llm_width=8,
        time_length=1000,
    ),
    # No image encoder, and a short list of words: neither is timed.
    "real": MALMMConfig(replace(EVA_G, layers=0), QFormerConfig(vocab=100), llm_width=8, time_length=1000),
}


@functools.lru_cache(maxsize=1)
def models(size: str, device: str) -> tuple[MALMM, ReferenceMALMM]:
    torch.manual_seed(0)
    with torch.no_grad():
        model = MALMM(SIZES[size]).eval().to(device)
        reference = ReferenceMALMM(SIZES[size]).eval().to(device)
        reference.load_state_dict(export_malmm(model, "lavis"))
    return model, reference


@functools.lru_cache(maxsize=1)
def in_8_bits(size: str) -> MALMM:
    return models(size, "cpu")[0].fold(precision="int8")


@torch.no_grad()
def case(path: str, size: str, M: int, device: str, precision: str = "float32") -> Case:
    model, reference = models(size, device)
    layers, keys_values = model.qformer.layers, model.qformer.keys_values
    if precision == "int8":
        model = in_8_bits(size)
    q, vision = model.config.qformer, model.config.vision
    P, C, D, N, X = 1 + vision.patches, vision.width, q.width, q.queries + TEXT, len(q.cross_layers)
    t = CLIP_FRAMES if path == "clip" else 1
    ids, mask = (torch.randint(0, 100, (1, TEXT), device=device), torch.ones(1, TEXT, device=device))
    frames = torch.randn(1, P, C, device=device) + 0.5 * torch.randn(t, P, C, device=device)
    memories = model.start(model.prompt(ids), length=M)
    memories = model.push(memories, torch.randn(1, M + 3, P, C, device=device))
    bank, rows = torch.randn(1, M, P, C, device=device), torch.randn(1, M, N, D, device=device)
    full = ReferenceState(
        Bank(bank, torch.ones(1, M, P, device=device)), (Bank(rows, torch.ones(1, M, N, device=device)),) * q.layers
    )
    state = {"ours": memories, "theirs": full}

    def run():
        # As frame 0, whose row of the temporal table is as good as any: the table has an end, this loop has not.
        state["ours"] = model.push(state["ours"], frames[None], positions=[0.0] * t)
        return model.ask(state["ours"])

    def eager():
        out, state["theirs"] = reference.step(state["theirs"], frames[:1], 0, ids, mask, M)
        return out

    weights = nbytes(*layers.parameters(), keys_values.weight) // (4 if precision == "int8" else 1)
    attached = sum(nbytes(kv) for kv in memories.visual.attached)
    attached += sum(nbytes(m.bank, *m.attached) for m in memories.query if m is not None)
    flops = 4 * P * C * D * X + 4 * q.queries * (M + 1) * P * D * X + 4 * N * (M + 1) * N * D * q.layers
    flops += 2 * sum(
        p.numel() * (q.queries if "query" in name or "cross" in name else TEXT if "text" in name else N)
        for layer in layers
        for name, p in layer.named_parameters()
        if p.dim() == 2
    )
    return Case(
        "malmm",
        {"path": path, "M": M, "frames": t, "P": P, "C": C, "precision": precision},
        torch.float32,
        run,
        eager,
        bytes=weights + t * (attached + nbytes(frames[0])),
        flops=t * flops,
        compiled=False,  # the memories change in place, and their lengths are numbers of the host
        graph=False,
        eager_calls=t,
    )


@pytest.mark.parametrize(
    "path, size, M, precision",
    [
        pytest.param(path, size, M, precision, id=f"{path}-{'small-' if size == 'small' else ''}M{M}-{precision}")
        for size, lengths in (("small", [4]), ("real", [10, 20, 40]))
        for M in lengths
        for path in ("stream", "clip")
        for precision in ("float32", "int8")
    ],
)
def test_malmm(path, size, M, precision, device, measure, benchmark):
    if precision == "int8" and device != "cpu":
        pytest.skip("8 bits are a CPU's")
    measure(case(path, size, M, device, precision))
    info = benchmark.extra_info
    info["vs_reference"] = info["vs_eager"]
    info["ms_per_frame"] = info["ms"] / info["shape"]["frames"]
