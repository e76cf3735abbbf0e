"""BT-Adapter's masked pretraining (arXiv:2309.15785, section 3.2): a frozen CLIP teaches the branch beside it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyvidx.backbones.text import TextTower
from pyvidx.layers.linear import dense
from pyvidx.models.bt_adapter import BTAdapter
from pyvidx.models.losses import GRADIENTS, alignment, contrastive, gather
from pyvidx.ops import token_gather
from pyvidx.temporal.bt_adapter import split_rows
from pyvidx.temporal.grouping import MASK_ORDERS, Grouping
from pyvidx.temporal.masking import Drops, drop_path_draws, tube_mask


class Losses(NamedTuple):
    """Weighted scalars, float32 or wider.

    Attributes:
        vtc: video-text contrast.
        mbca: masked branch-text (cross-modal) alignment.
        mbta: masked branch-token alignment.
    """

    vtc: Tensor
    mbca: Tensor
    mbta: Tensor

    @property
    def total(self) -> Tensor:
        return self.vtc + self.mbca + self.mbta


class Pretraining(nn.Module):
    """The model, the frozen text tower and the head of the token loss, which is thrown away afterwards.

    Only the branch, the gates and the head are trained: the rest asks for no gradient and runs without one. Wrap it in
    DistributedDataParallel for several processes.

    Args:
        model: config.part "full" with a projection, not folded.
        text: of the same embedding width.
        mask_rate: int(mask_rate * P) patches of every video are removed from the branch; the backbone sees all.
        mask_order: "tube", or "official": the public code's order, in which slots and groups are mixtures and a token's
            teacher is another token's; see pyvidx.temporal.grouping.
        gradient: see pyvidx.models.losses.gather. With "official" the token loss weighs more the more processes
            there are.
        weights: of the losses, in the order of Losses.
        scale: of the cosines in both contrastive losses.
        drop_path: of the last branch layer, in training mode; the rates rise linearly from 0.
        checkpointing: compute the branch's layers again in the backward pass instead of keeping what is inside them.
        micro_batch: videos of which the branch is computed at a time, and again in the backward pass: memory for its
            activations is that of so many, while the contrastive losses compare all. The same losses and gradients
            (those of GradCache, arXiv:2101.06983). None: all at once.

    Raises:
        ValueError: the model or an option does not fit.
    """

    def __init__(
        self,
        model: BTAdapter,
        text: TextTower,
        *,
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
        v = model.config.vision
        if model.folded or model.tower.projection is None:
            raise ValueError("Pretraining: model must be a full one with a projection, and not folded")
        if text.config.embed_dim != v.embed_dim:
            raise ValueError(
                f"Pretraining: text must have the model's embed_dim {v.embed_dim}, got {text.config.embed_dim}"
            )
        if mask_order not in MASK_ORDERS or gradient not in GRADIENTS:
            raise ValueError(
                f"Pretraining: mask_order must be one of {MASK_ORDERS} and gradient of {GRADIENTS}, "
                f"got {mask_order!r}, {gradient!r}"
            )
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"Pretraining: micro_batch must be at least 1 or None, got {micro_batch}")
        self.model, self.text = model, text.requires_grad_(False)
        self.model.tower.requires_grad_(False)
        self.model.temporal.branch.checkpointing = checkpointing
        self.head = nn.Sequential(nn.Linear(v.width, v.embed_dim), nn.LayerNorm(v.embed_dim))
        self.mask_rate, self.mask_order, self.gradient = mask_rate, mask_order, gradient
        self.weights, self.scale, self.drop_path, self.micro_batch = weights, scale, drop_path, micro_batch

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
            pixels: [B, T, 3, h, w], normalized, as BTAdapter takes them.
            ids: int64 [B, L] token ids.
            mask: bool, True = removed: [B, P] (a tube) or [B, T*P] (frame-major); default drawn.
            drops: from pyvidx.temporal.masking.drop_path_draws; default drawn in training mode, none in eval mode.
            generator: of the draws.
        """
        return self.from_layers(*self.frozen(pixels, ids), mask=mask, drops=drops, generator=generator)

    @torch.no_grad()
    def frozen(self, pixels: Tensor, ids: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """What `from_layers` takes, from what `forward` takes: the part that no training changes."""
        return self.model.layers(pixels), self.text(ids)

    def from_layers(
        self,
        xs: Sequence[Tensor],
        text: Tensor,
        *,
        mask: Tensor | None = None,
        drops: Drops | None = None,
        generator: torch.Generator | None = None,
    ) -> Losses:
        """The same from what the frozen towers give, which may be cached.

        Args:
            xs: [B, T, 1+P, C] of backbone layers L-d to L-1.
            text: [B, E] text embeddings.
        """
        if len(xs) != len(self._layers):
            raise ValueError(
                f"Pretraining: xs must be the outputs of backbone layers {list(self._layers)}, got {len(xs)} tensors"
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
        if drops is None:
            drops = self.draw_drops(xs[0], group, generator)
        if self.micro_batch is None or self.micro_batch >= len(xs[0]):
            video, branch, token = self.embed(xs, group, drops)
        else:
            video, branch, token = self._in_parts(xs, group, drops)
        video, branch, text = (gather(e, gradient=self.gradient) for e in (video, branch, text))
        vtc, mbca, mbta = self.weights
        return Losses(
            vtc * contrastive(video, text, scale=self.scale),
            mbca * contrastive(branch, text, scale=self.scale),
            mbta * token,
        )

    def embed(self, xs: Sequence[Tensor], group: Grouping, drops: Drops | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of each video two embeddings [B, E], of its class token and of its kept tokens, and the token loss of all."""
        z, cls, mean = split_rows(self.rows(xs, group, drops)[-1], mean=True)  # [B, S, K, C], [B, C] twice
        tower, (first, norm) = self.model.tower, self.head
        video = dense(self.model.temporal.frame_vectors(xs[-1], cls, tower).mean(dim=1), tower.projection)
        # The projection has no bias: the mean of the tokens' projections is the projection of their mean.
        return video, dense(mean, tower.projection), alignment(norm(dense(z, first)), self.teacher(xs[-1], group))

    def _in_parts(self, xs, group, drops):
        """embed, of micro_batch videos at a time."""
        B, found = xs[0].shape[0], []
        for first in range(0, B, self.micro_batch):
            rows = slice(first, first + self.micro_batch)
            part = replace(group, keep=group.keep[rows])
            dropped = drops and [layer and tuple(drop[rows] for drop in layer) for layer in drops]
            inputs = [x[rows] for x in xs], part, dropped
            if torch.is_grad_enabled():  # nothing is drawn inside
                found.append(checkpoint(self.embed, *inputs, use_reentrant=False, preserve_rng_state=False))
            else:
                found.append(self.embed(*inputs))
        videos, branches, tokens = zip(*found)
        token = sum(len(video) / B * loss for video, loss in zip(videos, tokens))  # a mean over equally many of each
        return torch.cat(videos), torch.cat(branches), token

    def draw_drops(self, x: Tensor, group: Grouping, generator: torch.Generator | None = None) -> Drops | None:
        """DropPath of a batch of backbone tokens x, in training mode."""
        if not self.training:
            return None
        B, S, K = x.shape[0], group.frames, group.keep.shape[-1]
        where = {"device": x.device, "generator": generator}
        return drop_path_draws(self.drop_path, self.model.temporal.depth, B, S, K, **where)

    def rows(self, xs: Sequence[Tensor], group: Grouping, drops: Drops | None) -> list[Tensor]:
        """Every branch layer's tokens [B, S, 1 + K, C], as BTAdapterBranch.rows gives them."""
        return self.model.temporal.branch.rows(xs, self.model.temporal.positions(self.model.tower), group, drops)

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
        return dense(self.model.tower.norm_post(tokens), self.model.tower.projection)

    @property
    def _layers(self) -> range:
        return self.model.temporal.reads
