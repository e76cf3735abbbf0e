"""Sizes of a BT-Adapter model, as data: models/configs/*.json."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyvidx.backbones.vit import ViTConfig
from pyvidx.sizes import check

CONFIGS = Path(__file__).parent / "configs"
PARTS = ("full", "tokens", "features")


@dataclass(frozen=True)
class BTAdapterConfig:
    """Sizes of backbone and branch.

    Attributes:
        vision: sizes of the CLIP backbone.
        depth: branch layers d; layer j reads the output of backbone layer L - d + j.
        time_length: rows of the time table, the largest number of (pooled) frames.
        gated: fuse by gates; False adds plain sums.
        gate_scale, output_gate_scale: a gate is sigmoid(scale * parameter).
        branch_eps: LayerNorm eps of the branch.
        part: "full" has everything. "tokens" goes from pixels to the language model's tokens only: no backbone layer
            L-1, no branch layer d-1, no heads. "features" has the layers that "tokens" needs from stored features on:
            backbone layers L-d to L-2 and no embeddings.
    """

    vision: ViTConfig
    depth: int = 4
    time_length: int = 64
    gated: bool = True
    gate_scale: float = 100.0
    output_gate_scale: float = 1e4
    branch_eps: float = 1e-5
    part: str = "full"

    def __post_init__(self) -> None:
        check(self)
        if self.part not in PARTS:
            raise ValueError(f"BTAdapterConfig: part must be one of {', '.join(PARTS)}, got {self.part!r}")
        low = 1 if self.part == "full" else 2
        if not low <= self.depth <= self.vision.layers:
            raise ValueError(f"BTAdapterConfig: depth must be in [{low}, {self.vision.layers}], got {self.depth}")

    @property
    def fork(self) -> int:
        """Index of the first backbone layer whose output the branch reads."""
        return self.vision.layers - self.depth

    @property
    def backbone_layers(self) -> range:
        """Original indices of the backbone layers this part has."""
        start = self.fork if self.part == "features" else 0
        return range(start, self.vision.layers - (self.part != "full"))

    @property
    def branch_layers(self) -> int:
        """Number of branch layers this part has."""
        return self.depth - (self.part != "full")

    def to_dict(self) -> dict[str, Any]:
        """What json takes; from_dict goes back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BTAdapterConfig":
        values = dict(values)
        vision = ViTConfig(**known(ViTConfig, values.pop("vision")))
        return cls(vision=vision, **known(cls, values))

    @classmethod
    def named(cls, name: str, **changes: Any) -> "BTAdapterConfig":
        """A shipped size, e.g. named("clip-l-14", part="tokens")."""
        path = CONFIGS / f"{name}.json"
        if not path.exists():
            raise ValueError(f"BTAdapterConfig: no size named {name!r}; there are {', '.join(cls.names())}")
        return dataclasses.replace(cls.from_dict(json.loads(path.read_text())), **changes)

    @staticmethod
    def names() -> list[str]:
        return sorted(p.stem for p in CONFIGS.glob("*.json"))


def known(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """values, if all of them are fields of this dataclass."""
    unknown = values.keys() - {f.name for f in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(f"{cls.__name__}: unknown fields {', '.join(sorted(unknown))}")
    return values
