"""What a video encoder returns."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Encoding(Mapping[str, Any]):
    """A batch of encoded videos. What was not asked for is None.

    Also a mapping of what is there by name, which is how torch's `default_collate` and accelerate go through outputs,
    and a pytree for torch.compile, torch.export and torch.func.

    Attributes:
        tokens: [B, 1+P, C] for a language model: P patch tokens averaged over time, then one class token, or what
            stands for it in a tower without one, see ViT.with_class. A temporal module that gives other rows says so.
        pooled: [B, E] video embedding, not normalized.
        times: [B, T] seconds of the frames, as they were handed in.
    """

    tokens: Tensor | None = None
    pooled: Tensor | None = None
    times: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tokens, dict):  # Encoding({"pooled": ...}), as those who go through a mapping make a new one
            given = self.tokens
            if unknown := given.keys() - set(NAMES):
                raise ValueError(f"Encoding: names must be of {NAMES}, got the unknown {sorted(unknown)}")
            for name in NAMES:
                object.__setattr__(self, name, given.get(name))

    def __getitem__(self, name: str) -> Tensor:
        if name not in NAMES or getattr(self, name) is None:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in NAMES if getattr(self, name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    __eq__, __hash__ = object.__eq__, object.__hash__  # tensors compare element by element


NAMES = tuple(f.name for f in fields(Encoding))
pytree.register_dataclass(Encoding, serialized_type_name="pyvidx.Encoding")
