"""BT-Adapter (One For All, arXiv:2309.15785) as it was published: an encoder, and what its official weights need."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyvidx.backbones.vit import ViT
from pyvidx.models.config import BTAdapterConfig
from pyvidx.models.video_encoder import VideoEncoder
from pyvidx.ops._library import require_tensors
from pyvidx.temporal.branch import BTAdapterModule
from pyvidx.temporal.encoding import Encoding
from pyvidx.temporal.grouping import Grouping, grouping


class OfficialBranch(BTAdapterModule):
    """BTAdapterModule in the groups of the public code, and of a model that may lack its last layer.

    Args:
        config: sizes and part.
        compat, variant: see BTAdapter.
    """

    def __init__(self, config: BTAdapterConfig, compat: str, variant: str):
        super().__init__(
            config.vision,
            depth=config.depth,
            time_length=config.time_length,
            gated=config.gated,
            gate_scale=config.gate_scale,
            output_gate_scale=config.output_gate_scale,
            eps=config.branch_eps,
        )
        self.compat, self.variant = compat, variant
        if config.part != "full":
            self.branch.temporal = self.branch.temporal[: config.branch_layers]
            self.branch.spatial = self.branch.spatial[: config.branch_layers]
            self.outputs, self.output_gate = ("tokens",), None

    def grouping(self, T: int, P: int, **options: Any) -> Grouping:
        modes = {"compat": self.compat, "variant": self.variant, "time_length": self.time_length}
        return grouping(T, P, **modes, **options)


class BTAdapter(VideoEncoder):
    """The encoder of a CLIP and BT-Adapter's branch that also runs as the public code does, and in parts.

    The backbone starts frozen (its parameters ask for no gradient), as in the paper; the branch is trainable.

    Args:
        config: sizes; BTAdapterConfig.named("clip-l-14") and so on.
        compat: "paper": attention groups are all T frames of a patch. "official": the numbers of the public code, whose
            two towers differ; see pyvidx.temporal.grouping and `read_pixels`. Its llava tower takes no frame_mask, and
            its mma tower masks [B, T*P], frame-major.
        variant: the tower of the public code, "mma" (retrieval) or "llava" (video chat); only matters for
            compat="official".
    """

    kind = "bt_adapter"

    def __init__(self, config: BTAdapterConfig, *, compat: str = "paper", variant: str = "mma"):
        grouping(2, 1, compat=compat, variant=variant)  # refuses unknown names
        full = config.part == "full"
        tower = ViT(config.vision, layers=config.backbone_layers, embeddings=config.part != "features", head=full)
        super().__init__(tower, OfficialBranch(config, compat, variant))
        self.config = config

    @staticmethod
    def _check(tower: ViT, temporal: OfficialBranch) -> None:
        """Both are of one configuration."""

    @property
    def compat(self) -> str:
        return self.temporal.compat

    @property
    def variant(self) -> str:
        return self.temporal.variant

    def forward(self, pixels: Tensor, *, outputs: Sequence[str] | None = None, **options: Any) -> Encoding:
        """As VideoEncoder; config.part "features" takes stored backbone tokens in place of pixels, see `from_features`.

        Raises:
            ValueError: the input, the frame count, a mask or the outputs do not fit.
        """
        encode = self.from_features if self.config.part == "features" else super().forward
        return encode(pixels, outputs=outputs, **options)

    def read_pixels(self, pixels: Tensor) -> Tensor:
        """[B, T, 3, h, w]. compat="official" reads what the public code reads, and as it does: 5-D input whose axis 1
        is 3 is channel-first, [B, 3, T, h, w], also when it is a clip of 3 frames; mma takes images [B, 3, h, w] as
        clips of one frame; llava takes [T, 3, h, w] as one video."""
        require_tensors("BTAdapter", pixels=pixels)
        if self.compat == "official" and pixels.dim() in (4, 5) and pixels.shape[1] == 3:
            if pixels.dim() == 5:
                pixels = pixels.transpose(1, 2)
            else:
                pixels = pixels[None] if self.variant == "llava" else pixels[:, None]
        return super().read_pixels(pixels)

    def read_features(self, features: Tensor) -> Tensor:
        """[B, T, 1+P, C]. The official llava tower also takes [T, 1+P, C] as one video, and fails on [B, 3, 1+P, C],
        which it takes for pixels."""
        require_tensors("BTAdapter", features=features)
        if self.compat == "official" and self.variant == "llava":
            if features.dim() == 4 and features.shape[1] == 3:
                raise ValueError(
                    "BTAdapter (official llava tower): features of 3 frames are taken for pixels by the "
                    f"public code and fail, got {tuple(features.shape)}"
                )
            if features.dim() == 3:
                features = features[None]
        return super().read_features(features)

    def header(self) -> dict[str, Any]:
        return {"config": self.config.to_dict(), "compat": self.compat, "variant": self.variant}

    @classmethod
    def built(cls, header: dict[str, Any]) -> "BTAdapter":
        modes = {name: header[name] for name in ("compat", "variant")}
        return cls(BTAdapterConfig.from_dict(header["config"]), **modes)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, compat: str | None = None, variant: str | None = None) -> "BTAdapter":
        """Load what `save` wrote, a file or its folder, in eval mode and with the dtypes of the file.

        compat, variant: in place of those saved. Official files are read by pyvidx.weights.bt_adapter.

        Raises:
            FileNotFoundError, ValueError: see pyvidx.models.files.load; compat or variant is unknown.
        """
        given = {"compat": compat, "variant": variant}
        return cls._loaded(path, {name: value for name, value in given.items() if value is not None})

    @classmethod
    def default(cls, size: str = "tiny", *, compat: str = "paper", variant: str = "mma", **changes: Any) -> "BTAdapter":
        """A model with random weights, always the same ones, to try things out; changes: of the configuration."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls(BTAdapterConfig.named(size, **changes), compat=compat, variant=variant).eval()
