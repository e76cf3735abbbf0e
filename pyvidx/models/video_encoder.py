"""A frozen image tower and a temporal module of any kind: videos to tokens and one vector."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pyvidx import temporal
from pyvidx.backbones.vit import ViT, ViTConfig
from pyvidx.models import files
from pyvidx.models.config import BTAdapterConfig, known
from pyvidx.ops._library import require_tensors
from pyvidx.temporal.encoding import Encoding
from pyvidx.temporal.frames import check_frame_mask, on_real_frames, real_only
from pyvidx.temporal.module import OUTPUTS, TemporalModule


class VideoEncoder(nn.Module):
    """tower and temporal module joined.

    The tower starts frozen: its parameters ask for no gradient, so none is recorded where a module only reads its
    outputs; a module inside the tower gets its gradients through the frozen blocks. Parameters that are then set to ask
    for gradients are trained as any others.

    Args:
        tower: a whole one, with embeddings and head.
        temporal: made for a tower of these sizes by pyvidx.temporal.create.

    Attributes:
        is_random: the weights came from no file.
    """

    def __init__(self, tower: ViT, temporal: TemporalModule):
        super().__init__()
        whole = hasattr(tower, "patch") and tower.norm_post is not None and tower.layers == range(tower.config.layers)
        if not whole or temporal.vision != tower.config:
            raise ValueError(
                "VideoEncoder: tower must be a whole one, of the sizes the module was made for, got "
                f"{tower.config} and {temporal.vision}"
            )
        if getattr(temporal, "spec", None) is None:  # else it could not be saved
            raise ValueError("VideoEncoder: temporal must be made by pyvidx.temporal.create")
        self.tower, self.temporal = tower, temporal
        self.tower.requires_grad_(False)
        self.is_random = True

    def forward(
        self,
        pixels: Tensor,
        *,
        frame_mask: Tensor | None = None,
        outputs: Sequence[str] | None = None,
        times: Tensor | None = None,
        interpolate: bool = False,
    ) -> Encoding:
        """Encode videos.

        Args:
            pixels: [B, T, 3, h, w], normalized; cast to the model's dtype.
            frame_mask: bool [B, T], True = a real frame: the others, of padded clips, have no influence, whatever they
                hold. Default: all are real.
            outputs: any of "tokens", "pooled"; default both. What is not asked for is not computed.
            times: [B, T] seconds, passed through.
            interpolate: take pixels of another size than the tower's image_size, multiples of its patch size, with the
                position table resized (bicubic); otherwise they are an error.

        Raises:
            ValueError: pixels, frame_mask, the frame count or outputs do not fit.
        """
        pixels, real, wanted = self._read(pixels), self._real(frame_mask, pixels), self._wanted(outputs)
        reads = self.temporal.reads
        reads = reads if "pooled" in wanted else reads[:-1]
        grid = _grid_option(self.tower.grid_of(pixels, "VideoEncoder"), interpolate)
        if self.temporal.reads_only:
            xs = self._run_tower(pixels, real, reads, interpolate)
        else:
            xs = self._run_inside(real_only(pixels, real), real, reads, grid)
        xs = xs if "pooled" in wanted else (*xs, None)
        return dataclasses.replace(self.temporal.encode(xs, self.tower, real, wanted, **grid), times=times)

    def layers(
        self, pixels: Tensor, *, frame_mask: Tensor | None = None, interpolate: bool = False
    ) -> tuple[Tensor, ...]:
        """What `from_layers` takes, to be stored: the tower's outputs for a module that only reads them.

        Returns:
            [B, T, 1+P, C] per layer of temporal.reads; zeros where a frame is not real.
        """
        self._need_reads_only()
        pixels = self._read(pixels)
        return self._run_tower(pixels, self._real(frame_mask, pixels), self.temporal.reads, interpolate)

    def from_layers(
        self,
        xs: Sequence[Tensor],
        *,
        frame_mask: Tensor | None = None,
        outputs: Sequence[str] | None = None,
        times: Tensor | None = None,
        interpolate: bool | tuple[int, int] = False,
    ) -> Encoding:
        """The same as `forward` from what `layers` gave.

        Args:
            interpolate: True for layers of pixels of another size; (rows, columns) of their patches where these are no
                square.
        """
        self._need_reads_only()
        require_tensors("VideoEncoder", **{f"xs[{i}]": x for i, x in enumerate(xs)})
        wanted, C = self._wanted(outputs), self.tower.config.width
        N = xs[0].shape[2] if interpolate and xs and xs[0].dim() == 4 else 1 + self.tower.config.patches
        if len(xs) != len(self.temporal.reads) or any(x.dim() != 4 or x.shape[2:] != (N, C) for x in xs):
            raise ValueError(
                f"VideoEncoder: xs must be [B, T, {N}, {C}] of backbone layers {list(self.temporal.reads)}, "
                f"got {[tuple(x.shape) for x in xs]}"
            )
        real = self._real(frame_mask, xs[0])
        xs, grid = [real_only(x, real) for x in xs], _grid_option(self.tower.grid(N - 1, interpolate), interpolate)
        return dataclasses.replace(self.temporal.encode(xs, self.tower, real, wanted, **grid), times=times)

    def _run_tower(self, pixels: Tensor, real: Tensor | None, reads: range, interpolate: bool) -> tuple[Tensor, ...]:
        return on_real_frames(lambda x: self.tower(x, reads, interpolate=interpolate), pixels, real)

    def _run_inside(self, pixels: Tensor, real: Tensor | None, reads: range, grid: dict) -> tuple[Tensor, ...]:
        found, tokens = [], self.tower.tokens(pixels, interpolate=bool(grid))
        x = self.tower.norm_pre(self.temporal.embed(tokens, self.tower, real, **grid))
        for i in range(reads.stop):
            x = self.temporal.block(i, self.tower.blocks[str(i)], x, real, **grid)
            if i in reads:
                found.append(self.temporal.rows(x, self.tower, real, **grid))
        return tuple(found)

    def _need_reads_only(self) -> None:
        if not self.temporal.reads_only:
            raise ValueError(
                f"VideoEncoder: {self.temporal.spec['name']} works inside the tower, whose outputs can not be stored"
            )

    @staticmethod
    def _read(pixels: Tensor) -> Tensor:
        require_tensors("VideoEncoder", pixels=pixels)
        if pixels.dim() != 5 or pixels.shape[2] != 3 or not pixels.shape[1]:
            raise ValueError(f"VideoEncoder: pixels must be [B, T, 3, h, w], T > 0, got {tuple(pixels.shape)}")
        return pixels

    @staticmethod
    def _real(frame_mask: Tensor | None, x: Tensor) -> Tensor | None:
        return check_frame_mask("VideoEncoder", frame_mask, *x.shape[:2], x.device)

    @staticmethod
    def _wanted(outputs: Sequence[str] | None) -> tuple[str, ...]:
        wanted = OUTPUTS if outputs is None else tuple(outputs)
        if not wanted or not set(wanted) <= set(OUTPUTS):
            raise ValueError(f"VideoEncoder: outputs must be some of {OUTPUTS}, got {outputs!r}")
        return wanted

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, configuration included. A path without that ending is a folder."""
        sizes = {"vision": dataclasses.asdict(self.tower.config), "temporal": self.temporal.spec}
        return files.write(path, "video_encoder", self, {**sizes, "is_random": self.is_random})

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "VideoEncoder":
        """Load what `save` wrote, a file or its folder, in eval mode and with the dtypes of the file.

        Raises:
            FileNotFoundError, ValueError: see pyvidx.models.files.load.
        """

        def build(header: dict) -> VideoEncoder:
            vision = ViTConfig(**known(ViTConfig, header["vision"]))
            return cls(ViT(vision), temporal.create(vision=vision, **header["temporal"]))

        model, header = files.load(path, "video_encoder", build)
        model.tower.requires_grad_(False)
        model.is_random = header["is_random"]
        return model

    @classmethod
    def default(cls, name: str = "bt_adapter", size: str = "tiny", **options) -> "VideoEncoder":
        """A model with random weights, always the same ones, to try things out. `is_random` is True."""
        vision = BTAdapterConfig.named(size).vision
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls(ViT(vision), temporal.create(name, vision, **options)).eval()


def _grid_option(grid: tuple[int, int], interpolate: bool | tuple[int, int]) -> dict:
    """What a temporal module is told of the grid: nothing where it must be the tower's own."""
    return {"grid": grid} if interpolate else {}
