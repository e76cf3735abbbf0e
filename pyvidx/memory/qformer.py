"""The Q-Former (BLIP-2, arXiv:2301.12597; with instructions InstructBLIP, arXiv:2305.06500) that MA-LMM drives.

It keeps nothing between frames: where its attentions read their keys and values from is said by the `source` that is
handed in, see pyvidx.memory.sources.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvidx.backbones.text import check_ids
from pyvidx.layers.linear import dense, dense_rows
from pyvidx.layers.norm import KERNELS, add_norm, foldable
from pyvidx.layers.plain import held, plain, untouched
from pyvidx.ops._library import require_tensors
from pyvidx.ops.residual_norm import add_norm as one_pass
from pyvidx.sizes import check


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes of a Q-Former; the defaults are the published ones.

    Attributes:
        width, heads, layers, mlp_width: D, H, number of layers, width of the feed-forward paths.
        queries: Q, rows of query tokens.
        cross_every: layers 0, cross_every, 2 * cross_every, ... attend to the frames.
        encoder_width: C of the frames' features.
        vocab, text_length: of the instruction's word and position tables; vocab None: no text, as in BLIP-2.
        eps: of every LayerNorm.
        dropout: in training mode, of attention weights and hidden states.
    """

    width: int = 768
    heads: int = 12
    layers: int = 12
    mlp_width: int = 3072
    queries: int = 32
    cross_every: int = 2
    encoder_width: int = 1408
    vocab: int | None = 30523
    text_length: int = 512
    eps: float = 1e-12
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check(self)
        if self.width % self.heads:
            raise ValueError(f"QFormerConfig: width must be a multiple of heads, got {self.width} and {self.heads}")

    @property
    def cross_layers(self) -> range:
        """Indices of the layers with cross-attention."""
        return range(0, self.layers, self.cross_every)


class Prompt(NamedTuple):
    """The instructions of a batch, and what of the Q-Former depends on them alone. Made by QFormer.prompt.

    R = B * G: B videos with G questions each. All frames see the same rows enter layer 0, and attention over copies of
    one set of keys is attention over that set: so in eval mode layer 0 is the same at every frame up to the cross-
    attention's queries, and its text rows up to the end. Those are kept here.
    """

    rows: Tensor  # [R, N, D]      input of layer 0, N = Q + L
    mask: Tensor | None  # [R, N]         True: attend to; None: no padding
    groups: int | None  # G; None: the caller gave no axis for it
    attended: Tensor | None = None  # [R, N, D]      after layer 0's self-attention; None with dropout
    probe: Tensor | None = None  # [R, Q, D]      layer 0's cross-attention queries
    text: Tensor | None = None  # [R, L, D]      text rows after layer 0

    @property
    def batch(self) -> int:
        """B, videos."""
        return self.rows.shape[0] // (self.groups or 1)


class Source(Protocol):
    """Where attention reads. x, q and qkv have a row axis R, an axis t of consecutive frames, and tokens."""

    def self_attention(self, i: int, x: Tensor, qkv: Tensor) -> Tensor:
        """Layer i's input x [R, t, N, D] and its projections qkv [R, t, N, 3D] -> attention [R, t, N, D]."""

    def cross_attention(self, i: int, q: Tensor) -> Tensor:
        """Layer i's queries [R, t, Q, D] over the frames -> [R, t, Q, D]."""

    def remembered(self, i: int, q: Tensor) -> Tensor:
        """Layer i's projected query rows [R, Q, D] over what it remembers -> [R, Q, D]."""


class CrossAttention(nn.Module):
    """LN(x + W attention(Wq x)); the keys and values of all layers are one matrix of QFormer."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.query = nn.Linear(config.width, config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)


class FeedForward(nn.Module):
    """LN(x + W2 gelu(W1 x))."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.dropout = config.dropout
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(dense(F.gelu(dense(x, self.fc1)), self.fc2), self.dropout, self.training)
        return add_norm(x, y, self.norm)[1]


