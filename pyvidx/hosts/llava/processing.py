"""Videos and texts to what LLaVA with BT-Adapter in its tower takes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import BaseVideoProcessor, BatchFeature, ProcessorMixin
from transformers.image_utils import PILImageResampling
from transformers.video_utils import VideoMetadata, make_batched_videos

from pyvidx import video
from pyvidx.hosts.templates import VIDEO
from pyvidx.preprocess import CLIP_MEAN, CLIP_STD, Preset, preprocess

PATCH, START, END = "<vid_patch>", "<vid_start>", "<vid_end>"


class BTAdapterVideoProcessor(BaseVideoProcessor):
    """Frames as the public chat code takes them: squashed by nearest to the tower's size, then normalized as CLIP's.

    Of a video of N frames it takes min(N, num_frames) by the "midpoint" rule of pyvidx.video.sampling, rounded down to
    an even number: the public tower fails on most odd ones. A video of one frame is shown twice. With
    do_sample_frames=False the frames are taken as they are, and the tower says whether it can.

    Paths are read by pyvidx.video, the sampled frames only.
    """

    do_resize = do_rescale = do_normalize = do_convert_rgb = do_sample_frames = True
    size = {"height": 224, "width": 224}
    resample = PILImageResampling.NEAREST
    image_mean = CLIP_MEAN
    image_std = CLIP_STD
    num_frames = 100
    model_input_names = ["pixel_values"]

    def sample_frames(
        self, metadata: VideoMetadata, num_frames: int | None = None, fps: float | None = None, **kwargs: Any
    ) -> Tensor:
        if fps is not None:
            raise ValueError("BTAdapterVideoProcessor: the tower takes a number of frames, give num_frames, not fps")
        num_frames = self.num_frames if num_frames is None else num_frames
        if num_frames < 2:  # the tower's fewest, to which a video of one frame is repeated
            raise ValueError(f"BTAdapterVideoProcessor: num_frames must be 2 or more, got {num_frames}")
        return even_midpoints(metadata.total_num_frames, num_frames)

    def fetch_videos(self, video_url_or_urls: Any, sample_indices_fn: Callable[..., Any] | None = None) -> Any:
        if isinstance(video_url_or_urls, list):
            found = [self.fetch_videos(path, sample_indices_fn) for path in video_url_or_urls]
            return [frames for frames, _ in found], [metadata for _, metadata in found]
        return _read(video_url_or_urls, sample_indices_fn)

    def _preprocess(self, videos: Any, size: Any, image_mean: Any, image_std: Any, **kwargs: Any) -> BatchFeature:
        """pixel_values [B, T, 3, h, w], or a list of [T, 3, h, w] where the T differ.

        By pyvidx.preprocess: transformers' nearest takes other pixels than the public code's.
        """
        if off := [name for name in ("do_resize", "do_rescale", "do_normalize") if not kwargs[name]]:
            raise ValueError(
                f"BTAdapterVideoProcessor: frames are resized and normalized in any case, got {off[0]}=False"
            )
        if kwargs["resample"] != self.resample or kwargs["do_center_crop"] or size.height != size.width:
            raise ValueError("BTAdapterVideoProcessor: frames are squashed to a square by nearest, and not cropped")
        preset = Preset(size.height, "squash", None, "nearest", mean=tuple(image_mean), std=tuple(image_std))
        clips = [preprocess(frames.permute(0, 2, 3, 1), preset) for frames in videos]
        same = len({tuple(clip.shape) for clip in clips}) == 1
        return BatchFeature({"pixel_values": torch.stack(clips) if same else clips})


def even_midpoints(num_frames: int, wanted: int) -> Tensor:
    """Indices of the frames that the tower is given, see BTAdapterVideoProcessor."""
    count = min(num_frames, wanted) // 2 * 2
    return video.sampling.sample("midpoint", num_frames, count) if count else torch.zeros(2, dtype=torch.int64)


def _read(path: str, sample_indices_fn: Callable[..., Any] | None) -> tuple[Tensor, VideoMetadata]:
    """The frames of a file that sample_indices_fn wants, uint8 [T, 3, H, W]; None: all."""
    found = []

    def rule(num_frames: int, wanted: int, fps: float, generator: torch.Generator | None) -> Tensor:
        found.append(VideoMetadata(total_num_frames=num_frames, fps=fps, video_backend="pyvidx"))
        return torch.arange(num_frames) if sample_indices_fn is None else sample_indices_fn(metadata=found[-1])

    clip, metadata = video.read(path, sampler=rule), found[-1]
    metadata.height, metadata.width = clip.frames.shape[1:3]
    metadata.frames_indices = clip.indices.tolist()
    return clip.frames.permute(0, 3, 1, 2), metadata


class BTAdapterLlavaProcessor(ProcessorMixin):
    """A tokenizer and a video processor. Every "<video>" of a text becomes <vid_start>, a <vid_patch> for each token of
    the video, <vid_end>, and the model puts the video's tokens in the places of the <vid_patch>.

        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=text, videos=frames, return_tensors="pt")      # uint8 [T, 3, H, W], or a path
        model.generate(**inputs)

    Args:
        patch_size: of the tower.
    """

    skip_tensor_conversion = ["video_metadata", "text_replacement_offsets", "pixel_values"]

    def __init__(
        self,
        video_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        patch_size: int = 14,
        **kwargs: Any,
    ):
        self.video_token, self.patch_size = VIDEO, patch_size
        super().__init__(video_processor, tokenizer, chat_template=chat_template)
        if absent := [token for token in (PATCH, START, END) if token not in tokenizer.get_vocab()]:
            raise ValueError(
                f"BTAdapterLlavaProcessor: the tokenizer must know {', '.join(absent)}, as one has that came out of "
                "pyvidx.hosts.llava.load"
            )

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """Also in versions of transformers that do not count, and would leave out what nobody here takes."""
        if given := [name for name, x in (("images", images), ("audio", audio)) if x is not None]:
            raise ValueError(
                f"BTAdapterLlavaProcessor: media must be videos, got {given[0]}; an image is a video of one frame"
            )
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)
        texts = [text] if isinstance(text, str) else text or []
        if PATCH in "".join(t for t in texts if isinstance(t, str)):  # would be counted as a token of a video
            raise ValueError(f"BTAdapterLlavaProcessor: texts must not hold {PATCH}; {VIDEO} stands for a video")
        places, given = sum(t.count(VIDEO) for t in texts), 0 if videos is None else len(make_batched_videos(videos))
        if text is not None and places != given:
            raise ValueError(
                f"BTAdapterLlavaProcessor: texts must hold {VIDEO} once per video, got {places} of {given}"
            )

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        height, width = video_inputs["pixel_values"][video_idx].shape[-2:]
        return START + PATCH * ((height // self.patch_size) * (width // self.patch_size) + 1) + END
