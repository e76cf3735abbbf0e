"""Where the attentions of a Q-Former read in MA-LMM (arXiv:2404.05726, section 3.2): the frame, or memories and frame.

At frame t, cross-attention reads the visual bank and the frame, self-attention of layer i reads that layer's query bank
and its own rows. Keys and values are affine in the rows of a bank and the weights of a merge sum to 1: so those of the
banks are kept beside them and merged as they are, and only the newest frame is ever projected.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pyvidx.layers.linear import dense, dense_rows
from pyvidx.memory.qformer import Prompt, QFormer, attention
from pyvidx.ops.bank_attention import bank_attention
from pyvidx.ops.memory_merge import MemoryState, memory_merge_, rows_in_order, takes_frame
from pyvidx.ops.memory_scan import MergePlan, memory_replay_, memory_scan_


class Memories(NamedTuple):
    """All that MA-LMM remembers of B videos, R = B * G questions. A value: who holds it holds the whole state.

    Attributes:
        seen: frames so far.
        length: M of both banks.
        prompt: the questions; None: none were given, as they may be where there is no query bank.
        visual: the visual bank, N = P positions of width C, with the keys and values of all cross-attentions [..., 2D]
            attached where there is a query bank. None: switched off.
        query: the query bank of every layer, with its keys and values [..., 2D]. None for a layer whose input is the
            same at every frame (see Prompt). Empty: switched off.
        frame: [B, P, C], the newest frame, where there is no visual bank.
        rows: [R, N, D], what enters the last layer at the newest frame, where there is a query bank.
    """

    seen: int
    length: int
    prompt: Prompt | None
    visual: MemoryState | None
    query: tuple[MemoryState | None, ...]
    frame: Tensor | None = None
    rows: Tensor | None = None

    @property
    def stored(self) -> int:
        """Entries that the newest frame attends to, itself among them."""
        return min(self.seen, self.length + 1)

    def clone(self) -> "Memories":
        """A copy that shares no memory with this one: two continuations of one stream."""

        def copy(m: MemoryState | None) -> MemoryState | None:
            return m and MemoryState(*(x.clone() for x in m[:5]), tuple(x.clone() for x in m.attached))

        return self._replace(visual=copy(self.visual), query=tuple(copy(m) for m in self.query))


def slots(rows: Tensor, stored: int) -> Tensor:
    """The filled slots of a bank or what is attached to it, [B, M+1, N, W] -> [B, stored * N, W], in any order."""
    return rows[:, :stored].flatten(1, 2)


def as_rows(x: Tensor, bank: Tensor) -> Tensor:
    """Frames [B, t, N, C] as the bank's op takes them: one alone is read as it is, where it can be."""
    return x if x.shape[1] == 1 and takes_frame(bank, x) else x.to(bank.dtype)


def entries_before(memory: MemoryState, stored: int, weighted: bool) -> Tensor:
    """What the next frame finds in a bank of `stored` entries, [B, n, N, C] with n <= M; the bank stays as it is."""
    M = memory.similarity.shape[2]
    if stored <= M:
        return memory.bank[:, :stored]
    copy = MemoryState(*(x.clone() for x in memory[:5]))
    memory_merge_(*copy[:5], weighted=weighted)
    return rows_in_order(copy.bank, copy.order, M)


