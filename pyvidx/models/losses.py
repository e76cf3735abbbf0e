"""The losses of BT-Adapter's masked pretraining (arXiv:2309.15785, section 3.2), as functions of tensors.

    VTC   contrastive(v, t)                                        video and text embeddings
    MBCA  contrastive(mean over kept tokens of projected tokens, t)
    MBTA  alignment(student, teacher)                              every kept token and the frozen backbone's

The loss of UMT (arXiv:2303.16058) is `alignment` as well.

Half precision is computed in float32, also under autocast: a float16 logit near 30 has steps of 0.02.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-8  # the least norm that a vector is divided by
GRADIENTS = ("global", "official")


def contrastive(a: Tensor, b: Tensor, *, scale: float = 100.0) -> Tensor:
    """Both directions of InfoNCE, CE(scale cos(a, b), diagonal) + CE(scale cos(b, a), diagonal), not halved.

    Args:
        a, b: [N, E] floating; row i of a belongs to row i of b.
        scale: 1 / temperature.

    Returns:
        a scalar, float32 or wider: the mean over N of each direction, summed. Differentiable in a and b.

    Raises:
        ValueError: the shapes are not [N, E] of one N and E.
    """
    if a.dim() != 2 or a.shape != b.shape or not a.shape[0]:
        raise ValueError(f"contrastive: a and b must both be [N, E], N > 0, got {tuple(a.shape)} and {tuple(b.shape)}")
    with _no_autocast(a):
        logits = scale * (_unit(a) @ _unit(b).T)
        target = torch.arange(len(a), device=a.device)
        return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)


def alignment(student: Tensor, teacher: Tensor) -> Tensor:
    """mean(2 - 2 cos(student, teacher)) over all tokens, the squared distance of unit vectors.

    Args:
        student, teacher: [..., E] floating, of one shape. The teacher gets no gradient.

    Returns:
        a scalar, float32 or wider. Differentiable in student.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape or not student.numel():
        raise ValueError(
            "alignment: student and teacher must be of one shape, not empty, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    with _no_autocast(student):
        return _Alignment.apply(_wide(student), _wide(teacher.detach()))


class _Alignment(torch.autograd.Function):
    """Neither unit vectors nor their gradients are written: that of a token is a sum of the two with scalar weights."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        per_student, per_teacher = (
            torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(EPS).reciprocal() for x in (student, teacher)
        )
        cos = (student * teacher).sum(dim=-1, keepdim=True) * per_student * per_teacher
        ctx.save_for_backward(student, teacher, cos, per_student, per_teacher)
        return (2 - 2 * cos).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, cos, per_student, per_teacher = ctx.saved_tensors
        along = -2 * grad / cos.numel() * per_student
        back = cos * per_student * (per_student < 1 / EPS)  # a shorter one is only divided by EPS
        return torch.mul(teacher, along * per_teacher).addcmul_(student, along * -back), None


def gather(x: Tensor, *, gradient: str = "global", group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of all processes, in order of rank; x itself where there is one process.

    Args:
        x: [N, E], N the same on every process.
        gradient: "global": the backward pass sums over the processes. Where each of them computes the same loss of all
            rows, the mean of their parameter gradients, as DistributedDataParallel takes it, then is the gradient
            of that loss. "official": the public code's, which returns only the own process's part: after the same mean
            1 / processes of it.
        group: of processes; default all.

    Returns:
        [processes * N, E]. Differentiable in x.

    Raises:
        ValueError: an unknown gradient.
    """
    if gradient not in GRADIENTS:
        raise ValueError(f"gather: gradient must be one of {GRADIENTS}, got {gradient!r}")
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return x
    return _Gather.apply(x, gradient, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: str, group: dist.ProcessGroup | None) -> Tensor:
        ctx.gradient, ctx.group, ctx.rows = gradient, group, len(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradient == "global":
            grad = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(grad, group=ctx.group)  # gloo has no reduce_scatter; these rows are few
        start = dist.get_rank(ctx.group) * ctx.rows
        return grad[start : start + ctx.rows], None, None


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    kind = x.device.type  # meta tensors, of which operations are counted, know no autocast
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _unit(x: Tensor) -> Tensor:
    return F.normalize(_wide(x), dim=-1, eps=EPS)
