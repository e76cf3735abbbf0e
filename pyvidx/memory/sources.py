"""Where the attentions of a Q-Former read in MA-LMM (arXiv:2404.05726, section 3.2): the frame, or memories and frame.

At frame t, cross-attention reads the visual bank and the frame, self-attention of layer i reads that layer's query bank
and its own rows. Keys and values are affine in the rows of a bank and the weights of a merge sum to 1: so those of the
banks are kept beside them and merged as they are, and only the newest frame is ever projected.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvidx.memory.qformer import Prompt, QFormer, attention
from pyvidx.ops.memory_merge import MemoryState, memory_merge_, rows_in_order
from pyvidx.ops.memory_scan import memory_scan_


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

        def copy(m):
            return m and MemoryState(*(x.clone() for x in m[:5]), tuple(x.clone() for x in m.attached))

        return self._replace(visual=copy(self.visual), query=tuple(copy(m) for m in self.query))


def slots(rows: Tensor, stored: int) -> Tensor:
    """The filled slots of a bank or what is attached to it, [B, M+1, N, W] -> [B, stored * N, W], in any order."""
    return rows[:, :stored].flatten(1, 2)


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
        y = self.attend(q.flatten(0, 1), self.project(i, self.frames).flatten(0, 1))
        return self.by_question(y.view(q.shape))

    def attend(self, q: Tensor, keys_values: Tensor, mask: Tensor | None = None) -> Tensor:
        return attention(q, keys_values, self.heads, mask, self.dropout)

    def attend_entries(self, q: Tensor, keys_values: Tensor, N: int) -> Tensor:
        """q [R, any, D] over keys_values [R, n * N, 2D], n entries of N rows each, padding rows left out."""
        mask, n = self.prompt.mask, keys_values.shape[1] // N
        return self.attend(q, keys_values, None if mask is None else mask.repeat(1, n))

    def project(self, i: int, rows: Tensor) -> Tensor:
        """Keys and values of layer i's cross-attention. [..., C] -> [..., 2D]."""
        weight, bias = self.qformer.cross_weights(i)
        return F.linear(rows.to(weight.dtype), weight, bias)

    def by_video(self, q: Tensor) -> Tensor:
        """[R, t, Q, D] -> [B, t, G * Q, D]: the questions about a video read the same frames."""
        return q.unflatten(0, (self.prompt.batch, -1)).transpose(1, 2).flatten(2, 3)

    def by_question(self, y: Tensor) -> Tensor:
        """[B, t, G * Q, D] -> [R, t, Q, D]."""
        return y.unflatten(2, (-1, self.qformer.config.queries)).transpose(1, 2).flatten(0, 1)


