"""CUDA graphs: the launches of a forward or of a stream's step recorded once, and given to the GPU as one.

    encode = graphs.capture(model, pixels, outputs=("pooled",))     # a VideoEncoder, or any function of tensors
    pooled = encode(pixels).pooled

    step = graphs.capture(model.push, memories, features)           # a MALMM
    memories = step(memories, features)

    encode = graphs.Clips(model, lengths=(4, 8, 16))                # clips of any length, one graph for each of these
    encoding = encode(pixels)

A GPU takes some 260 launches of a BT-Adapter and 170 of a streamed frame of MA-LMM, each of which costs the CPU several
microseconds: often more than the GPU needs for the work. Where there is no CUDA there is nothing to record: the plain
function is called, `captured` is False and `why` says so.

What was recorded reads and writes the memory it had then. Weights may change in place; a model whose parameters are
replaced (`to`, `load_state_dict(assign=True)`) is captured again. Nothing has gradients. Work on several streams needs
several captures.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from pyvidx.memory.sources import Memories
from pyvidx.models import MALMM, Encoding, VideoEncoder
from pyvidx.sizes import check_counts
from pyvidx.temporal.frames import check_frame_mask, masks_unread

PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))
WARM_UP = 3  # calls before the recording: libraries choose their algorithms and ask for their memory in them


def why_plain(example: Any) -> str | None:
    """Why a call with such arguments cannot be recorded; None: it can."""
    devices = sorted({str(x.device) for x in pytree.tree_leaves(example) if isinstance(x, Tensor)})
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    if not devices:
        return "there are no tensors among the arguments"
    return None if len(devices) == 1 and devices[0].startswith("cuda") else f"the tensors are on {', '.join(devices)}"


def _on(example: Any) -> AbstractContextManager[Any]:
    """On the GPU of the tensors, which need not be the current one."""
    device = next(x.device for x in pytree.tree_leaves(example) if isinstance(x, Tensor))
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _check_leaves(what: str, values: Any) -> None:
    """Raise ValueError where a tensor could be in something that nobody here looks into."""
    for x in pytree.tree_leaves(values):
        if not isinstance(x, (Tensor, *PLAIN)):
            raise ValueError(
                f"graphs.capture: {what} must be tensors, numbers, texts and nests of them that torch.utils._pytree "
                f"knows, got a {type(x).__name__}"
            )


def record(run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """What run() gave, and a function that does it again on the same memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return out, graph.replay


def capture(function: Callable[..., Any], *example: Any, **options: Any) -> "Step | PushStep":
    """Record a function of tensors of fixed shapes.

    Args:
        function: a model in eval mode, or any function that computes on one GPU and does not wait for it. MALMM.push is
            known, and becomes a PushStep.
        example: its arguments: tensors, numbers and nests of them. Tensors of a call must be as these are; all else
            must be equal.
        options: keyword arguments, fixed.

    Raises:
        ValueError: an argument or a result, on a GPU, is of a kind that could hide a tensor.
    """
    owner = getattr(function, "__self__", None)
    if isinstance(owner, MALMM) and getattr(function, "__func__", None) is MALMM.push:
        return PushStep(owner, *example, **options)
    return Step(function, example, options)


class Step:
    """A recorded function, made by `capture`. Its results are new tensors.

    Attributes:
        captured: calls replay what was recorded; otherwise they are plain calls of the function.
        why: why not.
    """

    def __init__(self, function: Callable[..., Any], example: tuple[Any, ...], options: dict[str, Any]):
        self._call = torch.no_grad()(lambda *args: function(*args, **options))
        self.why = why_plain(example)
        if self.captured:
            _check_leaves("arguments", example)
            # One copy of each place: a tensor that stands in two of them here may be two in a call.
            self._inputs = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), example)
            with _on(example):
                self._out, self._replay = record(lambda: self._call(*self._inputs))
            _check_leaves("results", self._out)

    @property
    def captured(self) -> bool:
        return self.why is None

    def __call__(self, *args: Any) -> Any:
        """As the function, without its options.

        Raises:
            ValueError: an argument is not as it was at the capture.
        """
        if not self.captured:
            return self._call(*args)
        with torch.no_grad(), _on(self._inputs):
            _load(self._inputs, args)
            self._replay()
            return pytree.tree_map_only(Tensor, torch.clone, self._out)


