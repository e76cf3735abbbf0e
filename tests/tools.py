"""Small models of every kind, and what they give: for the tests that put other people's tools around them."""

from dataclasses import replace

import torch
from torch import nn

from pyvidx import temporal
from pyvidx.backbones import EVA_G, ViT
from pyvidx.memory.qformer import QFormerConfig
from pyvidx.models import MALMM, BTAdapter, MALMMConfig, VideoEncoder
from tests.test_models import CONFIG, VISION, randomized

NAMES = ("BTAdapter", *temporal.names(), "MALMM")
IDS = torch.tensor([[3, 7, 9], [1, 2, 4]])


def model(name):
    torch.manual_seed(1)
    if name == "BTAdapter":
        return randomized(BTAdapter(CONFIG))
    if name == "MALMM":
        vision = replace(EVA_G, image_size=12, patch_size=4, width=16, heads=2, layers=1, mlp_width=24)
        qformer = QFormerConfig(
            width=16, heads=2, layers=2, mlp_width=24, queries=3, encoder_width=16, vocab=20, text_length=8
        )
        return randomized(MALMM(MALMMConfig(vision, qformer, time_length=16, llm_width=12)))
    return randomized(VideoEncoder(ViT(VISION), temporal.create(name, VISION)))


def clips(B=2, T=4):
    return torch.randn(B, T, 3, 12, 12)


def outputs(model, pixels):
    """All tensors that a model gives; of MALMM whole clips and a stream."""
    if not isinstance(model, MALMM):
        found = model(pixels)
        return [found.tokens, found.pooled]
    ids = IDS.repeat(pixels.shape[0], 1)[: pixels.shape[0]]
    memories = model.start(model.prompt(ids), length=2)
    for t in range(pixels.shape[1]):
        memories = model.push(memories, model.features(pixels[:, t]))
    return [model(pixels, ids, length=2), model.project(model.ask(memories))]


def layers(model):
    """Every layer that has a place in the outputs, by name."""
    kinds = (nn.Linear, nn.LayerNorm, nn.Conv2d)
    unused = f"layers.{len(model.qformer.layers) - 1}.feed_text" if isinstance(model, MALMM) else "nothing"
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) and unused not in name}


def differ(got, want):
    """The largest relative difference, in norms."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))