class QFormerLayer(nn.Module):
    """Self-attention of all rows; cross-attention of the query rows, if this layer has it; two feed-forward paths."""

    def __init__(self, config: QFormerConfig, index: int):
        super().__init__()
        self.index, self.queries, self.dropout = index, config.queries, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.cross = CrossAttention(config) if index in config.cross_layers else None
        self.feed_query = FeedForward(config)
        self.feed_text = FeedForward(config) if config.vocab is not None else None

    def forward(self, x: Tensor, source: Source, with_text: bool = True) -> Tensor:
        """x [R, t, N, D] -> [R, t, N, D], or the query rows alone, [R, t, Q, D]."""
        x = self.attend(x, source)
        query = self.cross_rows(x[:, :, : self.queries], source)
        text = x[:, :, self.queries :]
        if not (with_text and text.shape[2]):
            return self.feed_query(query)
        if _joins(x, self.feed_query, self.feed_text):
            return _feed_both(query, text, self.feed_query, self.feed_text)
        return torch.cat([self.feed_query(query), self.feed_text(text)], dim=2)

    def attend(self, x: Tensor, source: Source) -> Tensor:
        """The self-attention half. [R, t, N, D] -> [R, t, N, D]."""
        y = dense(source.self_attention(self.index, x, dense(x, self.qkv)), self.out)
        return add_norm(x, self._drop(y), self.norm)[1]

    def query_rows(self, x: Tensor, source: Source, probe: Tensor | None = None) -> Tensor:
        """What follows it for the query rows [R, t, Q, D]. probe: cross.query(x), where it is known."""
        return self.feed_query(self.cross_rows(x, source, probe))

    def cross_rows(self, x: Tensor, source: Source, probe: Tensor | None = None) -> Tensor:
        """The cross-attention half, if this layer has it. [R, t, Q, D] -> [R, t, Q, D]."""
        if self.cross is None:
            return x
        q = dense(x, self.cross.query) if probe is None else probe
        y = dense(source.cross_attention(self.index, q), self.cross.out)
        return add_norm(x, self._drop(y), self.cross.norm)[1]

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def _joins(x: Tensor, *paths: FeedForward) -> bool:
    """Both paths of one frame of one question on a GPU, whose time is that of its launches: rows of one matrix can be
    written apart there, and nothing has to be put together."""
    if not x.is_cuda or x.shape[:2].numel() != 1 or "cuda" not in KERNELS or torch.compiler.is_compiling():
        return False
    layers = [layer for path in paths for layer in (path.fc1, path.fc2, path.norm)]
    known = all(plain(layer) and layer.bias is not None and layer.weight.dtype == x.dtype for layer in layers)
    busy = torch.is_grad_enabled() or torch.is_autocast_enabled("cuda") or any(p.training and p.dropout for p in paths)
    return known and not busy and all(untouched(path) for path in paths)


def _feed_both(query: Tensor, text: Tensor, feed_query: FeedForward, feed_text: FeedForward) -> Tensor:
    """[feed_query(query); feed_text(text)] of [1, 1, Q, D] and [1, 1, L, D]: 7 launches in place of 9."""
    Q, N, D = query.shape[2], query.shape[2] + text.shape[2], query.shape[3]
    parts = ((feed_query, query, slice(Q)), (feed_text, text, slice(Q, N)))
    hidden, y, out = query.new_empty(N, feed_query.fc1.out_features), query.new_empty(N, D), query.new_empty(1, 1, N, D)
    for feed, x, rows in parts:
        torch.addmm(feed.fc1.bias, x[0, 0], feed.fc1.weight.t(), out=hidden[rows])
    hidden = F.gelu(hidden)
    for feed, x, rows in parts:
        torch.addmm(feed.fc2.bias, hidden[rows], feed.fc2.weight.t(), out=y[rows])
        one_pass(x, y[None, None, rows], foldable(feed.norm, x), (y[None, None, rows], out[:, :, rows]))
    return out


