"""MiniGPT-4 (arXiv:2304.10592) with BT-Adapter on its image tower (arXiv:2309.15785, table 5): videos to tokens."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyvidx.backbones.vit import EVA_G
from pyvidx.layers.linear import dense
from pyvidx.memory.qformer import QFormer, QFormerConfig
from pyvidx.memory.sources import FrameSource
from pyvidx.models import files
from pyvidx.models.bt_adapter import BTAdapter
from pyvidx.models.config import BTAdapterConfig, known
from pyvidx.models.fold import Foldable
from pyvidx.sizes import check

# All 40 blocks of EVA-ViT-g are counted; BLIP-2's family, and part "tokens" of a branch beside it, run 39.
EVA_BRANCH = BTAdapterConfig(
    dataclasses.replace(EVA_G, layers=40, norm_eps=None), gated=False, branch_eps=1e-6, part="tokens"
)


@dataclass(frozen=True)
class MiniGPT4Config:
    """Sizes; the defaults are the published ones on a language model of 7 billion parameters.

    Attributes:
        encoder: tower and branch, of part "tokens".
        qformer: BLIP-2's, which reads no text.
        llm_width: width of the language model's tokens.
        norm_eps: of the LayerNorm between the two.
    """

    encoder: BTAdapterConfig = EVA_BRANCH
    qformer: QFormerConfig = field(default_factory=lambda: QFormerConfig(vocab=None))
    llm_width: int = 4096
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check(self)
        width = self.encoder.vision.width
        if self.encoder.part != "tokens" or self.qformer.encoder_width != width or self.qformer.vocab is not None:
            raise ValueError(
                'MiniGPT4Config: the encoder must be of part "tokens", the Q-Former without text and its encoder_width '
                f"{width}, got {self.encoder.part!r}, vocab {self.qformer.vocab} and {self.qformer.encoder_width}"
            )

    def to_dict(self) -> dict[str, Any]:
        """What json takes; from_dict goes back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MiniGPT4Config":
        values = dict(values)
        encoder = BTAdapterConfig.from_dict(values.pop("encoder"))
        return cls(encoder, QFormerConfig(**known(QFormerConfig, values.pop("qformer"))), **known(cls, values))

    @classmethod
    def tiny(cls) -> "MiniGPT4Config":
        """A model to try things out with."""
        vision = dataclasses.replace(EVA_BRANCH.vision, image_size=42, width=48, heads=4, layers=5, mlp_width=96)
        qformer = QFormerConfig(width=32, heads=4, layers=4, mlp_width=48, queries=8, encoder_width=48, vocab=None)
        return cls(dataclasses.replace(EVA_BRANCH, vision=vision), qformer, llm_width=24)


class MiniGPT4(Foldable):
    """Tower and branch, LayerNorm ("ln_vision"), Q-Former and projector.

    The Q-Former reads one video as it reads one image: 1 + P tokens, which are the time averages of backbone and branch
    before the last block, as in BT-Adapter's LLaVA. The authors published no code of their MiniGPT-4; that their EVA
    tower keeps the pair of states before each block, and that their chat code adds up the means over time of such a
    pair, is where this reading is from. Whether they are added up or averaged is the same after the LayerNorm.

    Groups of time attention are all frames of a patch, as in the authors' EVA tower.

    Args:
        config: sizes.

    Attributes:
        is_random: the weights came from no file.
    """

    kind = "minigpt4"

    def __init__(self, config: MiniGPT4Config):
        super().__init__()
        self.config, self.is_random = config, True
        self.encoder = BTAdapter(config.encoder)
        for layer in self.encoder.temporal.branch.spatial:
            # In the authors' EVA tower these alone have torch's default eps.
            layer.norm1.eps = layer.norm2.eps = 1e-5
        self.norm = nn.LayerNorm(config.encoder.vision.width, eps=config.norm_eps)
        self.qformer = QFormer(config.qformer)
        self.projection = nn.Linear(config.qformer.width, config.llm_width)

    def forward(self, pixels: Tensor, *, frame_mask: Tensor | None = None) -> Tensor:
        """Videos to tokens for a language model.

        Args:
            pixels: [B, T, 3, h, w], normalized; T up to encoder.time_length, or even and up to twice that.
            frame_mask: see VideoEncoder.

        Returns:
            [B, Q, llm_width].

        Raises:
            ValueError: pixels or the number of frames do not fit.
        """
        if pixels.dim() == 5 and not len(pixels):
            raise ValueError(f"MiniGPT4: pixels must hold a video, B > 0, got {tuple(pixels.shape)}")
        frames = self.norm(self.encoder(pixels, frame_mask=frame_mask).tokens)[:, None]
        prompt = self.qformer.prompt(batch=len(frames))
        rows = self.qformer.run(prompt, 1, FrameSource(self.qformer, prompt, frames))
        return dense(rows[:, 0], self.projection)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, configuration included. A path without that ending is a folder."""
        self.check_whole()
        return files.write(path, self.kind, self, {"config": self.config.to_dict(), "is_random": self.is_random})

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "MiniGPT4":
        """Load what `save` wrote, a file or its folder, in eval mode and with the dtypes of the file.

        Raises:
            FileNotFoundError, ValueError: see pyvidx.models.files.load.
        """
        model, header = files.load(path, cls.kind, lambda header: cls(MiniGPT4Config.from_dict(header["config"])))
        model.is_random = header["is_random"]
        return model

    @classmethod
    def default(cls) -> "MiniGPT4":
        """A tiny model with random weights, always the same ones, to try things out."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls(MiniGPT4Config.tiny()).eval()
