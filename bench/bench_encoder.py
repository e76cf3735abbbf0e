"""BT-Adapter's encoder end to end, from pixels to video embeddings, folded as for inference, against the official tower
in plain torch. Float32 on a CPU, where it is matrix products; float16 on a GPU."""

import functools

import pytest
import torch

from bench.harness import Case, nbytes
from pyvidx.models import BTAdapter, flops
from pyvidx.models.config import BTAdapterConfig
from pyvidx.reference.bt_adapter import ReferenceBTAdapter
from pyvidx.weights.bt_adapter import load_weights


@functools.lru_cache(maxsize=1)
def models(size: str, device: str) -> tuple[BTAdapter, ReferenceBTAdapter]:
    """With the same weights."""
    torch.manual_seed(0)
    config = BTAdapterConfig.named(size)
    reference = ReferenceBTAdapter(config, "mma").eval()
    model = BTAdapter(config).eval()
    load_weights(model, reference.state_dict())
    dtype = torch.float16 if device == "cuda" else torch.float32
    return model.fold().to(device, dtype), reference.to(device, dtype)


@torch.no_grad()
def case(size: str, B: int, T: int, device: str) -> Case:
    model, reference = models(size, device)
    v = model.config.vision
    dtype = next(model.parameters()).dtype
    pixels = torch.randn(B, T, 3, v.image_size, v.image_size, dtype=dtype, device=device)
    run = lambda: model(pixels, outputs=("pooled",)).pooled  # noqa: E731
    return Case("encoder", {"size": size, "B": B, "T": T}, dtype, run, lambda: reference(pixels),
                bytes=nbytes(pixels, *model.parameters()), flops=flops.count(run))  # fmt: skip


@pytest.mark.parametrize(
    "size, B, T", [("tiny", 1, 8), ("clip-b-16", 1, 8), ("clip-l-14", 1, 8), ("clip-l-14", 1, 16), ("clip-l-14", 1, 64)]
)
def test_encoder(size, B, T, device, measure):
    if device == "cpu" and T > 8:
        pytest.skip("more frames take a CPU minutes and tell nothing new")
    measure(case(size, B, T, device))
