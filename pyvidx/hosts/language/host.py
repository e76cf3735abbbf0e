"""What a host is: the questions that compress asks of it, and the answers that most hosts share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pyvidx.hosts.language.tokens import Prompt
from pyvidx.ops._library import require


@dataclass(frozen=True)
class Place:
    """Where one video of a batch stands, and what the host's encoder makes of it."""

    number: int  # of the video, in the order of the pixels
    row: int  # of input_ids
    start: int  # of its block in the row: placeholders, and the separators between them
    stop: int
    steps: int  # T, in time, after the encoder (two frames are one step to some)
    positions: int  # P, tokens of a step
    grid: tuple[int, int] | None = None  # (h, w), h * w = P, where they are a picture
    frames_per_step: int = 1
    seconds: Tensor | None = None  # float64 [T] on the CPU, of the steps, once they are known


@dataclass(frozen=True)
class Slots:
    """What is left of one video: M slots of P positions, or, ragged, K tokens.

    Attributes:
        levels: [M, P, C] each, or [K, C] each; of the encoder's dtype. The first decided what became one, the others
            (deepstack) followed.
        seconds: float64 [M] or [K], the middle of each; for slots whose positions merged alone, the mean of those. They
            rise, but for clusters that overlap in time (flash_vstream, tome).
        first, last: float64 [M] or [K], seconds of the first and the last frame in each.
        entry, position: int64 [K] of ragged tokens, the slot and the position that each stands at. None: a grid.
    """

    levels: list[Tensor]
    seconds: Tensor
    first: Tensor
    last: Tensor
    entry: Tensor | None = None
    position: Tensor | None = None

    def __len__(self) -> int:
        """M, or K of ragged tokens"""
        return len(self.levels[0])

    @property
    def ragged(self) -> bool:
        return self.entry is not None

    @property
    def rows(self) -> list[Tensor]:
        """The levels as lists of tokens, [M * P, C] or [K, C] each."""
        return [x if self.ragged else x.flatten(0, 1) for x in self.levels]

    @property
    def tokens(self) -> int:
        """How many those are."""
        return self.levels[0].shape[:-1].numel()


