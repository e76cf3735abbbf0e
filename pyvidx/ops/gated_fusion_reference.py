"""gated_fusion in plain torch: what the kernels compute, and what runs where there is no kernel."""

import torch
import torch.nn.functional as F

from pyvidx.ops._library import require_index
from pyvidx.ops.token_gather import flat_index


def source_rows(x, keep, pair):
    """The patch tokens [B, S, K, C] that x [B, T, 1 + P, C] puts into the branch."""
    patches = x[:, :, 1:]
    if pair:
        patches = patches.unflatten(1, (-1, 2)).mean(2)
    return patches if keep is None else gather(patches, keep)


def gather(rows, keep):
    B, T, P, C = rows.shape
    require_index("gated_fusion: keep must be", keep, P if keep.dim() == 2 else T * P)
    index = flat_index(keep, B, T, P)
    flat = rows.reshape(B, T * P, C).gather(1, index.flatten(1)[..., None].expand(-1, -1, C))
    return flat.reshape(B, *index.shape[1:], C)


def mix(z, x, gate, scale):
    if gate is None:
        return z + x
    w = torch.sigmoid(scale * gate)
    return (1 - w) * z + w * x


def layer_norm(rows, weight, bias, eps):
    """LayerNorm(rows) and its statistics [..., 2]: mean and 1 / std, in float32 or wider."""
    if weight is None:
        return rows.new_empty(0), rows.new_empty(0)
    wide = rows.double() if rows.dtype == torch.float64 else rows.float()
    mean = wide.mean(-1, keepdim=True)
    rstd = ((wide - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    return F.layer_norm(rows, rows.shape[-1:], weight, bias, eps), torch.cat([mean, rstd], dim=-1)


def fuse(x, z, cls, gate, position, time, keep, weight, bias, scale, eps, pair):
    if cls is None:
        z, cls = z[:, :, 1:], z[:, 0, 0]
    rows, mean = source_rows(x, None if z is None else keep, pair), x[:, :, 0].mean(1)
    if z is None:
        out = rows + position[1:] + time[: rows.shape[1], None]
        out = out if keep is None else gather(out, keep)
        out_cls = (mean + cls + position[0]) / 2
    else:
        out, out_cls = mix(z, rows, gate, scale), mix(cls, mean, gate, scale)
    return out, out_cls, *layer_norm(out, weight, bias, eps)


def fuse_out(x, z, cls, gate, position, time, keep, weight, bias, scale, eps, pair, out, out_cls, normed):
    results = fuse(x, z, cls, gate, position, time, keep, weight, bias, scale, eps, pair)
    for target, result in zip((out, out_cls, normed), results):
        if target is not None:
            target.copy_(result)


def output(x_cls, cls, gate, weight, bias, scale, eps):
    rows = mix(cls[:, None].expand_as(x_cls), x_cls, gate, scale)
    normed, stats = layer_norm(rows, weight, bias, eps)
    return (rows if weight is None else normed), stats[:, None] if stats.dim() == 3 else stats


def output_out(x_cls, cls, gate, weight, bias, scale, eps, out):
    out.copy_(output(x_cls, cls, gate, weight, bias, scale, eps)[0])


def row_gradients(grad, grad_normed, rows, weight, stats):
    """The whole gradient that reaches rows [..., C], and those of the norm's weight and bias."""
    if grad_normed is None:
        return grad, *(grad.new_empty(0),) * 2
    wide = stats.dtype
    normal = (rows.to(wide) - stats[..., :1]) * stats[..., 1:]
    g, every_row = grad_normed.to(wide) * weight.to(wide), tuple(range(rows.dim() - 1))
    total = (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True)) * stats[..., 1:]
    total = total if grad is None else total + grad.to(wide)
    grad_weight, grad_bias = (grad_normed.to(wide) * normal).sum(every_row), grad_normed.to(wide).sum(every_row)
    return total, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def gate_gradient(gate, scale, *terms):
    """terms: (gradient, x, z) of everything the gate mixed."""
    if gate is None:
        return None
    logit = scale * gate.to(terms[0][0].dtype)
    slope = scale * torch.sigmoid(logit) * torch.sigmoid(-logit)
    return (sum((g * (x - z)).reshape(-1, gate.shape[0]).sum(0) for g, x, z in terms) * slope).to(gate.dtype)


def fuse_backward(
    grad_out, grad_out_cls, grad_normed, value, x, z, cls, gate, keep, source, weight, stats, T, P, scale, pair, first,
    packed, need_x, need_z, need_gate,
):  # fmt: skip
    like = grad_out if grad_normed is None else grad_normed
    B, C = grad_out_cls.shape
    if packed and z is not None:
        z, cls = z[:, :, 1:], z[:, 0, 0]
    rows_x = None if x is None else source_rows(x, keep, pair)
    rows = mix(z, rows_x, gate, scale) if value is None and z is not None else value
    g, grad_weight, grad_bias = row_gradients(grad_out, grad_normed, rows, weight, stats)
    g_cls = grad_out_cls / 2 if first else grad_out_cls
    w = None if gate is None else torch.sigmoid(scale * gate)
    nothing = like.new_empty(0)
    grad_x = grad_gate = nothing
    if need_x:
        to_x, to_cls = (g, g_cls) if w is None else (w * g, w * g_cls)
        if keep is not None:
            require_index("gated_fusion_backward: source must be", source, to_x.shape[1] * to_x.shape[2], absent=True)
            flat = torch.cat([to_x.flatten(1, 2), to_x.new_zeros(B, 1, C)], dim=1)
            index = torch.where(source < 0, flat.shape[1] - 1, source).flatten(1)[..., None]
            to_x = flat.gather(1, index.expand(-1, -1, C)).reshape(*source.shape, C)
        if pair:
            to_x = to_x.repeat_interleave(2, dim=1) / 2
        grad_x = torch.cat([(to_cls / T)[:, None, None].expand(B, T, 1, C), to_x], dim=2).to(like.dtype)
    if need_gate:
        grad_gate = gate_gradient(gate, scale, (g, rows_x, z), (g_cls, x[:, :, 0].mean(1), cls))
    grad_z = (g if w is None else (1 - w) * g).to(like.dtype) if need_z else nothing
    grad_cls = g_cls * 1 if w is None else (1 - w) * g_cls
    if packed and need_z:
        front = torch.cat([grad_cls[:, None], grad_cls.new_zeros(B, grad_z.shape[1] - 1, C)], dim=1)
        grad_z, grad_cls = torch.cat([front[:, :, None], grad_z], dim=2), nothing
    return grad_x, grad_z.clone() if grad_z is grad_out else grad_z, grad_cls, grad_gate, grad_weight, grad_bias


def output_backward(grad, x_cls, cls, gate, weight, stats, scale, need_gate):
    z = cls[:, None].expand_as(x_cls)
    norm, plain = (grad, None) if weight is not None else (None, grad)
    rows = None if weight is None else mix(z, x_cls, gate, scale)
    g, grad_weight, grad_bias = row_gradients(plain, norm, rows, weight, None if stats is None else stats[:, 0])
    w = None if gate is None else torch.sigmoid(scale * gate)
    to_x, to_z = (g, g) if w is None else (w * g, (1 - w) * g)
    grad_gate = gate_gradient(gate, scale, (g, x_cls, z)) if need_gate else grad.new_empty(0)
    return to_x.to(grad.dtype).clone(), to_z.to(grad.dtype).clone(), grad_gate, grad_weight, grad_bias
