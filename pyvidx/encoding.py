"""What a video encoder returns."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Encoding:
    """A batch of encoded videos. What was not asked for is None.

    Attributes:
        tokens: [B, 1+P, C] for a language model: P patch tokens averaged over time, then one class token. A temporal
            module that gives other rows says so.
        pooled: [B, E] video embedding, not normalized.
        times: [B, T] seconds of the frames, as they were handed in.
    """

    tokens: Tensor | None = None
    pooled: Tensor | None = None
    times: Tensor | None = None