class Host:
    """One model with its processor. A new host defines `videos`, `encode` and `block`, and what differs of the rest.

    Attributes:
        ragged: any number of tokens fits; else slots must have the P positions of a step.
        in_place: each of those must have a place in a step of the video, as the model has positions for it.
        pixels: inputs that the encoded video takes the place of. pictures: those of images.
        passed: inputs that may have the shape of input_ids and are not about its tokens.
        embedded: slots are handed in inputs_embeds.
        reads_prompt: what the encoder makes of a video depends on the prompt.
    """

    ragged: ClassVar[bool] = False
    in_place: ClassVar[bool] = False
    pixels: ClassVar[tuple[str, ...]] = ("pixel_values_videos",)
    pictures: ClassVar[tuple[str, ...]] = ("pixel_values",)
    passed: ClassVar[tuple[str, ...]] = ()
    embedded: ClassVar[bool] = False
    reads_prompt: ClassVar[bool] = False

    def __init__(self, model: nn.Module, processor: Any = None):
        self.model = model
        self.processor = processor
        self.config = model.config

    # What a host defines.

    def videos(self, inputs: Mapping[str, Any], prompt: Prompt) -> list[Place]:
        """Every video of the batch, in the order of the pixels; [] if there is none.

        Raises:
            ValueError: pixels, grids and placeholders do not agree.
        """
        raise NotImplementedError

    def encode(self, inputs: Mapping[str, Any], place: Place, start: int, stop: int) -> list[Tensor]:
        """The model's own encoder and projector over steps start to stop of a video: [stop - start, P, C] of every
        level. The pixels may lie on another device than the model."""
        raise NotImplementedError

    def block(self, place: Place, slots: Slots) -> list[int]:
        """The token ids that take the place of the video's block."""
        return [self.token] * slots.tokens

    # What most share.

    def seconds(self, inputs: Mapping[str, Any], place: Place) -> Tensor:
        """The time of each step as far as the inputs tell: of `video_metadata`, else the numbers of the steps. float64
        [T], or of each frame, on the CPU."""
        known = self.metadata_seconds(inputs, place)
        return torch.arange(place.steps, dtype=torch.float64) if known is None else known

    def features(self, slots: Sequence[Slots]) -> Any:
        """What the model takes as mm_encoder_outputs["video"], for all videos in order. generate with several beams
        counts the tokens of every item of pooler_output, so an item is a video, or one token."""
        return self.output([s.rows[0] for s in slots])

    def encoded(self, inputs: Mapping[str, Any], places: Sequence[Place], slots: Sequence[Slots]) -> dict[str, Any]:
        """mm_encoder_outputs: the videos, and, as the model takes either this or pixels, the images by its own
        encoder."""
        found = dict(inputs.get("mm_encoder_outputs") or {}) | {"video": self.features(slots)}
        if any(inputs.get(name) is not None for name in self.pictures):
            found["image"] = self.images(inputs)
        return found

    def images(self, inputs: Mapping[str, Any]) -> Any:
        """mm_encoder_outputs["image"], of the model's own encoder."""
        crops = {name: inputs[name] for name in self.pictures if isinstance(inputs.get(name), list)}
        # Of unequal numbers of crops: zeros fill up the rest, as processors do it.
        return self.own("get_image_features", inputs, **{name: pad_sequence(x, True) for name, x in crops.items()})

    def handed(
        self, inputs: Mapping[str, Any], new: dict[str, Tensor], places: Sequence[Place], slots: Sequence[Slots]
    ) -> dict[str, Any]:
        """What takes the place of the pixels, by name. new: the inputs along the tokens, as they are now."""
        return {"mm_encoder_outputs": self.encoded(inputs, places, slots)}

    def values(
        self, inputs: Mapping[str, Any], places: Sequence[Place], slots: Sequence[Slots]
    ) -> dict[str, Tensor | None]:
        """Other inputs that change with the videos (grids, times), by name; None: it goes."""
        return {}

    def sized(self, options: Mapping[str, Any], frames: int, clip: int) -> dict[str, Any]:
        """What a processor whose frames get smaller where there are more must be told, so that these frames of a video
        are as large as if they were `clip`. options: what it is told beside."""
        return {}

    # For hosts.

    @property
    def token(self) -> int:
        """The id of the placeholder of videos."""
        return self.config.video_token_id

    @property
    def width(self) -> int:
        """C of the language model."""
        return self.model.get_input_embeddings().weight.shape[-1]

    def own(self, method: str, inputs: Mapping[str, Any], **given: Any) -> Any:
        """Call a method of the base model with what it takes of the inputs, and with what is given, on its device."""
        call = getattr(self.model.base_model, method)  # as generate does; not every class around it has them
        known = inspect.signature(call).parameters
        mine = {name: x for name, x in inputs.items() if name in known} | given
        device = self.model.device
        mine = {name: x.to(device, non_blocking=x.is_cpu) if isinstance(x, Tensor) else x for name, x in mine.items()}
        return call(**mine, return_dict=True)

    def metadata_seconds(self, inputs: Mapping[str, Any], place: Place) -> Tensor | None:
        """The time of each frame, float64 [frames], by `video_metadata` (return_metadata=True of processors); None
        where that is not there, or has no fps or no frames_indices."""
        metadata = inputs.get("video_metadata")
        if metadata is None:
            return None
        count = len(metadata) if isinstance(metadata, list | tuple) else 0
        one = metadata[place.number] if place.number < count else None
        text = f"compress: video_metadata must be of every video, a list of mappings, got {count} and a video"
        require(isinstance(one, Mapping), f"{text} {place.number}", metadata, one)
        fps, indices = one.get("fps"), one.get("frames_indices")
        if not fps or indices is None:
            return None
        try:
            return torch.as_tensor(indices, dtype=torch.float64).cpu() / float(fps)
        except (TypeError, ValueError, RuntimeError) as error:
            text = f"compress: fps and frames_indices of video_metadata must be numbers, for video {place.number}"
            raise ValueError(f"{text}: {error}") from None

    def clips(self, inputs: Mapping[str, Any], vision: Any = None) -> Sequence[Tensor]:
        """The pixels of all videos, [T, channels, h, w] each: of one tensor, or of a list where lengths differ.

        Args:
            vision: the configuration of an encoder that takes images of its image_size alone.
        """
        clips = inputs.get(self.pixels[0])
        if clips is None:
            return []
        several = isinstance(clips, Tensor) and clips.dim() == 5 or isinstance(clips, list | tuple)
        fits = several and all(isinstance(x, Tensor) and x.dim() == 4 and len(x) for x in clips)
        text = f"compress: {self.pixels[0]} must be [videos, T, channels, h, w], or a list of [T, channels, h, w]"
        require(fits, text, clips)
        if vision is not None:
            size, patch, channels = vision.image_size, vision.patch_size, vision.num_channels
            text = f"compress: frames of video {{i}} must be {(channels, size, size)}, as the encoder's"
            for i, (_, C, h, w) in enumerate(x.shape for x in clips):  # a rest beyond the last patch is not looked at
                fits = C == channels and h // patch == w // patch == size // patch
                require(fits, text, clips[i], i=i)
        return clips

    def one_by_one(self, rows: Sequence[Tensor]) -> Any:
        """The tokens of rows [n, C] as items, for models that take one tensor: videos of unequal lengths are none."""
        return self.output(torch.cat(rows)[:, None])

    def output(self, pooled: Any, kind: str = "BaseModelOutputWithPooling", **more: Any) -> Any:
        """One of transformers' outputs, by name."""
        from transformers import modeling_outputs

        return getattr(modeling_outputs, kind)(pooler_output=pooled, **more)
