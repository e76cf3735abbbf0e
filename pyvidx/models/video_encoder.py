"""An image tower and a temporal module of any kind: videos to tokens and one vector."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyvidx import temporal
from pyvidx.backbones.vit import ViT, ViTConfig
from pyvidx.layers.block import run_blocks
from pyvidx.models import files
from pyvidx.models.config import BTAdapterConfig, known
from pyvidx.models.fold import Foldable
from pyvidx.ops import token_gather
from pyvidx.ops._library import require_tensors
from pyvidx.temporal.branch import Branch
from pyvidx.temporal.encoding import Encoding
from pyvidx.temporal.frames import check_frame_mask, on_real_frames, real_only
from pyvidx.temporal.module import OUTPUTS, TemporalModule


class VideoEncoder(Foldable):
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

    kind = "video_encoder"  # in the header of its files

    def __init__(self, tower: ViT, temporal: TemporalModule):
        super().__init__()
        self._check(tower, temporal)
        self.tower, self.temporal = tower, temporal
        self.tower.requires_grad_(False)
        self.is_random = True

    @staticmethod
    def _check(tower: ViT, temporal: TemporalModule) -> None:
        whole = hasattr(tower, "patch") and tower.norm_post is not None and tower.layers == range(tower.config.layers)
        if not whole or temporal.vision != tower.config:
            raise ValueError(
                "VideoEncoder: tower must be a whole one, of the sizes the module was made for, got "
                f"{tower.config} and {temporal.vision}"
            )
        if getattr(temporal, "spec", None) is None:  # else it could not be saved
            raise ValueError("VideoEncoder: temporal must be made by pyvidx.temporal.create")

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
            pixels: [B, T, 3, h, w], normalized; cast to the model's dtype.
            outputs: any of "tokens", "pooled"; default all that the model has. What is not asked for is not computed.
            times: [B, T] seconds, passed through.
            mask: bool, True = removed from the branch, [P] or [B, P]; for modules with a branch, and only for
                outputs=("pooled",). See pyvidx.temporal.grouping.
            frame_mask: bool [B, T], True = a real frame: the others, of padded clips, have no influence, whatever they
                hold. Default: all are real.
            interpolate: take pixels of another size than the tower's image_size, multiples of its patch size, with the
                position table resized (bicubic); otherwise they are an error.

        Raises:
            ValueError: pixels, the frame count, a mask or the outputs do not fit.
        """
        wanted, pixels = self._wanted(outputs, mask), self.read_pixels(pixels)
        real = self._real(frame_mask, pixels)
        rows, columns = self.tower.grid_of(pixels, self._name)
        self.tower.positions(rows, columns, interpolate=interpolate)  # refuses what does not fit before the work
        self._check_clip(pixels.shape[1], rows * columns, real, mask)
        grid = _grid_option((rows, columns), interpolate)
        if self.temporal.reads_only:
            xs = self._run_tower(pixels, real, wanted, interpolate, class_row=self.temporal.class_row)
        else:
            xs = self._run_inside(real_only(pixels, real), real, wanted, grid)
        return self._encode(xs, real, wanted, mask, grid, times)

    def layers(
        self,
        pixels: Tensor,
        *,
        outputs: Sequence[str] | None = None,
        frame_mask: Tensor | None = None,
        interpolate: bool = False,
    ) -> tuple[Tensor, ...]:
        """What `from_layers` takes, to be stored: the tower's outputs for a module that only reads them.

        Returns:
            [B, T, 1+P, C] per layer of temporal.reads, but for the last one if "pooled" is not in outputs; zeros where
            a frame is not real.
        """
        self._need_reads_only()
        wanted, pixels = self._wanted(outputs), self.read_pixels(pixels)
        return self._run_tower(pixels, self._real(frame_mask, pixels), wanted, interpolate)

    def from_layers(
        self,
        xs: Sequence[Tensor],
        *,
        outputs: Sequence[str] | None = None,
        times: Tensor | None = None,
        mask: Tensor | None = None,
        frame_mask: Tensor | None = None,
        interpolate: bool | tuple[int, int] = False,
    ) -> Encoding:
        """The same as `forward` from what `layers` gave.

        Args:
            interpolate: True for layers of pixels of another size; (rows, columns) of their patches where these are no
                square.
        """
        self._need_reads_only()
        wanted = self._wanted(outputs, mask)
        reads = self._reads(wanted)
        require_tensors(self._name, **{f"xs[{i}]": x for i, x in enumerate(xs)})
        if len(xs) not in (len(reads), len(self.temporal.reads)):
            raise ValueError(
                f"{self._name}: {' and '.join(wanted)} need the outputs of backbone layers {list(reads)}, "
                f"got {len(xs)} tensors"
            )
        grid = self.grid_of(xs, interpolate)
        real = self._real(frame_mask, xs[0])
        self._check_clip(xs[0].shape[1], xs[0].shape[2] - 1, real, mask)
        xs = [real_only(x, real) for x in xs[: len(reads)]]
        return self._encode(xs, real, wanted, mask, _grid_option(grid, interpolate), times)

    def from_features(
        self,
        features: Tensor,
        *,
        outputs: Sequence[str] | None = None,
        times: Tensor | None = None,
        mask: Tensor | None = None,
        frame_mask: Tensor | None = None,
        interpolate: bool | tuple[int, int] = False,
    ) -> Encoding:
        """The same as `forward` from the input of the first backbone layer that the module reads.

        Args:
            features: [B, T, 1+P, C], floating; cast to the model's dtype.
            interpolate: as in `from_layers`.
        """
        self._need_reads_only()
        wanted, x = self._wanted(outputs, mask), self.read_features(features)
        grid, real = self.grid_of([x], interpolate), self._real(frame_mask, x)
        self._check_clip(x.shape[1], x.shape[2] - 1, real, mask)
        xs = on_real_frames(lambda x: self._run_blocks(x, self._reads(wanted)), x, real)
        return self._encode(xs, real, wanted, mask, _grid_option(grid, interpolate), times)

    @property
    def hidden_layers(self) -> int:
        """How many layers `hidden` can give: those that the module takes part in or runs beside."""
        module = self.temporal
        return module.depth if isinstance(module, Branch) else self.tower.config.layers

    def hidden(self, pixels: Tensor, keep: Tensor, last: int) -> list[Tensor]:
        """Patch tokens of the last layers, of an encoder that sees some of the patches: of every frame of a clip the
        same. A branch sees those, and the backbone beside it all; otherwise those are all that the tower sees.

        Args:
            keep: int64 [B, K], the patches.
            last: number of layers.

        Returns:
            [B, T, K, C] each, before any norm.
        """
        pixels, tower, module = self.read_pixels(pixels), self.tower, self.temporal
        T, P, grid = pixels.shape[1], tower.config.patches, (1, keep.shape[1])
        self._check_clip(T, P, None, None)
        if isinstance(module, Branch):
            xs = self._run_tower(pixels, None, ("pooled",), False)
            group = dataclasses.replace(module.grouping(T, P), keep=keep, masked=True)
            rows = module.branch.rows(xs, module.positions(tower), group, seed=module.seed(tower))
            return [x[:, :, 1:] for x in rows[-last:]]
        x = tower.tokens(pixels)
        before, patches = x[:, :, : module.before], token_gather(x[:, :, module.before :], keep)
        x, found = tower.norm_pre(module.embed(torch.cat([before, patches], dim=2), tower, grid=grid)), []
        for i in tower.layers:
            x = module.block(i, tower.blocks[str(i)], x, grid=grid)
            found.append(module.patches(x, grid))
        return found[-last:]

    def read_pixels(self, pixels: Tensor) -> Tensor:
        """The forms `forward` takes -> [B, T, 3, h, w]."""
        require_tensors(self._name, pixels=pixels)
        shape = tuple(pixels.shape)
        if pixels.dim() != 5 or shape[2] != 3 or not shape[1]:
            hint = "; channel-first clips are pixels.transpose(1, 2)" if len(shape) == 5 and shape[1] == 3 else ""
            raise ValueError(
                f"{self._name}: pixels must be [B, T, 3, h, w], T > 0 (each frame its 3 channels), got {shape}{hint}"
            )
        return pixels

    def read_features(self, features: Tensor) -> Tensor:
        """The forms `from_features` takes -> [B, T, 1+P, C] in the model's dtype."""
        require_tensors(self._name, features=features)
        if features.dim() != 4 or not features.is_floating_point():
            raise ValueError(
                f"{self._name}: features must be floating [B, T, 1+P, C], got {tuple(features.shape)} {features.dtype}"
            )
        return features.to(self.tower.position.dtype)

    def _encode(
        self,
        xs: Sequence[Tensor],
        real: Tensor | None,
        wanted: Sequence[str],
        mask: Tensor | None,
        grid: dict[str, Any],
        times: Tensor | None,
    ) -> Encoding:
        options = grid if mask is None else {**grid, "mask": mask}
        xs = xs if "pooled" in wanted else (*xs, None)
        return dataclasses.replace(self.temporal.encode(xs, self.tower, real, wanted, **options), times=times)

    def _run_tower(
        self,
        pixels: Tensor,
        real: Tensor | None,
        wanted: Sequence[str],
        interpolate: bool,
        class_row: bool = False,
    ) -> tuple[Tensor, ...]:
        reads, class_row = self._reads(wanted), class_row and "pooled" in wanted
        run = functools.partial(self.tower, layers=reads, interpolate=interpolate, class_row=class_row)
        return on_real_frames(run, pixels, real)

    def _run_inside(
        self, pixels: Tensor, real: Tensor | None, wanted: Sequence[str], grid: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        found, reads, tokens = [], self._reads(wanted), self.tower.tokens(pixels, interpolate=bool(grid))
        x = self.tower.norm_pre(self.temporal.embed(tokens, self.tower, real, **grid))
        for i in range(reads.stop):
            x = self.temporal.block(i, self.tower.blocks[str(i)], x, real, **grid)
            if i in reads:
                found.append(self.temporal.rows(x, self.tower, real, **grid))
        return tuple(found)

    def _run_blocks(self, x: Tensor, layers: range) -> tuple[Tensor, ...]:
        blocks = [self.tower.blocks[str(i)] for i in layers]
        return tuple(map(self.tower.with_class, run_blocks(blocks, self.tower.own(x), range(len(blocks)))))

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _reads(self, wanted: Sequence[str]) -> range:
        """The backbone layers whose outputs are needed."""
        reads = self.temporal.reads
        return reads if "pooled" in wanted else reads[:-1]

    def _check_clip(self, T: int, P: int, real: Tensor | None, mask: Tensor | None) -> None:
        self.temporal.check(T, P, real, **({} if mask is None else {"mask": mask}))

    def grid_of(self, xs: Sequence[Tensor], interpolate: bool | tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the patches of stored tokens.

        Raises:
            ValueError: they do not fit the tower.
        """
        C, P = self.tower.config.width, self.tower.config.patches
        N = xs[0].shape[2] if interpolate and xs[0].dim() == 4 else 1 + P
        if any(x.dim() != 4 or x.shape[2:] != (N, C) or not x.shape[1] or x.shape != xs[0].shape for x in xs):
            raise ValueError(
                f"{self._name}: backbone tokens must be [B, T, {N}, {C}], T > 0, got {[tuple(x.shape) for x in xs]}; "
                "those of pixels of another size need interpolate=True"
            )
        return self.tower.grid(N - 1, interpolate)

    def _need_reads_only(self) -> None:
        if not self.temporal.reads_only:
            raise ValueError(
                f"{self._name}: {self.temporal.name} works inside the tower, whose outputs can not be stored"
            )

    def _real(self, frame_mask: Tensor | None, x: Tensor) -> Tensor | None:
        return check_frame_mask(self._name, frame_mask, *x.shape[:2], x.device)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the model can give, of "tokens" and "pooled"."""
        return self.temporal.outputs

    def _wanted(self, outputs: Sequence[str] | None, mask: Tensor | None = None) -> tuple[str, ...]:
        have = self.outputs
        wanted = have if outputs is None else tuple(o for o in OUTPUTS if o in outputs)
        if not wanted or not set(wanted) <= set(have) or (outputs is not None and not set(outputs) <= set(OUTPUTS)):
            raise ValueError(f"{self._name}: outputs must be some of {have}, which the model has, got {outputs!r}")
        if mask is not None and not self.temporal.masks:
            raise ValueError(f"{self._name}: {self.temporal.name} has no branch that a mask could remove patches from")
        if mask is not None and "tokens" in wanted:
            raise ValueError(f"{self._name}: tokens need all patches; with a mask ask for outputs=('pooled',)")
        return wanted

    def header(self) -> dict[str, Any]:
        """What `built` makes it of, as data."""
        return {"vision": dataclasses.asdict(self.tower.config), "temporal": self.temporal.spec}

    @classmethod
    def built(cls, header: dict[str, Any]) -> "VideoEncoder":
        """A model with random weights, of the sizes that `header` gave.

        Raises:
            Exception: of any kind, where the header describes no model; see pyvidx.models.files.REFUSALS.
        """
        vision = ViTConfig(**known(ViTConfig, header["vision"]))
        return cls(ViT(vision), temporal.create(vision=vision, **header["temporal"]))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, configuration included. A path without that ending is a folder."""
        self.check_whole()
        return files.write(path, self.kind, self, {**self.header(), "is_random": self.is_random})

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "VideoEncoder":
        """Load what `save` wrote, a file or its folder, in eval mode and with the dtypes of the file.

        Raises:
            FileNotFoundError, ValueError: see pyvidx.models.files.load.
        """
        return cls._loaded(path, {})

    @classmethod
    def _loaded(cls, path: str | Path, changes: dict[str, Any]) -> "VideoEncoder":
        """changes: entries of the header, in place of those saved."""
        model, header = files.load(path, cls.kind, lambda header: cls.built(header | changes))
        model.tower.requires_grad_(False)
        model.is_random = header["is_random"]
        return model

    @classmethod
    def default(cls, name: str = "bt_adapter", size: str = "tiny", **options: Any) -> "VideoEncoder":
        """A model with random weights, always the same ones, to try things out. `is_random` is True."""
        vision = BTAdapterConfig.named(size).vision
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls(ViT(vision), temporal.create(name, vision, **options)).eval()


def _grid_option(grid: tuple[int, int], interpolate: bool | tuple[int, int]) -> dict[str, Any]:
    """What a temporal module is told of the grid: nothing where it must be the tower's own."""
    return {"grid": grid} if interpolate else {}
