"""Fewer video tokens for a video language model of transformers: a memory between its encoder and its language model.

    inputs = processor(text=prompt, videos=frames, return_tensors="pt")
    inputs = compress(model, inputs, "merge", capacity=16)
    model.generate(**inputs)

A value comes in and a value goes out; the model is not changed. Which models: pyvidx.hosts.language.names().
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyvidx.hosts.language import Host, Place, Prompt, Slots, host_of
from pyvidx.hosts.language.kept import Clip, Stream, method
from pyvidx.hosts.language.tokens import GONE, Edit, check_along, edited
from pyvidx.memory import Policy
from pyvidx.ops._library import require
from pyvidx.sizes import check_counts

CHUNK = 32


def compress(
    model: nn.Module,
    inputs: Mapping[str, Any],
    policy: str | Policy = "merge",
    *,
    capacity: int | None = None,
    processor: Any = None,
    seconds: Sequence[Sequence[float] | Tensor] | None = None,
    chunk: int = CHUNK,
    **options: Any,
) -> Mapping[str, Any]:
    """What a host's processor made of videos, with what a memory keeps of them in the place of their pixels.

    The host's own encoder runs over `chunk` steps at a time, the policy keeps what it keeps, and ids, attention mask,
    token types, labels, grids and times are made for that. Images stay, encoded as well, as models take either pixels
    or encoded inputs. Of a GPU this asks where the placeholders are and what the ids depend on (grids; times, where
    they stand in the prompt), before it encodes; ragged policies and times in the prompt are waited for after it.

    Args:
        model: of transformers, with one of pyvidx.hosts.language.names() as config.model_type.
        inputs: of its processor with return_tensors="pt": input_ids [B, L], pixels, ... Any number of videos and images
            in each of the prompts. Videos of unequal lengths, of which most processors make no batch: `together`.
            Pixels may stay on the CPU: chunks are brought to the model.
        policy: a name of pyvidx.memory.names() with its options; "keyframes" with capacity; "evs" or "vidcom2" with q,
            for hosts that take any number of tokens; or a Policy. merge is of whole frames unless unit says otherwise
            (see pyvidx.memory.Merge), so that a slot has one time.
        capacity: slots kept of each video at most; a video of no more steps stays as it is. None: the policy's default.
        processor: the host's, where the prompt's texts tell what a frame is (InternVL, SmolVLM) or when (Qwen3-VL).
        seconds: of every video in order, the times of its steps, or of its frames, not falling. None: of
            `video_metadata` where the inputs hold it, else the numbers of the steps.
        chunk: steps of a video that the encoder takes at a time.

    Returns:
        A new value of the type of inputs, for model(**inputs) and model.generate(**inputs); tensors lie where they lay,
        features where the model is. It carries no gradient. generate with several beams or answers changes what it is
        given: compress again for another call. position_ids are there only where those that the model would make from
        the rest are not the slots' (Qwen2-VL, Qwen2.5-VL); a program that goes on by forward goes on from them.

    Raises:
        ValueError: the model is none of those; pixels, grids, placeholders and times do not agree; an option does not
            fit the policy, or the policy the host. All of this before anything is encoded.
        RuntimeError: transformers is older than 5.20.2.

    For example:

        inputs = processor(text=prompt, videos=[frames], return_tensors="pt")  # 256 frames
        inputs = compress(model, inputs, "merge", capacity=16)
        answer = model.generate(**inputs, max_new_tokens=64)
    """
    check_counts("compress", chunk=chunk)
    host, how = host_of(model, processor), method(policy, capacity, options)
    require(isinstance(inputs, MutableMapping), "compress: inputs must be a mapping such as a dict", inputs)
    prompt = Prompt.of(inputs)
    places = placed(host, inputs, prompt)
    if not places:
        return copy.copy(inputs)
    times = times_of(host, inputs, places, seconds)
    places = [dataclasses.replace(place, seconds=when) for place, when in zip(places, times)]
    how.check(host, places)
    with torch.no_grad():
        slots = kept(host, inputs, places, how, times, chunk)
        return handed(host, inputs, prompt, places, slots)


def placed(host: Host, inputs: Mapping[str, Any], prompt: Prompt) -> list[Place]:
    """Where the videos of the batch are.

    Raises:
        ValueError: see compress.
    """
    given = inputs.get("mm_encoder_outputs")
    require(given is None or isinstance(given, Mapping), "compress: mm_encoder_outputs must be a mapping", given)
    text = "compress: inputs hold encoded video already (mm_encoder_outputs); give the processor's"
    require(given is None or given.get("video") is None, text)
    check_along(inputs, host.passed)
    places = host.videos(inputs, prompt)
    for place in places:
        shown = bool(prompt.seen[place.row, place.start : place.stop].all())
        require(shown, f"compress: attention_mask must be 1 over video {place.number}, in row {place.row}")
    return places


def times_of(
    host: Host, inputs: Mapping[str, Any], places: Sequence[Place], seconds: Sequence[Sequence[float] | Tensor] | None
) -> list[Tensor]:
    """The time of every step of every video, float64 [T] each on the CPU. Frames of one step have their mean.

    Args:
        seconds: as of compress.

    Raises:
        ValueError: they do not fit the videos, are not finite, or fall.
    """
    if seconds is None:
        seconds = [host.seconds(inputs, place) for place in places]
    text = f"compress: seconds must be of {len(places)} videos, a sequence of times each"
    try:
        seconds = list(seconds)
    except TypeError:
        raise ValueError(f"{text}, got {seconds!r:.100}") from None
    require(len(seconds) == len(places), f"{text}, got {len(seconds)}")
    found = []
    for given, place in zip(seconds, places):
        when = _as_times(given, place.number)
        T, n = place.steps, place.frames_per_step
        fits = when.dim() == 1 and len(when) > 0 and (len(when) == T or -(-len(when) // n) == T)
        text = f"compress: seconds of video {place.number} must be one for each of its {T} steps"
        require(fits, text + (f" of {n} frames, or for each frame" if n > 1 else ""), when)
        rising = bool(when.isfinite().all()) and bool((when.diff() >= 0).all())
        require(rising, f"compress: seconds of video {place.number} must be finite and not fall, got {when.tolist()}")
        if len(when) != T:  # the last frame fills up its step, as processors do
            when = torch.cat([when, when[-1:].expand(T * n - len(when))]).view(T, n).mean(1)
        found.append(when)
    return found


def _as_times(given: Any, number: int) -> Tensor:
    try:
        return torch.as_tensor(given, dtype=torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"compress: seconds of video {number} must be numbers: {error}") from None


def kept(
    host: Host,
    inputs: Mapping[str, Any],
    places: Sequence[Place],
    how: Stream | Clip,
    times: Sequence[Tensor],
    chunk: int,
) -> list[Slots]:
    """Encode the videos in chunks and keep what the method keeps, in the order of places."""

    def encode(place: Place, start: int, stop: int) -> list[Tensor]:
        levels = host.encode(inputs, place, start, stop)
        wanted = (stop - start, place.positions)
        fits = all(x.shape[:2] == wanted for x in levels)
        require(fits, "compress: the encoder must give [steps, P, C] with {} steps of {}".format(*wanted), *levels)
        return levels

    times = [when.to(host.model.device, non_blocking=True) for when in times]
    return how.of(places, times, encode, chunk)


def handed(
    host: Host, inputs: Mapping[str, Any], prompt: Prompt, places: Sequence[Place], slots: Sequence[Slots]
) -> Mapping[str, Any]:
    """The inputs with slots in the place of the videos' pixels."""
    edits = [Edit(place.row, place.start, place.stop, host.block(place, s)) for place, s in zip(places, slots)]
    new = edited(inputs, prompt, edits, _pad(host))
    new |= host.values(inputs, places, slots)
    new |= host.handed(inputs, new, places, slots)
    out = copy.copy(inputs)
    gone = (*GONE, *host.pixels, *host.pictures, *(name for name, x in new.items() if x is None))
    for name in gone:
        if name in out:
            del out[name]
    out.update({name: x for name, x in new.items() if x is not None})
    return out


def _pad(host: Host) -> int:
    """The id of padding, which is not looked at; any that stands for no image or video."""
    known = (getattr(host.processor, "tokenizer", None), getattr(host.model, "generation_config", None), host.config)
    return next((x.pad_token_id for x in known if isinstance(getattr(x, "pad_token_id", None), int)), 0)