class FrameSource:
    """What all sources share, and both attentions without memory.

    Args:
        frames: [B, t, P, C], with their temporal embedding; t consecutive frames.
        prompt: its mask is that of the self-attentions.
    """

    def __init__(self, qformer: QFormer, prompt: Prompt, frames: Tensor | None):
        self.qformer, self.prompt, self.frames = qformer, prompt, frames
        self.heads = qformer.config.heads
        self.dropout = qformer.config.dropout if qformer.training else 0.0

    def self_attention(self, i: int, x: Tensor, qkv: Tensor) -> Tensor:
        t, D = x.shape[1], x.shape[3]
        mask = None if self.prompt.mask is None else self.prompt.mask.repeat_interleave(t, dim=0)
        rows = qkv.flatten(0, 1)  # [R * t, N, 3D]
        return self.attend(rows[..., :D], rows[..., D:], mask).unflatten(0, (-1, t))

    def cross_attention(self, i: int, q: Tensor) -> Tensor:
        q = self.by_video(q)
        y = self.attend(q.flatten(0, 1), self.qformer.cross_keys_values(i, self.frames).flatten(0, 1))
        return self.by_question(y.view(q.shape))

    def attend(self, q: Tensor, keys_values: Tensor, mask: Tensor | None = None) -> Tensor:
        return attention(q, keys_values, self.heads, mask, self.dropout)

    def attend_entries(self, q: Tensor, keys_values: Tensor, N: int) -> Tensor:
        """q [R, any, D] over keys_values [R, n * N, 2D], n entries of N rows each, padding rows left out."""
        mask, n = self.prompt.mask, keys_values.shape[1] // N
        return self.attend(q, keys_values, None if mask is None else mask.repeat(1, n))

    def by_video(self, q: Tensor) -> Tensor:
        """[R, t, Q, D] -> [B, t, G * Q, D]: the questions about a video read the same frames."""
        return q.unflatten(0, (self.prompt.batch, -1)).transpose(1, 2).flatten(2, 3)

    def by_question(self, y: Tensor) -> Tensor:
        """[B, t, G * Q, D] -> [R, t, Q, D]."""
        return y.unflatten(2, (-1, self.qformer.config.queries)).transpose(1, 2).flatten(0, 1)


