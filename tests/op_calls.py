"""One call of every op with every kind of argument, forward and backward: for tests of how ops launch, not of what they
compute."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyvidx import ops
from pyvidx.ops.memory_merge import new_state

B, T, P, C, H, M, N = 2, 4, 6, 16, 2, 3, 5


class OpCall(NamedTuple):
    """run(*inputs) -> the outputs, the gradients of all inputs that ask for one, and the inputs that changed."""

    inputs: list[Tensor]
    run: Callable[..., list[Tensor]]


def op_calls(device: str, dtype: torch.dtype = torch.float32) -> dict[str, OpCall]:
    def x(*shape, grad=True):
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_(grad)

    keep = torch.arange(4, device=device).expand(B, 4).contiguous()
    table = torch.arange(M, device=device, dtype=torch.int32).expand(B, 2, N, M).contiguous()
    real = torch.tensor([[True] * T, [True] * 2 + [False] * 2])
    real = real.to(device) if device == "cpu" else torch.ones(B, T, dtype=torch.bool, device=device)
    norm = [x(C), x(C)]
    calls = {
        "temporal_attention": ([x(B, T, P, 3, H, C // H)], ops.temporal_attention),
        "token_gather": (
            [x(B, T, P, C), x(P, C), x(T, C)],
            lambda a, position, time: ops.token_gather(a, keep, position, time),
        ),
        "fusion_input": (
            [x(B, T, 1 + P, C), x(1 + P, C), x(T, C), x(C), *norm],
            lambda a, position, time, seed, *norm: ops.fusion_input(a, position, time, seed, keep=keep, norm=norm),
        ),
        "gated_fusion": (
            [x(B, T, 1 + P, C), x(B, T, 4, C), x(B, C), x(C), *norm],
            lambda a, z, cls, gate, *norm: ops.gated_fusion(a, z, cls, gate, keep=keep, norm=norm),
        ),
        "gated_fusion of one tensor": (
            [x(B, T, 1 + P, C), x(B, T, 1 + P, C)],
            lambda a, z: ops.gated_fusion(a, z, None),
        ),
        "output_gate": (
            [x(B, T, C), x(B, C), x(C), *norm],
            lambda a, cls, gate, *norm: ops.output_gate(a, cls, gate, norm=norm),
        ),
        "quick_gelu": ([x(B, T, C)], ops.quick_gelu),
        "residual_norm": (
            [x(B, T, P, C), x(B, T, P, C), x(B, C), *norm],
            lambda a, y, cls, *norm: ops.residual_norm(a, y, norm, cls=cls),
        ),
        "st_pool": ([x(B, T, P, C)], lambda a: ops.st_pool(a, mask=real)),
        "temporal_scale": ([x(B, T, P, C), x(C, 3), x(C)], lambda *a: ops.temporal_scale(*a, mask=real)),
        "bank_attention": (
            [x(B, 1, 3, C), x(B, M + 1, N, 2 * C)],
            lambda q, rows: ops.bank_attention(q, rows, None, H),
        ),
        "bank_attention by a table": (
            [x(B, 2, 3, C), x(B, M + 1, N, 2 * C)],
            lambda q, rows: ops.bank_attention(q, rows, table, H, sizes=table + 1),
        ),
        "memory_merge": ([x(B, T, N, C)], lambda bank: ops.memory_merge(bank, torch.ones(B, T, N, device=device))),
    }
    found = {name: OpCall(inputs, _with_gradients(run)) for name, (inputs, run) in calls.items()}
    frames = torch.randint(0, 256, (T, 9, 14, 3), dtype=torch.uint8, device=device)
    resize = lambda f: [ops.resize_normalize(f, (5, 8), crop=(0, 1, 5, 6), mean=(0.5,) * 3, dtype=dtype)]  # noqa: E731
    return found | {"resize_normalize": OpCall([frames], resize)} | _in_place(device, x)


def _in_place(device: str, x: Callable) -> dict[str, OpCall]:
    """On full memories."""
    active = torch.ones(B, dtype=torch.bool, device=device)

    def full():
        state = new_state(B, M, N, C, x(1).dtype, device, [8])
        for _ in range(M + 1):
            ops.memory_merge_(*state[:5], x(B, N, C, grad=False), state.attached, [x(B, N, 8, grad=False)])
        return [*state[:5], *state.attached]

    def merge(*inputs):
        state, attached, frame, rows = inputs[:5], inputs[5], *inputs[6:]
        return [ops.memory_merge_(*state, frame, [attached], [rows], active=active), *state, attached]

    def scan(*inputs):
        state, attached, frames, rows = inputs[:5], inputs[5], *inputs[6:]
        plan = ops.memory_scan_(*state, frames, active=active)
        return [*plan, ops.memory_replay_(attached, rows, plan, state[2]), *state, attached]

    return {
        "memory_merge_": OpCall([*full(), x(B, N, C, grad=False), x(B, N, 8, grad=False)], merge),
        "memory_scan_": OpCall([*full(), x(B, T, N, C, grad=False), x(B, T, N, 8, grad=False)], scan),
    }


def _with_gradients(run: Callable) -> Callable:
    def both(*inputs):
        outputs = [t for t in tree_leaves(run(*inputs)) if isinstance(t, Tensor)]
        wanted = [t for t in inputs if t.requires_grad]
        differentiable = [t for t in outputs if t.requires_grad]
        gradients = torch.autograd.grad(differentiable, wanted, [torch.ones_like(t) for t in differentiable])
        return [t.detach() for t in (*outputs, *gradients)]

    return both
