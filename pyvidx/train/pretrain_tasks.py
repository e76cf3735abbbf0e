"""Objectives of pretraining as Tasks: the contrastive one on videos with captions, and UMT's on videos alone."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pyvidx.models import VideoEncoder
from pyvidx.models.pretraining import Pretraining
from pyvidx.models.umt import UnmaskedTeacher
from pyvidx.temporal.masking import Drops, drop_path_draws, random_mask, tube_mask
from pyvidx.train.data import generator
from pyvidx.train.outputs import written
from pyvidx.train.pairs import Pairs
from pyvidx.train.task import Task
from pyvidx.train.tokens import Tokenize
from pyvidx.weights.mma_export import export_mma, has_official_names


class ContrastiveTask(Task):
    """Videos and captions, see Pretraining. Trained: the temporal module, the head of the token loss, and the tower if
    asked for.

    Masks and DropPath of a branch are drawn for each sample from seed, epoch and row, so they depend on neither the
    number of processes nor on where a run was ended.

    Args:
        step: on its device.
        tokenize: captions to ids.
        mask: "tube" or "random".
        seed: of the draws.
    """

    whole_batch = True

    def __init__(self, step: Pretraining, tokenize: Tokenize, *, mask: str = "tube", seed: int = 42):
        super().__init__()
        self.step, self.tokenize, self.mask, self.seed = step, tokenize, mask, seed

    @property
    def model(self) -> VideoEncoder:
        return self.step.model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def count(self, batch: Pairs) -> int:
        return len(batch)

    def forward(self, batch: Pairs) -> dict[str, Tensor]:
        """Losses by their names."""
        mask, drops = self.draws(batch.at, batch.frames)
        if isinstance(batch.text, Tensor):
            # Contiguous, as from the backbone: with other strides sums are taken in another order.
            xs = [x.contiguous() for x in batch.video.to(self.device).unbind(1)]
            losses = self.step.from_layers(xs, batch.text.to(self.device), mask=mask, drops=drops)
        else:
            losses = self.step(*self.inputs(batch), mask=mask, drops=drops)
        return losses.named

    def inputs(self, batch: Pairs) -> tuple[Tensor, Tensor]:
        """pixels [B, T, 3, h, w] and ids [B, L]."""
        return batch.video.to(self.device), self.tokenize(batch.text).to(self.device)

    def frozen(self, batch: Pairs) -> tuple[tuple[Tensor, ...], Tensor]:
        """What the frozen towers give, see Pretraining.frozen."""
        return self.step.frozen(*self.inputs(batch))

    def draws(self, at: Sequence[tuple[int, int]], T: int) -> tuple[Tensor | None, Drops | None]:
        """Masks [B, P] or [B, T*P] of samples, and in training mode their drops; none without a branch."""
        if not self.step.has_branch:
            return None, None
        P, rate, depth = self.model.tower.config.patches, self.step.mask_rate, self.model.temporal.depth
        tube = self.mask == "tube"
        masks, drops = [], []
        for epoch, row in at:
            draws = generator(self.seed, epoch, row, "mask")
            mask = tube_mask(1, P, rate, generator=draws) if tube else random_mask(1, T, P, rate, generator=draws)
            K = int((~mask).sum()) // (1 if tube else T)  # kept in a frame slot
            masks.append(mask)
            drops.append(drop_path_draws(self.step.drop_path, depth, 1, T, K, generator=draws))
        layers = [
            None if layer[0] is None else tuple(torch.cat(part).to(self.device) for part in zip(*layer))
            for layer in zip(*drops)
        ]
        return torch.cat(masks).to(self.device), layers if self.training else None

    @property
    def exportable(self) -> bool:
        return has_official_names(self.step)

    def export(self, path: Path, epoch: int) -> None:
        """All weights under the official names: .safetensors, or .pth as the public code writes it."""
        weights = {name: value.cpu().contiguous() for name, value in export_mma(self.step).items()}
        with written(path) as part:
            if path.suffix == ".safetensors":
                save_file(weights, part)
            else:
                torch.save({"meta": {"epoch": epoch}, "state_dict": weights}, part)


class UMTTask(Task):
    """Videos alone, see pyvidx.models.umt; captions are not read. Trained: what of the encoder asks for gradients, and
    the heads. The visible patches of a sample are drawn from seed, epoch and row.

    Args:
        step: on its device, of a VideoEncoder.
        seed: of the draws.
    """

    some_unused = True  # heads of the encoder's own
    exportable = False

    def __init__(self, step: UnmaskedTeacher, *, seed: int = 42):
        super().__init__()
        self.step, self.seed = step, seed

    @property
    def model(self) -> VideoEncoder:
        return self.step.student.encoder

    def count(self, batch: Pairs) -> int:
        return len(batch)

    def forward(self, batch: Pairs) -> Tensor:
        pixels = batch.video.to(next(self.step.heads.parameters()).device)
        xs = self.step.taught(pixels)
        attention = self.step.attention(xs).cpu()
        visible = [
            self.step.draw(attention[i : i + 1], generator(self.seed, epoch, row, "mask"))
            for i, (epoch, row) in enumerate(batch.at)
        ]
        return self.step.loss(pixels, xs, torch.cat(visible).to(pixels.device))
