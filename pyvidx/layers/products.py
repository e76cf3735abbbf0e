"""Which library multiplies float32 matrices on a CPU: MKL, as torch has it, or oneDNN, which torch carries as well.

Two things speak for oneDNN. On AMD's CPUs MKL runs 256-bit code and oneDNN 512-bit code. From Zen 5 on that is twice as
fast, 220 GFLOP/s a thread against 105. On Zen 4, whose units are 256 bits wide, a tower's layers run at 98 against
85, at any number of rows, and their gradients as fast by both. And it adds a bias and a residual on the way out, where
MKL is given a matrix that was filled with them. On other CPUs torch's choice stands: with AVX2 both run at 90, but
oneDNN's gradients at 50 to 80. PYVIDX_PRODUCTS=torch|onednn decides otherwise.

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


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


FAMILY = _amd(_cpuinfo())
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


def mkl(x: Tensor, matrix: Tensor) -> bool:
    """Whether MKL does, which knows no bias and no 16 bits."""
    wide = x.dtype in (torch.float32, torch.float64)
    return x.is_cpu and wide and not torch.is_autocast_enabled("cpu") and not onednn(x, matrix)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None) -> Tensor:
    """x W^T + bias + add. x [..., K], weight [N, K], bias [N], add [..., N] -> [..., N]."""
    if onednn(x, weight):
        return _onednn(x, weight, bias, add)
    if add is None:
        return F.linear(x, weight, bias)
    out = add.new_empty(add.shape)
    out = out.copy_(add) if bias is None else torch.add(add, bias, out=out)
    _add_product(out.view(-1, out.shape[-1]), x.flatten(0, -2), weight.t())
    return out


def input_gradient(grad: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    """grad W, added to `onto`, which may be written into. grad [M, N], weight [N, K], onto [M, K] -> [M, K]."""
    if onednn(grad, weight):
        return _onednn(grad, weight.t(), None, onto)
    if onto is None:
        return torch.mm(grad, weight)
    _add_product(onto, grad, weight)
    return onto


def weight_gradient(grad: Tensor, x: Tensor, out: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
    """grad^T x, written into `out`, or added to `onto`, which may be written into. grad [M, N], x [M, K] -> [N, K]."""
    if onto is not None:
        return input_gradient(grad.t(), x, onto)
    if not onednn(grad.t(), x):
        return torch.mm(grad.t(), x, out=out) if out is not None else torch.mm(grad.t(), x)
    # oneDNN's left operand is copied where it is a transpose, and a transposed gradient when it is kept: the fewest.
    other = x.numel() + grad.shape[1] * x.shape[1] < grad.numel()
    found = _onednn(x.t(), grad.t()).t() if other else _onednn(grad.t(), x.t())
    return found if out is None else out.copy_(found)


def _add_product(out, a, b):
    torch.addmm(out, a, b, out=out)  # addmm_ is a product that torch counts no FLOPs of


def _onednn(x, weight, bias=None, add=None):
    if add is None:
        return OP(x, weight, bias, "none", [], "")
    return OP.binary(x, add, weight, bias, "add")