class PushSource(FrameSource):
    """Writes t frames into the memories, and reads at each what was there then.

    The visual bank depends on the frames alone: it is advanced first. Of t > 1 frames the merges are recorded, and
    every layer replays them on its own keys and values while it attends: layer by layer over all frames, so that each
    projection is one GEMM for all of them.
    """

    def __init__(self, qformer: QFormer, memories: Memories, frames: Tensor, weighted: bool):
        super().__init__(qformer, memories.prompt, frames)
        self.memories, self.weighted = memories, weighted
        visual, t = memories.visual, frames.shape[1]
        if visual is None:
            return
        rows = frames.to(visual.bank.dtype)
        if t == 1 and visual.attached:
            kv = qformer.keys_values(frames[:, 0].to(qformer.keys_values.weight.dtype))
            kvs = kv.to(visual.attached[0].dtype).chunk(len(visual.attached), dim=2)
            memory_merge_(*visual[:5], rows[:, 0], visual.attached, kvs, weighted=weighted)
            return
        self.before = tuple(x.clone() for x in (visual.sizes, visual.order, visual.length))
        M = visual.similarity.shape[2]
        entries = visual.order.where(torch.arange(M + 1, device=rows.device) < visual.length[:, None, None], -1)
        plan = memory_scan_(*visual[:5], rows, weighted=weighted)
        if not visual.attached:
            return
        entries = torch.cat([entries[:, None], plan.table[:, :-1]], dim=1)  # [B, t, P, M+1], before each step
        self.plan = (entries[..., :M] == plan.sources[..., :1]).transpose(0, 1).float()  # [t, B, P, M]

    def self_attention(self, i: int, x: Tensor, qkv: Tensor) -> Tensor:
        if not self.memories.query:
            return super().self_attention(i, x, qkv)
        (kept,), D, steps = self.memories.query[i].attached, x.shape[3], []
        for s in self.remember(i, x, qkv[..., D:]):
            steps.append(self.attend_entries(qkv[:, s, :, :D], slots(kept, self._stored(s)), x.shape[2]))
        return torch.stack(steps, dim=1)

    def remember(self, i: int, x: Tensor, keys_values: Tensor) -> Iterator[int]:
        """Push layer i's rows x [R, t, N, D] into its query bank, with keys and values [R, t, N, 2D]; each s, after."""
        memory = self.memories.query[i]
        rows, keys_values = x.to(memory.bank.dtype), keys_values.to(memory.attached[0].dtype)  # they differ in autocast
        for s in range(x.shape[1]):
            memory_merge_(*memory[:5], rows[:, s], memory.attached, (keys_values[:, s],), weighted=self.weighted)
            yield s

    def remember_last(self, x: Tensor) -> Tensor:
        """The same of the last layer, whose output nobody needs before an answer is asked for. Returns x."""
        i, t, D = len(self.memories.query) - 1, x.shape[1], x.shape[3]
        if self.memories.visual is not None and i in self.qformer.config.cross_layers and t > 1:
            step = self._replay(i)
            for s in range(t):
                step(s)
        if self.memories.query[i] is not None:
            qkv = self.qformer.layers[i].qkv
            deque(self.remember(i, x, F.linear(x, qkv.weight[D:], qkv.bias[D:])), maxlen=0)
        return x

    def cross_attention(self, i: int, q: Tensor) -> Tensor:
        visual = self.memories.visual
        if visual is None:
            return super().cross_attention(i, q)
        attached, q = visual.attached[self.qformer.config.cross_layers.index(i)], self.by_video(q)
        step = self._replay(i) if q.shape[1] > 1 else lambda s: None
        steps = []
        for s in range(q.shape[1]):
            step(s)
            steps.append(self.attend(q[:, s], slots(attached, self._stored(s))))
        return self.by_question(torch.stack(steps, dim=1))

    def _replay(self, i: int) -> Callable[[int], None]:
        """A function of s that takes layer i's keys and values through the merge and the frame of step s.

        The op chooses by its cached similarities: the plan, put in their place, makes it choose as before.
        """
        attached = self.memories.visual.attached[self.qformer.config.cross_layers.index(i)]
        B, slots_, P, _ = attached.shape
        kv = self.project(i, self.frames).to(attached.dtype)  # [B, t, P, 2D]
        sizes, order, length = (x.clone() for x in self.before)
        chosen = torch.empty_like(self.plan[0])
        nothing, no_frame = attached.new_zeros(B, slots_, P, 1), attached.new_zeros(B, P, 1)

        def step(s: int) -> None:
            chosen.copy_(self.plan[s])
            frame = (no_frame, (attached,), (kv[:, s],))
            memory_merge_(nothing, sizes, order, chosen, length, *frame, weighted=self.weighted)

        return step

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
            kv = self.project(i, slots(visual.bank, stored))
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
        layer = self.qformer.layers[i].qkv
        stored = F.linear(entries.flatten(1, 2), layer.weight[D:], layer.bias[D:])
        qkv = qkv[:, 0]
        return self.attend_entries(qkv[..., :D], torch.cat([stored, qkv[..., D:]], dim=1), x.shape[2])[:, None]

    def cross_attention(self, i: int, q: Tensor) -> Tensor:
        y = self.attend(self.by_video(q)[:, 0], self.project(i, self.visual))
        return self.by_question(y[:, None])
