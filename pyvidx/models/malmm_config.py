"""Sizes of an MA-LMM model, as data."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from pyvidx.backbones.vit import EVA_G, ViTConfig
from pyvidx.memory.qformer import QFormerConfig
from pyvidx.models.config import known
from pyvidx.sizes import check


@dataclass(frozen=True)
class MALMMConfig:
    """Sizes of frame encoder, Q-Former and heads. The defaults are those of the published model on Vicuna-7B.

    How long the memories are, and which there are, is said to MALMM.start, not here: no weight depends on it.

    Attributes:
        vision, qformer: sizes of the two; qformer.encoder_width is vision.width.
        llm_width: width of the language model's tokens; None: no projection to it.
        time_length: rows of the temporal embedding table; 0: none, as in InstructBLIP's own weights.
    """

    vision: ViTConfig = EVA_G
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    llm_width: int | None = 4096
    time_length: int = 120

    def __post_init__(self) -> None:
        check(self, zero=("time_length",))
        if self.vision.width != self.qformer.encoder_width:
            raise ValueError(
                "MALMMConfig: qformer.encoder_width must be vision.width, "
                f"got {self.qformer.encoder_width} and {self.vision.width}"
            )

    def to_dict(self) -> dict[str, Any]:
        """What json takes; from_dict goes back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MALMMConfig":
        values = dict(values)
        vision = ViTConfig(**known(ViTConfig, values.pop("vision")))
        qformer = QFormerConfig(**known(QFormerConfig, values.pop("qformer")))
        return cls(vision=vision, qformer=qformer, **known(cls, values))

    @classmethod
    def tiny(cls, **changes: Any) -> "MALMMConfig":
        """A model to try things out with: 9 patches, four layers, every part there is."""
        config = cls(
            vision=dataclasses.replace(EVA_G, image_size=42, width=48, heads=4, layers=2, mlp_width=96),
            qformer=QFormerConfig(
                width=32, heads=4, layers=4, mlp_width=48, queries=8, encoder_width=48, vocab=50, text_length=32
            ),
            llm_width=24,
            time_length=16,
        )
        return dataclasses.replace(config, **changes)
