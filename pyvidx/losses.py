"""The losses of BT-Adapter's masked pretraining (arXiv:2309.15785, section 3.2), as functions of tensors.

    VTC   contrastive(v, t)                                        video and text embeddings
    MBCA  contrastive(mean over kept tokens of projected tokens, t)
    MBTA  alignment(student, teacher)                              every kept token and the frozen backbone's

The loss of UMT (arXiv:2303.16058) is `alignment` as well.

Half precision is computed in float32, also under autocast: a float16 logit near 30 has steps of 0.02.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

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
    with torch.autocast(a.device.type, enabled=False):
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
    with torch.autocast(student.device.type, enabled=False):
        return (2 - 2 * (_unit(student) * _unit(teacher.detach())).sum(dim=-1)).mean()


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
    def forward(ctx, x, gradient, group):
        ctx.gradient, ctx.group, ctx.rows = gradient, group, len(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        if ctx.gradient == "global":
            grad = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(grad, group=ctx.group)  # gloo has no reduce_scatter; these rows are few
        start = dist.get_rank(ctx.group) * ctx.rows
        return grad[start : start + ctx.rows], None, None


def _unit(x: Tensor) -> Tensor:
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return F.normalize(x, dim=-1, eps=1e-8)
