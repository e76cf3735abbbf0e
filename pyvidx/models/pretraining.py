"""Contrastive pretraining of a video encoder: a frozen text tower, and of modules with a branch BT-Adapter's masks and
token losses, in which the image tower teaches the branch beside it (arXiv:2309.15785, section 3.2)."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyvidx.backbones.text import TextTower
from pyvidx.layers.linear import dense
from pyvidx.models.losses import GRADIENTS, alignment, contrastive, gather
from pyvidx.models.video_encoder import VideoEncoder
from pyvidx.ops import token_gather
from pyvidx.temporal.branch import Branch
from pyvidx.temporal.bt_adapter import split_rows
from pyvidx.temporal.grouping import MASK_ORDERS, Grouping
from pyvidx.temporal.masking import Drops, drop_path_draws, tube_mask


class Losses(NamedTuple):
    """Weighted scalars, float32 or wider.

    Attributes:
        vtc: video-text contrast.
        mbca: masked branch-text (cross-modal) alignment; None without a branch.
        mbta: masked branch-token alignment; None without a branch.
    """

    vtc: Tensor
    mbca: Tensor | None = None
    mbta: Tensor | None = None

    @property
    def named(self) -> dict[str, Tensor]:
        """Those there are, by name."""
        return {name: loss for name, loss in self._asdict().items() if loss is not None}

    @property
    def total(self) -> Tensor:
        return sum(self.named.values())


class Pretraining(nn.Module):
    """The model, the frozen text tower and, for a branch, the head of the token loss, which is thrown away afterwards.

    Trained are the temporal module, the head and, if asked for, the image tower: the rest asks for no gradient and,
    where it can, runs without one. Wrap it in DistributedDataParallel for several processes.

    A module with a branch (pyvidx.temporal.Branch and its kinds) has all three losses, and its branch sees part of the
    patches; any other has the video-text contrast alone.

    Args:
        model: of any tower and temporal module, not folded, and of a BTAdapter the full one.
        text: of the same embedding width.
        train_tower: train the image tower as well. It is then its own teacher in the token loss, as it is at the step.
        mask_rate: int(mask_rate * P) patches of every video are removed from the branch; the backbone sees all.
        mask_order: "tube", or "official": the public code's order, in which slots and groups are mixtures and a token's
            teacher is another token's; see pyvidx.temporal.grouping.
        gradient: see pyvidx.models.losses.gather. With "official" the token loss weighs more the more processes
            there are.
        weights: of the losses, in the order of Losses.
        scale: of the cosines in both contrastive losses.
        drop_path: of the last branch layer, in training mode; the rates rise linearly from 0.
        checkpointing: compute the branch's layers again in the backward pass instead of keeping what is inside them.
        micro_batch: videos of which the module is computed at a time, and again in the backward pass: memory for its
            activations is that of so many, while the contrastive losses compare all. The same losses and gradients
            (those of GradCache, arXiv:2101.06983). None: all at once. Of a branch beside a trained tower, the tower's
            activations are kept all the same.

    Raises:
        ValueError: the model or an option does not fit, or there is nothing to train.
    """

    def __init__(
        self,
        model: VideoEncoder,
        text: TextTower,
        *,
        train_tower: bool = False,
        mask_rate: float = 0.7,
        mask_order: str = "tube",
        gradient: str = "global",
        weights: tuple[float, float, float] = (1.0, 0.1, 0.1),
        scale: float = 100.0,
        drop_path: float = 0.1,
        checkpointing: bool = False,
        micro_batch: int | None = None,
    ):
        super().__init__()
        v = model.tower.config
        E = v.width if v.embed_dim is None else v.embed_dim
        if model.folded or "pooled" not in model.outputs:
            raise ValueError("Pretraining: model must have a pooled embedding and not be folded")
        if text.config.embed_dim != E:
            raise ValueError(f"Pretraining: text must have the model's embed_dim {E}, got {text.config.embed_dim}")
        if mask_order not in MASK_ORDERS or gradient not in GRADIENTS:
            raise ValueError(
                f"Pretraining: mask_order must be one of {MASK_ORDERS} and gradient of {GRADIENTS}, "
                f"got {mask_order!r}, {gradient!r}"
            )
        if micro_batch is not None and (type(micro_batch) is not int or micro_batch < 1):
            raise ValueError(f"Pretraining: micro_batch must be at least 1 or None, got {micro_batch}")
        if not (0 <= mask_rate < 1 and 0 <= drop_path < 1):
            raise ValueError(f"Pretraining: mask_rate and drop_path must be in [0, 1), got {mask_rate} and {drop_path}")
        if len(weights) != 3 or not all(map(math.isfinite, (*weights, scale))):
            raise ValueError(f"Pretraining: weights must be 3 finite numbers and scale one, got {weights} and {scale}")
        if not train_tower and not any(p.requires_grad for p in model.temporal.parameters()):
            raise ValueError(
                f"Pretraining: {model.temporal.name} has no parameters to train; train the tower with train_tower=True"
            )
        self.model, self.text, self.train_tower = model, text.requires_grad_(False), train_tower
        self.model.tower.requires_grad_(train_tower)
        self.head = None
        if self.has_branch:
            self.model.temporal.branch.checkpointing = checkpointing
            self.head = nn.Sequential(nn.Linear(v.width, E), nn.LayerNorm(E))
        self.mask_rate, self.mask_order, self.gradient = mask_rate, mask_order, gradient
        self.weights, self.scale, self.drop_path, self.micro_batch = weights, scale, drop_path, micro_batch

    @property
    def has_branch(self) -> bool:
        return isinstance(self.model.temporal, Branch)

    @property
    def storable(self) -> bool:
        """What `frozen` gives is the same in every epoch: it may be stored."""
        return self.has_branch and not self.train_tower

    def forward(
        self,
        pixels: Tensor,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        drops: Drops | None = None,
        generator: torch.Generator | None = None,
    ) -> Losses:
        """The losses of a batch of videos and their texts.

        Args:
            pixels: [B, T, 3, h, w], normalized, as the model takes them.
            ids: int64 [B, L] token ids.
            mask: bool, True = removed: [B, P] (a tube) or [B, T*P] (frame-major); default drawn. For a branch.
            drops: from pyvidx.temporal.masking.drop_path_draws; default drawn in training mode, none in eval mode. For
                a branch.
            generator: of the draws.
        """
        with torch.no_grad():
            text = self.text(ids)
        return self.from_pixels(pixels, text, mask=mask, drops=drops, generator=generator)

    def from_pixels(
        self,
        pixels: Tensor,
        text: Tensor,
        *,
        mask: Tensor | None = None,
        drops: Drops | None = None,
        generator: torch.Generator | None = None,
    ) -> Losses:
        """The same from text embeddings [B, E]."""
        if self.has_branch:
            with nullcontext() if self.train_tower else torch.no_grad():
                xs = self.model.layers(pixels, outputs=("pooled",))
            return self.from_layers(xs, text, mask=mask, drops=drops, generator=generator)
        if mask is not None or drops is not None:
            raise ValueError(f"Pretraining: {self.model.temporal.name} has no branch for a mask or drops")

        def embed(rows: slice) -> tuple[Tensor]:
            return (self.model(pixels[rows], outputs=("pooled",)).pooled,)

        (videos,) = zip(*self._in_parts(embed, len(pixels)))
        return self._compared(text, torch.cat(videos))

    @torch.no_grad()
    def frozen(self, pixels: Tensor, ids: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """What `from_layers` takes, from what `forward` takes: the part that no training changes, see `storable`."""
        return self.model.layers(pixels, outputs=("pooled",)), self.text(ids)

    def from_layers(
        self,
        xs: Sequence[Tensor],
        text: Tensor,
        *,
        mask: Tensor | None = None,
        drops: Drops | None = None,
        generator: torch.Generator | None = None,
    ) -> Losses:
        """The same from what the frozen towers give, which may be cached; of a model with a branch.

        Args:
            xs: [B, T, 1+P, C] of the backbone layers that the branch reads.
            text: [B, E] text embeddings.
        """
        reads = self.model.temporal.reads
        if not self.has_branch or len(xs) != len(reads):
            raise ValueError(
                f"Pretraining: xs must be the outputs of backbone layers {list(reads)}, for a branch, got {len(xs)} "
                f"tensors for {self.model.temporal.name}"
            )
        return self.losses(xs, text, self.grouping(xs[0], mask, generator), drops, generator)

    def losses(
        self,
        xs: Sequence[Tensor],
        text: Tensor,
        group: Grouping,
        drops: Drops | None = None,
        generator: torch.Generator | None = None,
    ) -> Losses:
        """The same for the tokens of a grouping."""
        B = len(xs[0])
        if drops is None:
            drops = self.draw_drops(xs[0], group, generator)

        def embed(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            part = replace(group, keep=group.keep[rows])
            dropped = drops and [layer and tuple(drop[rows] for drop in layer) for layer in drops]
            return self.embed([x[rows] for x in xs], part, dropped)

        videos, branches, tokens = zip(*self._in_parts(embed, B))
        token = sum(len(video) / B * loss for video, loss in zip(videos, tokens))  # a mean over equally many of each
        return self._compared(text, torch.cat(videos), torch.cat(branches), token)

    def _compared(
        self, text: Tensor, video: Tensor, branch: Tensor | None = None, token: Tensor | None = None
    ) -> Losses:
        """The losses of the embeddings [B, E] of all processes."""
        vtc, mbca, mbta = self.weights
        video, text = (gather(e, gradient=self.gradient) for e in (video, text))
        losses = Losses(vtc * contrastive(video, text, scale=self.scale))
        if branch is None:
            return losses
        branch = gather(branch, gradient=self.gradient)
        return losses._replace(mbca=mbca * contrastive(branch, text, scale=self.scale), mbta=mbta * token)

    def embed(self, xs: Sequence[Tensor], group: Grouping, drops: Drops | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of each video two embeddings [B, E], of its class token and of its kept tokens, and the token loss of all."""
        z, cls, mean = split_rows(self.rows(xs, group, drops)[-1], mean=True)  # [B, S, K, C], [B, C] twice
        tower, (first, norm) = self.model.tower, self.head
        video = tower.project(self.model.temporal.frame_vectors(xs[-1], cls, tower).mean(dim=1))
        # The projection is linear: the mean of the tokens' projections is the projection of their mean.
        return video, tower.project(mean), alignment(norm(dense(z, first)), self.teacher(xs[-1], group))

    def _in_parts(self, embed: Callable[[slice], tuple[Any, ...]], B: int) -> list[tuple[Any, ...]]:
        """embed of micro_batch videos at a time."""
        if self.micro_batch is None or self.micro_batch >= B:
            return [embed(slice(None))]
        parts = [slice(first, first + self.micro_batch) for first in range(0, B, self.micro_batch)]
        if not torch.is_grad_enabled():
            return [embed(rows) for rows in parts]
        # Nothing is drawn inside.
        return [checkpoint(embed, rows, use_reentrant=False, preserve_rng_state=False) for rows in parts]

    def draw_drops(self, x: Tensor, group: Grouping, generator: torch.Generator | None = None) -> Drops | None:
        """DropPath of a batch of backbone tokens x, in training mode."""
        if not self.training:
            return None
        B, S, K = x.shape[0], group.frames, group.keep.shape[-1]
        where = {"device": x.device, "generator": generator}
        return drop_path_draws(self.drop_path, self.model.temporal.depth, B, S, K, **where)

    def rows(self, xs: Sequence[Tensor], group: Grouping, drops: Drops | None) -> list[Tensor]:
        """Every branch layer's tokens [B, S, 1 + K, C], as BTAdapterBranch.rows gives them."""
        module, tower = self.model.temporal, self.model.tower
        return module.branch.rows(xs, module.positions(tower), group, drops, module.seed(tower))

    def grouping(self, x: Tensor, mask: Tensor | None, generator: torch.Generator | None = None) -> Grouping:
        """Of the tokens that the branch keeps of backbone tokens x [B, T, 1+P, C]."""
        self.model.grid_of([x], False)  # refuses a wrong shape
        B, T, P = x.shape[0], x.shape[1], x.shape[2] - 1
        if self.model.temporal.grouping(T, P).pair:
            raise ValueError(
                f"Pretraining: T must be at most {self.model.temporal.time_length}, the rows of the time table, got {T}"
            )
        kept = None
        if mask is None:
            mask, kept = (
                tube_mask(B, P, self.mask_rate, device=x.device, generator=generator),
                P - int(self.mask_rate * P),
            )
        if mask.dim() != 2 or mask.shape[0] != B:
            raise ValueError(f"Pretraining: mask must be [B, P] or [B, T*P] with B = {B}, got {tuple(mask.shape)}")
        if self.mask_order == "official" and mask.shape[1] == P:
            mask, kept = mask.repeat(1, T), kept and kept * T  # frame-major, as it is drawn there
        options = {"mask": mask, "mask_order": self.mask_order, "kept": kept, "device": x.device}
        return self.model.temporal.grouping(T, P, **options)

    @torch.no_grad()
    def teacher(self, x: Tensor, group: Grouping) -> Tensor:
        """projection(LN(tokens)) of the last backbone layer x [B, T, 1+P, C] for the kept tokens -> [B, S, K, E]."""
        keep, T, P = group.keep, group.frames, group.patches
        if self.mask_order == "official":  # the patch-major index of the kept token, read as a frame-major one
            keep = keep % P * T + keep // P
        tokens = token_gather(x[:, :, 1:], keep)
        return self.model.tower.project(self.model.tower.norm(tokens))