class PushStep:
    """MALMM.push of one frame into full memories, recorded. Made by `capture`.

    Memories that are given to it for the first time are copied to where the recording works; those it returned are
    there already. As with push, what it was given is used up: go on with what it returns. It holds one stream: another
    one's memories are an error as long as those it returned last are in use.

    Attributes:
        captured, why: as in Step.
        replays: calls that replayed. Those before memories are full, and of several frames, are plain pushes: their
            shapes are others.
    """

    def __init__(self, model: MALMM, memories: Memories, features: Tensor):
        self.model, self.replays, self._given = model, 0, None
        self.why = why_plain((memories, features))
        if not self.captured:
            return
        self._frames = torch.zeros_like(features if features.dim() == 4 else features[:, None])
        if self._frames.shape[1] != 1:
            raise ValueError(f"graphs.capture: a push of one frame is captured, got {self._frames.shape[1]}")
        self._state = _held(memories._replace(seen=_full(memories), frame=None, rows=None))
        with torch.no_grad(), _on(self._frames):
            self._out, self._replay = record(lambda: self.model._push(self._state, self._frames))

    @property
    def captured(self) -> bool:
        return self.why is None

    def __call__(self, memories: Memories, features: Tensor) -> Memories:
        """As MALMM.push.

        Raises:
            ValueError: memories or features are not as they were at the capture, or as push raises it.
            RuntimeError: the step holds the memories of another stream, which are in use.
        """
        frames = features[:, None] if features.dim() == 3 else features
        if not self.captured or frames.shape[1] != 1 or memories.seen < _full(memories):
            return self.model.push(memories, features)
        self.model._check(frames, memories)
        with torch.no_grad(), _on(self._frames):
            frames = self.model._timed(frames, memories.seen, None)
            if not self._holds(memories):
                self._take(memories)
            _load(self._frames, frames)
            self._replay()
        self.replays += 1
        return self._give(memories)

    def _holds(self, memories: Memories) -> bool:
        """memories are what was returned last: by the tensor that stands for it."""
        last = None if self._given is None else self._given()
        return last is not None and any(x is last for x in pytree.tree_leaves(memories))

    def _take(self, memories: Memories) -> None:
        if self._given is not None and self._given() is not None:
            raise RuntimeError(
                "graphs: this step holds the memories that it returned last, and they are in use; go on with those, "
                "drop them, or capture a step for every stream"
            )
        _load(self._state, memories._replace(seen=self._state.seen, frame=None, rows=None))

    def _give(self, memories: Memories) -> Memories:
        """The banks are where they are recorded, as push leaves them in place; all else is the caller's own. One tensor
        is new, by which to know whether somebody still has them."""
        frame, rows = (None if x is None else x.clone() for x in (self._out.frame, self._out.rows))
        banks = [self._out.visual, *self._out.query]
        for i, bank in enumerate(banks):
            if bank is not None:
                banks[i] = bank._replace(length=bank.length.detach())
                self._given = weakref.ref(banks[i].length)
                break
        return memories._replace(
            seen=memories.seen + 1, visual=banks[0], query=tuple(banks[1:]), frame=frame, rows=rows
        )


class Clips:
    """An encoder of clips of any length, padded to a few, with a graph for each of those and each batch size.

    Args:
        model: whose temporal module takes frame masks.
        lengths: numbers of frames, ascending. A longer clip is a plain call.
        options: of the model's forward, fixed.

    Attributes:
        graphs: number of frames and shape of the batch -> Step.
    """

    def __init__(self, model: VideoEncoder, lengths: Sequence[int], **options: Any):
        check_counts("graphs.Clips", **{f"lengths[{i}]": n for i, n in enumerate(lengths)})
        if list(lengths) != sorted(set(lengths)) or not lengths:
            raise ValueError(f"graphs.Clips: lengths must be ascending numbers of frames, got {list(lengths)}")
        self.model, self.lengths, self.options, self.graphs = model, tuple(lengths), options, {}

    def __call__(self, pixels: Tensor, frame_mask: Tensor | None = None) -> Encoding:
        """pixels [B, T, 3, h, w], frame_mask bool [B, T] or None, as in VideoEncoder.forward.

        Raises:
            ValueError: they do not fit, or a clip has no frame; a GPU's mask is not looked into, which would wait.
        """
        pixels = self.model.read_pixels(pixels)
        T = next((n for n in self.lengths if n >= pixels.shape[1]), None)
        if T is None or why_plain(pixels) is not None:
            with torch.no_grad():
                return self.model(pixels, frame_mask=frame_mask, **self.options)
        looked = nullcontext() if frame_mask is None or frame_mask.device.type == "cpu" else masks_unread()
        with looked:
            check_frame_mask("graphs.Clips", frame_mask, *pixels.shape[:2], pixels.device)
        example = padded(pixels, T, frame_mask)
        key = tuple(pixels.shape[:1]) + tuple(example[0].shape[1:]) + (pixels.dtype, pixels.device)
        if key not in self.graphs:
            self.graphs[key] = capture(self.encode, *example)
        return self.graphs[key](*example)

    def encode(self, pixels: Tensor, frame_mask: Tensor) -> Encoding:
        """What is recorded: the model, without a look into the mask."""
        with masks_unread():
            return self.model(pixels, frame_mask=frame_mask, **self.options)


def padded(pixels: Tensor, T: int, frame_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A clip of T frames, zeros after those there are, and its frame mask. pixels [B, t, 3, h, w], t <= T."""
    B, t = pixels.shape[:2]
    mask = torch.ones(B, t, dtype=torch.bool, device=pixels.device) if frame_mask is None else frame_mask
    return F.pad(pixels, (0, 0) * 3 + (0, T - t)), F.pad(mask.to(pixels.device), (0, T - t))


def _full(memories: Memories) -> int:
    """Frames after which no shape of a push changes."""
    return memories.length + 1


def _held(example: Any) -> Any:
    """Copies that a recording reads; a tensor that occurs twice stays one."""
    copies: dict[int, Tensor] = {}
    return pytree.tree_map_only(Tensor, lambda x: copies.setdefault(id(x), x.detach().clone()), example)


def _load(held: Any, given: Any) -> None:
    """Copy what is given to what a recording reads.

    Raises:
        ValueError: it is of another kind.
    """
    to, spec = pytree.tree_flatten(held)
    leaves, own = pytree.tree_flatten(given)
    if own != spec:
        raise ValueError("graphs: the arguments must be nested as those of the capture")
    for a, b in zip(to, leaves, strict=True):
        if not isinstance(a, Tensor):
            same = a == b
        else:
            same = isinstance(b, Tensor) and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        if not same:
            wanted, got = (f"{tuple(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else x for x in (a, b))
            raise ValueError(
                f"graphs: an argument must be as at the capture, {wanted}, got {got}; capture another step"
            )
    for a, b in zip(to, leaves):
        if isinstance(a, Tensor) and a is not b:
            a.copy_(b)
