"""Self-attention from one projection of q, k and v, up to the output projection."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvidx.layers import products
from pyvidx.layers.linear import dense, linear
from pyvidx.ops import bank_attention
from pyvidx.ops._library import has_kernel
from pyvidx.ops.bank_attention import MAX_WIDTH

MOST = {torch.float32: 640, torch.float16: 128, torch.bfloat16: 128}  # tokens, on a CPU where MKL multiplies
KERNEL = has_kernel("bank_attention", "cpu")  # asked once: the compiler cannot see through the question


def self_attention(x: Tensor, layer: nn.Module, heads: int, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """x [rows, N, C], layer from C to 3C -> [rows, N, C].

    mask: bool, True = attended to, of a shape that broadcasts to [rows, H, N, N]; not together with causal.
    """
    (rows, N, C), qkv = x.shape, dense(x, layer)
    if mask is None and not causal and _fits_kernel(x, C // heads):
        # A memory of one slot with N positions.
        return bank_attention(qkv[:, None, :, :C], qkv[:, None, :, C:], None, heads).squeeze(1)
    q, k, v = (part.view(rows, N, heads, C // heads).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return y.transpose(1, 2).reshape(rows, N, C)


def _fits_kernel(x: Tensor, width: int) -> bool:
    """torch's attention on a CPU is products of single heads. Where MKL is slow, the kernel takes a half to four
    fifths of its time in float32 and less in 16 bits (but for bfloat16's gradients over 2,000 tokens: 1.1 of it).
    Elsewhere it pays on the lengths that MOST names.
    """
    fits = width % 8 == 0 and width <= MAX_WIDTH and x.dtype in MOST
    return KERNEL and x.is_cpu and fits and (products.MKL_IS_SLOW or x.shape[1] <= MOST[x.dtype])


def gather(query: Tensor, x: Tensor, layer: nn.Module, heads: int, mask: Tensor | None = None) -> Tensor:
    """What one query per head gathers of tokens: `gathered_values` makes the attention's result of it.

    With q = Wq query + bq the scores are x . (Wk^T q) up to a constant, and the values' sum is Wv (sum p x) + bv: the
    per-token work is two products with H vectors instead of two with C.

    Args:
        query: [..., C], of axes that broadcast with those of x. x: [..., N, C]. layer: from C to 3C, plain.
        mask: bool, True = attended to, of a shape that broadcasts to [..., N].

    Returns:
        [..., H, C], sum_n softmax(scores)_n x_n of every head.
    """
    C = x.shape[-1]
    q = linear(query, layer.weight[:C], None if layer.bias is None else layer.bias[:C]).unflatten(-1, (heads, -1))
    keys = layer.weight[C : 2 * C].view(heads, -1, C)
    probes = torch.einsum("...hd,hdc->...hc", q * q.shape[-1] ** -0.5, keys)
    scores = x @ probes.transpose(-1, -2)  # [..., N, H]
    if mask is not None:
        scores = scores.masked_fill(~mask[..., None], float("-inf"))
    return scores.softmax(dim=-2).transpose(-1, -2) @ x


def gathered_values(rows: Tensor, layer: nn.Module) -> Tensor:
    """The values of what `gather` gave, or of means of it. [..., H, C] -> [..., C]."""
    *_, H, C = rows.shape
    y = torch.einsum("...hc,hdc->...hd", rows, layer.weight[2 * C :].view(H, -1, C)).flatten(-2)
    return y if layer.bias is None else y + layer.bias[2 * C :]
