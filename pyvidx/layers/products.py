"""Which library multiplies float32 matrices on a CPU: MKL, as torch has it, or oneDNN, which torch carries as well.

On AMD's CPUs MKL runs 256-bit code and oneDNN 512-bit code. From Zen 5 on that is twice as fast, 220 GFLOP/s a thread
against 105. On Zen 4, whose units are 256 bits wide, a tower's layers run 1.1 to 1.3 times as fast
(bench/results/int8-2026-11-28.json). On other CPUs torch's choice stands: with AVX2 oneDNN is no faster, and slower in
gradients. PYVIDX_PRODUCTS=torch|onednn decides otherwise.

Nothing here knows gradients; pyvidx.layers.linear does.
"""

import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ZEN4, ZEN5 = 25, 26  # families of AMD's CPUs; with 512-bit vectors, and with units for whole ones (Zen 3 has neither)
OP = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # torch has oneDNN on some platforms only
LEAST = 1 << 20  # multiply-adds; in fewer the 10 us that a call of oneDNN takes show


def _amd(cpuinfo: str) -> int:
    """The family of an AMD CPU that torch runs 512-bit code on, by what Linux says of it; of others 0."""
    family = re.search(r"^vendor_id\s*: AuthenticAMD\ncpu family\s*: (\d+)$", cpuinfo, re.MULTILINE)
    return int(family[1]) if family is not None and torch.backends.cpu.get_cpu_capability() == "AVX512" else 0


def _choose(wish: str, family: int) -> str:
    """Of the environment's wish and `_amd`: onednn, or torch for torch's own choice."""
    if wish not in ("", "torch", "onednn"):
        raise ValueError(f"PYVIDX_PRODUCTS must be torch or onednn, got {wish!r}")
    if wish == "onednn" and OP is None:
        raise ValueError(f"PYVIDX_PRODUCTS=onednn: torch {torch.__version__} has no oneDNN here")
    return wish or ("onednn" if OP is not None and family >= ZEN4 else "torch")


def cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


FAMILY = _amd(cpuinfo())
LIBRARY = _choose(os.environ.get("PYVIDX_PRODUCTS", ""), FAMILY)
MKL_IS_SLOW = FAMILY >= ZEN5  # at half of what the CPU can do


def onednn(x: Tensor, matrix: Tensor) -> bool:
    """Whether oneDNN multiplies the rows of x by a matrix, or its transpose."""
    return (
        LIBRARY == "onednn"
        and not torch.compiler.is_compiling()  # the compiler has a choice of its own
        and x.is_cpu
        and x.dtype == matrix.dtype == torch.float32
        and x.shape[:-1].numel() * matrix.numel() >= LEAST
        and torch.backends.mkldnn.enabled
        and type(x) in (Tensor, nn.Parameter)  # what is quantized or distributed has products of its own
        and type(matrix) in (Tensor, nn.Parameter)
        and not torch.is_autocast_enabled("cpu")
    )


def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias. x [..., K], weight [N, K], bias [N] -> [..., N]."""
    return _onednn(x, weight, bias) if onednn(x, weight) else F.linear(x, weight, bias)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad W. grad [M, N], weight [N, K] -> [M, K]."""
    return _onednn(grad, weight.t()) if onednn(grad, weight) else torch.mm(grad, weight)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x. grad [M, N], x [M, K] -> [N, K]."""
    if not onednn(grad.t(), x):
        return torch.mm(grad.t(), x)
    # oneDNN's left operand is copied where it is a transpose, and a transposed gradient when it is kept: the fewest.
    other = x.numel() + grad.shape[1] * x.shape[1] < grad.numel()
    return _onednn(x.t(), grad.t()).t() if other else _onednn(grad.t(), x.t())


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return OP(x, weight, bias, "none", [], "")