class QFormer(nn.Module):
    """Query tokens, text embedding and layers, and one matrix for the keys and values of every cross-attention."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        D = config.width
        self.query_tokens = nn.Parameter(torch.randn(config.queries, D) * 0.02)
        if config.vocab is not None:
            self.word = nn.Parameter(torch.randn(config.vocab, D) * 0.02)
            self.position = nn.Parameter(torch.randn(config.text_length, D) * 0.02)
        self.norm = nn.LayerNorm(D, eps=config.eps)
        self.layers = nn.ModuleList(QFormerLayer(config, i) for i in range(config.layers))
        # Rows: layer, then key or value, then heads. One GEMM projects a frame for all layers.
        self.keys_values = nn.Linear(config.encoder_width, len(config.cross_layers) * 2 * D)

    def embed(self, text_ids: Tensor | None, batch: int) -> Tensor:
        """LN([query tokens; words + positions]) of text_ids [R, L] or of no text -> [R or batch, N, D]."""
        queries = held(self, "query_tokens")
        if text_ids is None:
            return self.norm(queries).expand(batch, -1, -1)
        text = F.embedding(text_ids, held(self, "word")) + held(self, "position")[: text_ids.shape[1]]
        return self.norm(torch.cat([queries.expand(text.shape[0], -1, -1), text], dim=1))

    def prompt(self, text_ids: Tensor | None = None, text_mask: Tensor | None = None, batch: int = 1) -> Prompt:
        """Embed the instructions of a batch.

        Args:
            text_ids: int [B, L] wordpieces, one instruction per video, or [B, G, L], G questions about each; None: no
                text.
            text_mask: like text_ids, 0 or False = padding; None: no padding.
            batch: B, where there is no text.

        Raises:
            ValueError: the text does not fit the model.
        """
        groups = self._check_text(text_ids, text_mask)
        ids = None if text_ids is None else text_ids.flatten(0, -2)
        rows, mask = self.embed(ids, batch), None
        if text_mask is not None and not bool((text_mask != 0).all()):  # padding costs a masked attention everywhere
            mask = F.pad(text_mask.flatten(0, -2) != 0, (self.config.queries, 0), value=True)
        prompt = Prompt(rows, mask, groups)
        if self.dropping:
            return prompt
        first = self.layers[0]
        qkv, D = dense(rows, first.qkv), self.config.width
        y = attention(qkv[..., :D], qkv[..., D:], self.config.heads, mask)
        attended = add_norm(rows, dense(y, first.out), first.norm)[1]
        query, text = attended.split([self.config.queries, rows.shape[1] - self.config.queries], dim=1)
        return prompt._replace(
            attended=attended,
            probe=dense(query, first.cross.query),
            text=first.feed_text(text) if text.shape[1] else text,
        )

    @property
    def dropping(self) -> bool:
        """Dropout is on: no two frames see the same rows."""
        return self.training and self.config.dropout > 0

    def run(self, prompt: Prompt, t: int, source: Source, *, constants: bool = True, with_last: bool = True) -> Tensor:
        """The Q-Former over t consecutive frames, layer by layer.

        Args:
            source: where attention reads.
            constants: use what the prompt knows of layer 0. A source that has gradients flow back through the banks'
                share of layer 0 needs that layer worked out.
            with_last: False: stop before the last layer.

        Returns:
            the query rows [R, t, Q, D]; without the last layer, all rows [R, t, N, D], its input.
        """
        layers = self.layers if with_last else self.layers[:-1]
        x = prompt.rows[:, None].expand(-1, t, -1, -1)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer in layers:
            with_text = layer.index < self.config.layers - 1
            if layer.index == 0 and constants and prompt.attended is not None:
                x = self._first(prompt, t, source, with_text)
            else:
                x = layer(x, source, with_text)
        return x

    def finish(self, prompt: Prompt, x: Tensor, source: Source) -> Tensor:
        """The last layer for the query rows alone, where its keys and values are remembered already.

        x: [R, N, D], its input at the newest frame -> [R, Q, D].
        """
        layer, D = self.layers[-1], self.config.width
        if layer.index == 0 and prompt.attended is not None:
            return self._first(prompt, 1, source, with_text=False)[:, 0]
        x = x[:, : self.config.queries]
        y = source.remembered(layer.index, dense_rows(x, layer.qkv, slice(D)))
        y = F.dropout(dense(y, layer.out), self.config.dropout, self.training)
        x = add_norm(x, y, layer.norm)[1]
        return layer.query_rows(x[:, None], source)[:, 0]

    def _first(self, prompt: Prompt, t: int, source: Source, with_text: bool) -> Tensor:
        over_time = lambda y: y[:, None].expand(-1, t, -1, -1)  # noqa: E731
        attended = prompt.attended[:, : self.config.queries]
        x = self.layers[0].query_rows(over_time(attended), source, over_time(prompt.probe))
        return torch.cat([x, over_time(prompt.text)], dim=2) if with_text else x

    def cross_keys_values(self, i: int, rows: Tensor) -> Tensor:
        """Keys and values of layer i's cross-attention. rows [..., C], cast to the model's dtype -> [..., 2D]."""
        j, D = self.config.cross_layers.index(i), self.config.width
        return dense_rows(rows.to(self.query_tokens.dtype), self.keys_values, slice(j * 2 * D, (j + 1) * 2 * D))

    def _check_text(self, ids: Tensor | None, mask: Tensor | None) -> int | None:
        """G, or None where the text has no axis for it."""
        if ids is None:
            if mask is not None:
                raise ValueError("QFormer: text_mask needs text_ids")
            return None
        if self.config.vocab is None:
            raise ValueError("QFormer: these weights have no text embedding (BLIP-2); give no text_ids")
        require_tensors("QFormer", text_ids=ids, text_mask=mask)
        if ids.dim() not in (2, 3) or ids.is_floating_point() or not 1 <= ids.shape[-1] <= self.config.text_length:
            raise ValueError(
                f"QFormer: text_ids must be int [B, L] or [B, G, L], L from 1 to {self.config.text_length}, "
                f"got {tuple(ids.shape)} {ids.dtype}"
            )
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"QFormer: text_mask must be like text_ids {tuple(ids.shape)}, got {tuple(mask.shape)}")
        check_ids("QFormer", "text_ids", ids, self.config.vocab)
        return ids.shape[1] if ids.dim() == 3 else None


def attention(
    q: Tensor, keys_values: Tensor, heads: int, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:  # [R, n, D]
    """softmax(q k^T / sqrt(D / H)) v.

    q [R, n, D]; keys_values [R, S, 2D], keys before values, any strides but the last; mask bool [R, S], False = not
    attended to.
    """
    R, S, width = keys_values.shape
    D = width // 2
    q = q.unflatten(2, (heads, D // heads)).transpose(1, 2)  # [R, H, n, D / H]
    k, v = keys_values.unflatten(2, (2, heads, D // heads)).permute(2, 0, 3, 1, 4)  # [R, H, S, D / H] each
    mask = None if mask is None else mask[:, None, None].expand(-1, 1, q.shape[2], -1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return y.transpose(1, 2).flatten(2)
