"""BT-Adapter (One For All, arXiv:2309.15785): a CLIP tower and the branch that gives it a sense of time."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pyvidx.backbones.vit import ViT
from pyvidx.layers.plain import held
from pyvidx.models import files
from pyvidx.models.config import BTAdapterConfig
from pyvidx.models.fold import fold
from pyvidx.ops._library import require_tensors
from pyvidx.temporal.branch import encode_branch, frame_vectors, until_last
from pyvidx.temporal.bt_adapter import BTAdapterBranch
from pyvidx.temporal.encoding import Encoding
from pyvidx.temporal.frames import check_frame_mask, on_real_frames, real_only
from pyvidx.temporal.grouping import Grouping, grouping
from pyvidx.temporal.module import OUTPUTS


class BTAdapter(nn.Module):
    """Backbone, branch and heads.

    The backbone starts frozen (its parameters ask for no gradient), as in the paper; the branch is trainable.

    Args:
        config: sizes; BTAdapterConfig.named("clip-l-14") and so on.
        compat: "paper": attention groups are all T frames of a patch. "official": the numbers of the public code, whose
            two towers differ; see pyvidx.temporal.grouping and `forward`.
        tower: "mma" (retrieval) or "llava" (video chat); only matters for compat="official".

    Attributes:
        is_random: the weights came from no file.
        folded: an inference copy made by fold(); it can not be trained, saved or loaded into.
    """

    def __init__(self, config: BTAdapterConfig, *, compat: str = "paper", tower: str = "mma"):
        super().__init__()
        grouping(2, 1, compat=compat, tower=tower)  # refuses unknown names
        self.config, self.compat, self.tower = config, compat, tower
        self.is_random, self.folded = True, False
        v, full = config.vision, config.part == "full"
        self.backbone = ViT(v, layers=config.backbone_layers, embeddings=config.part != "features", head=full)
        self.backbone.requires_grad_(False)
        self.branch = BTAdapterBranch(
            v.width,
            v.heads,
            v.mlp_width,
            depth=config.branch_layers,
            time_length=config.time_length,
            gated=config.gated,
            gate_scale=config.gate_scale,
            hidden_act=v.hidden_act,
            eps=config.branch_eps,
        )
        self.output_gate = nn.Parameter(torch.zeros(v.width)) if full and config.gated else None

    def forward(
        self,
        pixels: Tensor,
        *,
        outputs: Sequence[str] | None = None,
        times: Tensor | None = None,
        mask: Tensor | None = None,
        frame_mask: Tensor | None = None,
        interpolate: bool = False,
    ) -> Encoding:
        """Encode videos.

        Args:
            pixels: [B, T, 3, h, w], normalized; cast to the model's dtype. config.part "features": stored backbone
                tokens [B, T, 1+P, C] instead, see `encode_features`.
                compat="official" reads what the public code reads, and as it does: 5-D input whose axis 1 is 3 is
                channel-first, [B, 3, T, h, w], also when it is a clip of 3 frames; mma takes images [B, 3, h, w] as
                clips of one frame; llava takes [T, 3, h, w] as one video.
            outputs: any of "tokens", "pooled"; default all that this part of the model has. What is not asked for is
                not computed.
            times: [B, T] seconds, passed through.
            mask: True = removed from the branch; [P] or [B, P] (paper), [B, T*P] frame-major (official mma). Only for
                outputs=("pooled",).
            frame_mask: bool [B, T], True = a real frame: the others, of padded clips, have no influence, whatever they
                hold. For clips of at most config.time_length frames, and not for the official llava tower.
            interpolate: take pixels of another size than config.vision.image_size, multiples of the patch size, with
                the position table resized (bicubic); otherwise they are an error.

        Raises:
            ValueError: the input, the frame count, a mask or the outputs do not fit.
        """
        if self.config.part == "features":
            stored = {"times": times, "frame_mask": frame_mask, "interpolate": interpolate}
            return self.encode_features(pixels, outputs=outputs, **stored)
        wanted, pixels = self._wanted(outputs), self.read_pixels(pixels)
        real = check_frame_mask("BTAdapter", frame_mask, *pixels.shape[:2], pixels.device)
        position = self._position_of(pixels, interpolate)
        # Refuses what does not fit before the work.
        group = self._group(pixels.shape[1], len(position) - 1, mask, pixels.device, wanted, real)
        layers = self._branch_inputs(wanted)
        xs = on_real_frames(lambda x: self.backbone(x, layers, interpolate=interpolate), pixels, real)
        return self._encode(xs, position, group, wanted, times)

    def encode_features(
        self,
        features: Tensor,
        *,
        outputs: Sequence[str] | None = None,
        times: Tensor | None = None,
        frame_mask: Tensor | None = None,
        interpolate: bool | tuple[int, int] = False,
    ) -> Encoding:
        """The same from stored backbone tokens: the input of backbone layer L - d, for any part of the model.

        Args:
            features: [B, T, 1+P, C]; cast to the model's dtype. The official llava tower also takes [T, 1+P, C] as one
                video, and fails on [B, 3, 1+P, C], which it takes for pixels.
            interpolate: True for features of pixels of another size; (rows, columns) of their patches where these are
                no square.
        """
        wanted, x, xs = self._wanted(outputs), self._read_features(features), []
        real = check_frame_mask("BTAdapter", frame_mask, *x.shape[:2], x.device)
        # Refuses a wrong shape or frame count before the work.
        group = self.grouping(x, frame_mask=real, interpolate=interpolate)
        table, x = self._table(x, interpolate), self.backbone.own(real_only(x, real))
        for i in self._branch_inputs(wanted):
            x = self.backbone.blocks[str(i)](x)
            xs.append(self.backbone.with_class(x))
        return self._encode(xs, table, group, wanted, times)

    def encode_layers(
        self,
        xs: Sequence[Tensor],
        *,
        outputs: Sequence[str] | None = None,
        times: Tensor | None = None,
        mask: Tensor | None = None,
        frame_mask: Tensor | None = None,
        interpolate: bool | tuple[int, int] = False,
    ) -> Encoding:
        """The branch and the heads on backbone outputs, which may be cached: the branch never feeds the backbone.

        Args:
            xs: [B, T, 1+P, C] of backbone layers L-d, L-d+1, ...: d of them, or d - 1 for outputs=("tokens",).
            interpolate: as in `encode_features`.
        """
        wanted = self._wanted(outputs)
        if len(xs) != len(self._branch_inputs(wanted)):
            raise ValueError(
                f"BTAdapter: {' and '.join(wanted)} need the outputs of backbone layers "
                f"{list(self._branch_inputs(wanted))}, got {len(xs)} tensors"
            )
        require_tensors("BTAdapter", **{f"xs[{i}]": x for i, x in enumerate(xs)})
        real = check_frame_mask("BTAdapter", frame_mask, *xs[0].shape[:2], xs[0].device)
        group = self.grouping(xs[0], mask, wanted, real, interpolate)
        table = self._table(xs[0], interpolate)
        return self._encode([real_only(x, real) for x in xs], table, group, wanted, times)

    def _encode(
        self,
        xs: Sequence[Tensor],
        position: Tensor,
        group: Grouping,
        wanted: Sequence[str],
        times: Tensor | None,
    ) -> Encoding:
        gate = {"gate": held(self, "output_gate"), "gate_scale": self.config.output_gate_scale}
        return replace(encode_branch(self.branch, xs, self.backbone, position, group, wanted, **gate), times=times)

    def encode_frames(self, pixels: Tensor, *, interpolate: bool = False) -> Tensor:
        """One vector per frame, whose mean, projected, is "pooled". Arguments as in `forward` -> [B, T, C]."""
        layers, pixels = self._branch_inputs(self._wanted(("pooled",))), self.read_pixels(pixels)
        position = self._position_of(pixels, interpolate)
        xs = self.backbone(pixels, layers, interpolate=interpolate)
        _, mixed = until_last(self.branch, xs, position, self.grouping(xs[0], interpolate=interpolate))
        return self.frame_vectors(xs[-1], self.branch.spatial[-1].class_token(mixed))

    def frame_vectors(self, x: Tensor, cls: Tensor) -> Tensor:
        """LN((1 - w) cls + w X_cls) of every frame, see pyvidx.temporal.branch. x [B, T, 1+P, C] of the last backbone
        layer, cls [B, C] of the last branch layer -> [B, T, C]."""
        return frame_vectors(x, cls, self.backbone, held(self, "output_gate"), self.config.output_gate_scale)

    def grouping(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        wanted: Sequence[str] = (),
        frame_mask: Tensor | None = None,
        interpolate: bool | tuple[int, int] = False,
    ) -> Grouping:
        """The arrangement of the branch tokens of backbone tokens x [B, T, 1+P, C]."""
        P, C = self.config.vision.patches, self.config.vision.width
        if x.dim() != 4 or x.shape[3] != C or (x.shape[2] != 1 + P and not interpolate):
            raise ValueError(
                f"BTAdapter: backbone tokens must be [B, T, {1 + P}, {C}], got {tuple(x.shape)}; those of pixels of "
                "another size need interpolate=True"
            )
        return self._group(x.shape[1], x.shape[2] - 1, mask, x.device, wanted, frame_mask)

    def _position_of(self, pixels: Tensor, interpolate: bool) -> Tensor:
        rows, columns = self.backbone.grid_of(pixels, "BTAdapter")
        return self.backbone.positions(rows, columns, interpolate=interpolate)

    def _table(self, x: Tensor, interpolate: bool | tuple[int, int]) -> Tensor:
        """The position table of stored tokens."""
        rows, columns = self.backbone.grid(x.shape[2] - 1, interpolate)
        return self.backbone.positions(rows, columns, interpolate=bool(interpolate))

    def _group(
        self,
        T: int,
        P: int,
        mask: Tensor | None,
        device: torch.device,
        wanted: Sequence[str],
        frame_mask: Tensor | None,
    ) -> Grouping:
        if mask is not None and "tokens" in wanted:
            raise ValueError("BTAdapter: tokens need all patches; with a mask ask for outputs=('pooled',)")
        modes = {"compat": self.compat, "tower": self.tower, "time_length": self.config.time_length}
        return grouping(T, P, mask=mask, frame_mask=frame_mask, device=device, **modes)

    def read_pixels(self, pixels: Tensor) -> Tensor:
        """The forms `forward` takes -> [B, T, 3, h, w]."""
        require_tensors("BTAdapter", pixels=pixels)
        shape, axes = tuple(pixels.shape), pixels.dim()
        if self.compat == "official":
            if axes == 5 and shape[1] == 3:
                pixels = pixels.transpose(1, 2)
            elif axes == 4 and shape[1] == 3:
                pixels = pixels[None] if self.tower == "llava" else pixels[:, None]
        if pixels.dim() != 5 or pixels.shape[2] != 3:
            hint = "; channel-first clips are pixels.transpose(1, 2)" if axes == 5 and shape[1] == 3 else ""
            raise ValueError(
                f"BTAdapter: pixels must be [B, T, 3, h, w] (each frame its 3 channels), got {shape}{hint}"
            )
        return pixels

    def _read_features(self, features: Tensor) -> Tensor:
        require_tensors("BTAdapter", features=features)
        shape = tuple(features.shape)
        if self.compat == "official" and self.tower == "llava":
            if len(shape) == 4 and shape[1] == 3:
                raise ValueError(
                    "BTAdapter (official llava tower): features of 3 frames are taken for pixels by the "
                    f"public code and fail, got {shape}"
                )
            if len(shape) == 3:
                features = features[None]
        if features.dim() != 4 or not features.is_floating_point():
            raise ValueError(f"BTAdapter: features must be floating [B, T, 1+P, C], got {shape} {features.dtype}")
        return features.to(self.backbone.position.dtype)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What this part of the model can give, of "tokens" and "pooled"."""
        have = OUTPUTS if self.config.part == "full" else ("tokens",)
        return have[1:] if self.config.depth == 1 else have  # the tokens are those after branch layer d - 2

    def _wanted(self, outputs: Sequence[str] | None) -> tuple[str, ...]:
        have = self.outputs
        wanted = have if outputs is None else tuple(o for o in OUTPUTS if o in outputs)
        if not wanted or not set(wanted) <= set(have) or (outputs is not None and not set(outputs) <= set(OUTPUTS)):
            raise ValueError(
                f"BTAdapter: outputs must be some of {have} for part {self.config.part!r} and depth "
                f"{self.config.depth}, got {outputs!r}"
            )
        return wanted

    def _branch_inputs(self, wanted: tuple[str, ...]) -> range:
        """The backbone layers whose outputs are needed."""
        return range(self.config.fork, self.config.vision.layers - ("pooled" not in wanted))

    def init_from_backbone(self) -> None:
        """The official start of training: space attention and MLP copied from the backbone layers read."""
        for j, layer in enumerate(self.branch.spatial):
            layer.load_state_dict(self.backbone.blocks[str(self.config.fork + j)].state_dict())

    def fold(self, dtype: torch.dtype | None = None) -> "BTAdapter":
        """An inference copy with products of weights worked out beforehand; see pyvidx.models.fold."""
        return fold(self, dtype)

    def train(self, mode: bool = True) -> "BTAdapter":
        if mode and getattr(self, "folded", False):
            raise RuntimeError("BTAdapter: a folded copy is for inference; train the model it was made from")
        return super().train(mode)

    def load_state_dict(self, *args, **kwargs):
        if self.folded:
            raise RuntimeError("BTAdapter: a folded copy does not take weights; load the model and fold again")
        return super().load_state_dict(*args, **kwargs)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, configuration included. A path without that ending is a folder."""
        if self.folded:
            raise RuntimeError("BTAdapter: save the model itself, not its folded copy")
        header = {"compat": self.compat, "tower": self.tower, "is_random": self.is_random}
        return files.write(path, "bt_adapter", self, {"config": self.config.to_dict(), **header})

    @classmethod
    def from_pretrained(cls, path: str | Path, *, compat: str | None = None, tower: str | None = None) -> "BTAdapter":
        """Load what `save` wrote, a file or its folder, in eval mode and with the dtypes of the file.

        compat, tower: in place of those saved. Official files are read by pyvidx.weights.bt_adapter.

        Raises:
            FileNotFoundError, ValueError: see pyvidx.models.files.load; compat or tower is unknown.
        """
        model, header = files.load(
            path,
            "bt_adapter",
            lambda header: cls(
                BTAdapterConfig.from_dict(header["config"]),
                compat=compat or header["compat"],
                tower=tower or header["tower"],
            ),
        )
        model.backbone.requires_grad_(False)
        model.is_random = header["is_random"]
        return model