class PushSource(FrameSource):
    """Writes t frames into the memories, and reads at each what was there then.

    One frame is merged in place and its slots are read as they lie. Of t > 1 frames each bank's merges are planned in
    one scan; what is attached to it is replayed by that plan into one list, in which every frame reads the rows that
    its table names: layer by layer over all frames, so that each projection is one GEMM for all of them.
    """

    def __init__(self, qformer: QFormer, memories: Memories, frames: Tensor, weighted: bool):
        super().__init__(qformer, memories.prompt, frames)
        self.memories, self.weighted = memories, weighted
        self.lists: dict[tuple[int, ...], Tensor] = {}
        visual = memories.visual
        if visual is None:
            return
        rows, kv = as_rows(frames, visual.bank), ()
        if frames.shape[1] > 1:
            self.plan = memory_scan_(*visual[:5], rows, weighted=weighted)  # the bank depends on the frames alone
            return
        if visual.attached:
            kv = dense(frames[:, 0].to(qformer.query_tokens.dtype), qformer.keys_values)
            kv = kv.to(visual.attached[0].dtype).chunk(len(visual.attached), dim=2)
        memory_merge_(*visual[:5], rows[:, 0], visual.attached, kv, weighted=weighted)

    def self_attention(self, i: int, x: Tensor, qkv: Tensor) -> Tensor:
        if not self.memories.query:
            return super().self_attention(i, x, qkv)
        D = x.shape[3]
        return self.read(qkv[..., :D], *self.remember(i, x, qkv[..., D:]), self.prompt.mask)

    def cross_attention(self, i: int, q: Tensor) -> Tensor:
        visual = self.memories.visual
        if visual is None:
            return super().cross_attention(i, q)
        return self.by_question(self.read(self.by_video(q), *self.replayed(i)))

    def remember(self, i: int, x: Tensor, keys_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Push layer i's rows x [R, t, N, D] into its query bank, with keys and values [R, t, N, 2D] -> see `read`."""
        memory = self.memories.query[i]
        (kept,), rows = memory.attached, as_rows(x, memory.bank)
        kv = keys_values.to(kept.dtype)  # they differ in autocast
        if x.shape[1] == 1:
            memory_merge_(*memory[:5], rows[:, 0], memory.attached, (kv[:, 0],), weighted=self.weighted)
            return kept, None
        plan = memory_scan_(*memory[:5], rows, weighted=self.weighted)
        return self._replay(kept, kv, plan, memory.order), plan.table

    def replayed(self, i: int) -> tuple[Tensor, Tensor | None]:
        """The same of the frames' keys and values in layer i's cross-attention; the visual bank is advanced already."""
        visual = self.memories.visual
        kept = visual.attached[self.qformer.config.cross_layers.index(i)]
        if self.frames.shape[1] == 1:
            return kept, None
        kv = self.qformer.cross_keys_values(i, self.frames).to(kept.dtype)
        return self._replay(kept, kv, self.plan, visual.order), self.plan.table

    def remember_last(self, x: Tensor) -> Tensor:
        """Both of the last layer, whose output nobody needs before an answer is asked for. Returns x."""
        i, D = len(self.memories.query) - 1, x.shape[3]
        if self.memories.visual is not None and i in self.qformer.config.cross_layers:
            self.replayed(i)
        if self.memories.query[i] is not None:
            self.remember(i, x, dense_rows(x, self.qformer.layers[i].qkv, slice(D, None)))
        return x

    def read(self, q: Tensor, rows: Tensor, table: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """q [b, t, n, D] over rows [b, S, N, 2D] by table [b, t, N, M+1]; None: slots, all that are filled."""
        if not self.dropout:
            return bank_attention(
                q, rows[:, : self._stored(0)] if table is None else rows, table, self.heads, mask=mask
            )
        steps = []
        for s in range(q.shape[1]):
            kept = rows[:, : self._stored(0)] if table is None else rows_in_order(rows, table[:, s], self._stored(s))
            padding = None if mask is None else mask.repeat(1, kept.shape[1])
            steps.append(self.attend(q[:, s], kept.flatten(1, 2), padding))
        return torch.stack(steps, dim=1)

    def _replay(self, kept: Tensor, kv: Tensor, plan: MergePlan, order: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # it plans its memory, and a size that is a key is a size fixed
            return memory_replay_(kept, kv, plan, order, weighted=self.weighted)
        # One list for all layers of a shape: they are read in turn, and new memory costs a page fault per 4 KB.
        B, slots, *rows = kept.shape
        shape = (B, slots + 2 * kv.shape[1], *rows)
        if shape not in self.lists:
            self.lists[shape] = kept.new_empty(shape)
        return memory_replay_(kept, kv, plan, order, weighted=self.weighted, out=self.lists[shape])

    def _stored(self, s: int) -> int:
        """Entries at frame s of these, itself among them."""
        return self.memories._replace(seen=self.memories.seen + s + 1).stored


class ReadSource(FrameSource):
    """Reads the memories as the newest frame does, once more; changes nothing."""

    def __init__(self, qformer: QFormer, memories: Memories, prompt: Prompt):
        super().__init__(qformer, prompt, None if memories.frame is None else memories.frame[:, None])
        self.memories = memories

    def remembered(self, i: int, q: Tensor) -> Tensor:
        kept = slots(self.memories.query[i].attached[0], self.memories.stored)
        return self.attend_entries(q, kept, self.prompt.rows.shape[1])

    def cross_attention(self, i: int, q: Tensor) -> Tensor:
        visual, stored = self.memories.visual, self.memories.stored
        if visual is None:
            return super().cross_attention(i, q)
        if visual.attached:
            kv = slots(visual.attached[self.qformer.config.cross_layers.index(i)], stored)
        else:
            kv = self.qformer.cross_keys_values(i, slots(visual.bank, stored))
        return self.by_question(self.attend(self.by_video(q)[:, 0], kv)[:, None])


class LastSource(FrameSource):
    """The frame after those remembered, with gradients: to itself and to every projection, the banks' included.

    As in the public code, the banks' rows are constants, but their keys and values are worked out here and now.
    """

    def __init__(self, qformer: QFormer, memories: Memories, frame: Tensor, weighted: bool):
        super().__init__(qformer, memories.prompt, frame[:, None])
        self.memories, self.weighted = memories, weighted
        visual = memories.visual
        self.visual = frame
        if visual is not None and memories.seen:
            entries = entries_before(visual, memories.stored, weighted)
            self.visual = torch.cat([entries.flatten(1, 2).to(frame.dtype), frame], dim=1)

    def self_attention(self, i: int, x: Tensor, qkv: Tensor) -> Tensor:
        memories, D = self.memories, x.shape[3]
        if not (memories.query and memories.seen):
            return super().self_attention(i, x, qkv)
        memory = memories.query[i]
        if memory is None:  # a bank of copies of this frame's rows
            entries = x.detach().expand(-1, min(memories.seen, memories.length), -1, -1)
        else:
            entries = entries_before(memory, memories.stored, self.weighted).to(x.dtype)
        stored = dense_rows(entries.flatten(1, 2), self.qformer.layers[i].qkv, slice(D, None))
        qkv = qkv[:, 0]
        return self.attend_entries(qkv[..., :D], torch.cat([stored, qkv[..., D:]], dim=1), x.shape[2])[:, None]

    def cross_attention(self, i: int, q: Tensor) -> Tensor:
        y = self.attend(self.by_video(q)[:, 0], self.qformer.cross_keys_values(i, self.visual))
        return self.by_question(y[:, None])
