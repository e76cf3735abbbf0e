"""What `compress` gives, as requests to a serving engine: vLLM, SGLang. Neither is imported.

    inputs = compress(model, processor(text=prompts, videos=videos, return_tensors="pt"), "merge", capacity=16)

    llm = vllm.LLM(folder, enable_mm_embeds=True)
    llm.generate(serving.vllm(model, inputs, processor))

    engine = sglang.Engine(model_path=folder)
    [engine.generate(**request) for request in serving.sglang(model, inputs, processor)]

The model that compressed is needed no longer: only its encoder was, and its config is here. Hosts: Qwen2.5-VL, Qwen3-VL
and InternVL in the layout of transformers ("-hf").

vLLM makes positions itself. For Qwen2.5-VL it has one number, second_per_grid_ts: the first and the last slot stand
where they are in time and those between are evenly spaced, while in transformers, and in SGLang here, each has its own
place. And behind a video vLLM goes on after its last second, transformers (5.24) after the larger of its height and
width. vLLM takes no video_embeds for InternVL, so each slot is an image in the video's own text, as frames are to that
model anyway.

Run with vLLM 0.32 on a CPU, where all three generate what transformers does. Of SGLang 0.5.23 the code that makes items
of a request and takes their rows was run; its models need a GPU, and were not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyvidx.hosts.language.tokens import Prompt
from pyvidx.ops._library import require

GRIDS = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
TIMED = ("qwen3_vl", "qwen3_vl_moe")  # the prompt says the seconds of each step
FRAMES = ("internvl",)  # a frame is an image
SECONDS = re.compile(r"<(\d+(?:\.\d+)?) seconds>")
LONGEST = 32  # tokens that say one time


@dataclass(frozen=True)
class Item:
    """An encoded video or image in a prompt."""

    start: int  # of its block in the ids of its row: placeholders and what an engine writes with them
    stop: int
    rows: Tensor  # [tokens, C], of all levels side by side
    grid: Tensor | None = None  # int64 [3]: T, H, W in patches
    apart: Tensor | None = None  # seconds between steps, Qwen2.5-VL
    times: list[float] | None = None  # seconds of each step, Qwen3-VL


@dataclass(frozen=True)
class Request:
    """One prompt without its padding."""

    ids: list[int]
    positions: Tensor | None  # int64 [3, L]
    videos: list[Item]
    images: list[Item]

    def with_one_placeholder(self, video: int, image: int) -> list[int]:
        """The ids with one token for each block, which the engine replaces."""
        found, at = [], 0
        for item, token in sorted(
            [*((x, video) for x in self.videos), *((x, image) for x in self.images)], key=lambda pair: pair[0].start
        ):
            found += [*self.ids[at : item.start], token]
            at = item.stop
        return found + self.ids[at:]


def vllm(model: nn.Module, inputs: Mapping[str, Any], processor: Any = None) -> list[dict[str, Any]]:
    """Prompts for vllm.LLM(..., enable_mm_embeds=True).generate, one for each row of the inputs.

    Args:
        model: that compressed, or any with its config.
        inputs: of pyvidx.hosts.compress.
        processor: the model's own, for Qwen3-VL and InternVL, whose blocks hold words.

    Returns:
        {"prompt_token_ids": [...], "multi_modal_data": {...}} each, tensors on the CPU: "video" with video_embeds
        [tokens, C] (Qwen3-VL: [tokens, (1 + levels) C], the levels of its encoder side by side), video_grid_thw int64
        [videos, 3] and second_per_grid_ts float32 [videos] or timestamps, a list of seconds for each video; "image"
        with image_embeds and image_grid_thw; InternVL: "image", a list of [tokens, C].

    Raises:
        ValueError: the model is none of those; inputs are not of `compress`; the grids, features and placeholders do
            not agree; a processor is needed.
    """
    found = []
    for request in _requests(model, inputs, processor):
        config, data = model.config, {}
        if config.model_type in FRAMES:
            data = {"image": [x.rows for x in request.images]} if request.images else {}
            ids = request.with_one_placeholder(-1, config.image_token_id)
        else:
            for name, items in (("image", request.images), ("video", request.videos)):
                if items:
                    data[name] = {f"{name}_embeds": torch.cat([x.rows for x in items]), **_grids(name, items)}
            ids = request.with_one_placeholder(config.video_token_id, config.image_token_id)
            if request.videos and request.videos[0].times is not None:
                data["video"]["timestamps"] = [x.times for x in request.videos]
        found.append({"prompt_token_ids": ids, "multi_modal_data": data})
    return found


def sglang(model: nn.Module, inputs: Mapping[str, Any], processor: Any = None) -> list[dict[str, Any]]:
    """Arguments of sglang.Engine.generate, one set for each row of the inputs.

    Args: as of `vllm`.

    Returns:
        {"input_ids": [...], "video_data": [one dict], "image_data": [one dict]} each, as SGLang takes one dict of
        encoded media of a kind: "precomputed_embeddings" [tokens, C] of all of them with their grids, and for
        Qwen2.5-VL mrope_positions int64 [3, L], which are the slots' own.

    Raises:
        ValueError: see `vllm`.
    """
    found = []
    for request in _requests(model, inputs, processor):
        one = {"input_ids": request.ids}
        for name, items in (("image", request.images), ("video", request.videos)):
            if not items:
                continue
            media = {"format": "processor_output", "modality": name.upper()}
            media |= {"precomputed_embeddings": torch.cat([x.rows for x in items]), **_grids(name, items)}
            if request.positions is not None:
                delta = request.positions.max() + 1 - len(request.ids)
                media |= {"mrope_positions": request.positions, "mrope_position_delta": delta.view(1, 1)}
            one[f"{name}_data"] = [media]
        found.append(one)
    return found


def _grids(name: str, items: Sequence[Item]) -> dict[str, Tensor]:
    found = {}
    if items[0].grid is not None:
        found[f"{name}_grid_thw"] = torch.stack([x.grid for x in items])
    if items[0].apart is not None:
        found["second_per_grid_ts"] = torch.stack([x.apart for x in items]).float()
    return found


def _requests(model: nn.Module, inputs: Mapping[str, Any], processor: Any) -> list[Request]:
    config = model.config
    kinds = (*GRIDS, *FRAMES)
    text = f"serving: the model's config.model_type must be one of {', '.join(kinds)}, got {config.model_type!r}"
    require(config.model_type in kinds, text)
    require(isinstance(inputs, Mapping), f"serving: inputs must be a mapping, got {type(inputs).__name__}")
    outputs = inputs.get("mm_encoder_outputs")
    require(bool(outputs), "serving: inputs must hold mm_encoder_outputs, as pyvidx.hosts.compress gives them")
    needs = config.model_type in (*TIMED, *FRAMES)
    text = f"serving: {config.model_type} has words in the blocks of its videos: give processor=, the model's own"
    require(not needs or hasattr(processor, "tokenizer"), text)
    prompt = Prompt.of(inputs)
    if config.model_type in FRAMES:
        videos, images = [], _frames(config, outputs, prompt, processor)
    else:
        videos = _items("video", config, inputs, outputs, prompt, processor)
        images = _items("image", config, inputs, outputs, prompt, processor)
    positions = inputs.get("position_ids")
    found = []
    for row, seen in enumerate(prompt.seen):
        begin = int(seen.int().argmax())
        where = None if positions is None else positions[-3:, row, seen.to(positions.device)].cpu()
        mine = (
            [replace(x, start=x.start - begin, stop=x.stop - begin) for r, x in items if r == row]
            for items in (videos, images)
        )
        found.append(Request(prompt.ids[row, seen].tolist(), where, *mine))
    return found


def _items(
    name: str, config: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any], prompt: Prompt, processor: Any
) -> list[tuple[int, Item]]:
    """The row and the item of every video or image of a host with grids."""
    token, grid = getattr(config, f"{name}_token_id"), inputs.get(f"{name}_grid_thw")
    if outputs.get(name) is None:
        here = (prompt.ids == token).any()
        require(not here, f"serving: input_ids hold placeholders of {name}s that mm_encoder_outputs has no features of")
        return []
    text = f"serving: {name}_grid_thw must be whole numbers [{name}s, 3] beside mm_encoder_outputs[{name!r}]"
    fits = isinstance(grid, Tensor) and grid.dim() == 2 and grid.shape[1] == 3 and not grid.is_floating_point()
    require(fits, text, grid)
    grid, m = grid.cpu().long(), config.vision_config.spatial_merge_size
    counts = [T * (H // m) * (W // m) for T, H, W in grid.tolist()]
    rows = _features(name, outputs, sum(counts)).split(counts)
    apart = inputs.get("second_per_grid_ts") if name == "video" else None
    apart = None if apart is None else torch.as_tensor(apart).cpu()
    text = f"serving: second_per_grid_ts must be one number for each of the {len(grid)} videos"
    require(apart is None or apart.shape == (len(grid),), text, *([] if apart is None else [apart]))
    if name == "video" and config.model_type in TIMED:
        blocks = _timed(config, prompt, grid, counts, processor)
    else:
        blocks = [(*block, None) for block in prompt.blocks(token, counts)]
    return [
        (row, Item(start, stop, rows[i], grid[i], None if apart is None else apart[i], times))
        for i, (row, start, stop, times) in enumerate(blocks)
    ]


def _features(name: str, outputs: Mapping[str, Any], tokens: int) -> Tensor:
    """[tokens, C] of all videos or images, the levels side by side."""
    found = outputs[name]
    levels = [found.pooler_output, *(getattr(found, "deepstack_features", None) or [])]
    flat = [
        torch.cat([x.flatten(0, -2) for x in ([level] if isinstance(level, Tensor) else level)]) for level in levels
    ]
    rows = torch.cat(flat, -1).detach().cpu()
    text = f"serving: mm_encoder_outputs[{name!r}] must have {tokens} tokens, as the grids and placeholders say"
    require(len(rows) == tokens, f"{text}; of a policy that keeps some tokens of a frame no grid tells", rows)
    return rows


def _timed(
    config: Any, prompt: Prompt, grid: Tensor, counts: list[int], processor: Any
) -> Iterator[tuple[int, int, int, list[float]]]:
    """Row, start, stop and times of each video whose steps stand behind their seconds."""
    steps = [count // T for count, T in zip(counts, grid[:, 0].tolist()) for _ in range(T)]
    blocks = iter(prompt.blocks(config.video_token_id, steps))
    for T in grid[:, 0].tolist():
        mine, times, begins = [next(blocks) for _ in range(T)], [], []
        for row, start, stop in mine:
            ids = prompt.ids[row].tolist()
            around = (ids[start - 1 : start], ids[stop : stop + 1])
            fits = around == ([config.vision_start_token_id], [config.vision_end_token_id])
            require(fits, "serving: each step of a video must stand between the tokens of a vision's start and end")
            when, begin = _said(ids, start - 1, processor.tokenizer)
            times.append(when)
            begins.append(begin)
        yield mine[0][0], begins[0], mine[-1][2] + 1, times


def _said(ids: list[int], stop: int, tokenizer: Any) -> tuple[float, int]:
    """The seconds that the tokens before a place say, and where these begin."""
    for n in range(1, min(LONGEST, stop) + 1):
        if match := SECONDS.fullmatch(tokenizer.decode(ids[stop - n : stop])):
            return float(match[1]), stop - n
    raise ValueError("serving: the prompt must say the seconds of each step before it, as in '<1.5 seconds>'")


def _frames(config: Any, outputs: Mapping[str, Any], prompt: Prompt, processor: Any) -> list[tuple[int, Item]]:
    """The row and the item of every image of a host to whom frames are images, with the tokens around it."""
    begin, end = (
        processor.tokenizer.convert_tokens_to_ids(token)
        for token in (processor.start_image_token, processor.end_image_token)
    )
    found, counts = [], []
    for row, ids in enumerate(prompt.ids.tolist()):
        at = 0
        while config.image_token_id in ids[at:]:
            start = ids.index(config.image_token_id, at)
            at = next((i for i in range(start, len(ids)) if ids[i] != config.image_token_id), len(ids))
            fits = ids[start - 1 : start] == [begin] and ids[at : at + 1] == [end]
            text = f"serving: an image must stand between {processor.start_image_token} and {processor.end_image_token}"
            require(fits, text)
            found.append((row, start - 1, at + 1))
            counts.append(at - start)
    require(outputs.get("image") is not None, "serving: mm_encoder_outputs must hold the frames as images, got none")
    rows = _features("image", outputs, sum(counts)).split(counts)
    return [(row, Item(start, stop, x)) for (row, start, stop), x in zip(found, rows)]
