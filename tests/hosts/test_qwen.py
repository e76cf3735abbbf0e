"""Positions and times of slots in Qwen-VL and VideoLLaMA3, with the hosts' own processors."""

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20.2", reason="pip install 'pyvidx[hosts]'")
pytest.importorskip("tokenizers")

from pyvidx.hosts import compress, together  # noqa: E402
from pyvidx.hosts.language.video_llama_3 import VideoLlama3  # noqa: E402
from tests.hosts.patched import ROPE, VISION  # noqa: E402
from tests.hosts.processors import IMAGE, VIDEO, ids, processed, processor, video  # noqa: E402
from tests.hosts.test_compress import CLOSE, answer, logits  # noqa: E402
from tests.hosts.tiny import TEXT  # noqa: E402

MROPE = {"rope_parameters": ROPE | dict(mrope_section=[2, 1, 1], mrope_interleaved=True)}
THREE = VISION | dict(num_position_embeddings=64)
DEEP = THREE | dict(depth=3, deepstack_visual_indexes=[0, 1])
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LINEAR = dict(
    head_dim=16, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
    layer_types=["linear_attention", "full_attention"],
    rope_parameters=ROPE | dict(mrope_section=[1, 1, 0], mrope_interleaved=True, partial_rotary_factor=0.25),
)  # fmt: skip
KINDS = {
    "qwen2_5_vl": ("Qwen2_5_VL", {"rope_parameters": ROPE},
                   VISION | dict(window_size=16, fullatt_block_indexes=[1], tokens_per_second=2)),
    "qwen3_vl": ("Qwen3VL", {"head_dim": 8, "num_hidden_layers": 3} | MROPE, DEEP),
    "qwen3_vl_moe": ("Qwen3VLMoe", {"head_dim": 8, "num_hidden_layers": 3} | EXPERTS | MROPE, DEEP),
    "qwen3_5": ("Qwen3_5", LINEAR, THREE),
    "qwen3_5_moe": ("Qwen3_5Moe", LINEAR | EXPERTS | {"shared_expert_intermediate_size": 16}, THREE),
    "video_llama_3": ("VideoLlama3", {"model_type": "qwen2"}, dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, patch_size=4)),
}  # fmt: skip


def build(kind):
    name, text, vision = KINDS[kind]
    torch.manual_seed(0)
    own = {k: x for k, x in ids().items() if kind != "video_llama_3" or not k.startswith("vision_")}
    import transformers  # here, as tests.hosts.tiny mends torchvision before

    config = getattr(transformers, f"{name}Config")(text_config=TEXT | text, vision_config=vision, **own)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


@pytest.fixture(scope="module")
def qwen25():
    return build("qwen2_5_vl"), processor("qwen2_5_vl")


@pytest.fixture(scope="module")
def qwen3():
    return build("qwen3_vl"), processor("qwen3_vl")


@pytest.fixture(scope="module")
def llama3():
    return build("video_llama_3"), processor("video_llama_3")


def positions(model, inputs, **options):
    """position_ids that the language model gets, of forward or, with options, of generate."""
    found = []
    language = model.model.language_model
    hook = language.register_forward_pre_hook(lambda _, args, kw: found.append(kw["position_ids"]), with_kwargs=True)
    try:
        given = copy.deepcopy(dict(inputs))
        with torch.no_grad():
            model.generate(**given, pad_token_id=0, **options) if options else model(**given)
    finally:
        hook.remove()
    return [x[-3:] for x in found]


def own_positions(model, inputs):
    return model.model.get_rope_index(**{k: x for k, x in inputs.items() if not k.startswith("pixel")})[0]


PAIRS = [0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2]  # steps 0 to 2 alike, 3, and 4 and 5 alike


def test_a_grid_may_have_the_shape_of_the_prompt(qwen25):
    model, _ = qwen25
    ids = torch.full((1, 3), model.config.video_token_id)
    inputs = {"input_ids": ids, "mm_token_type_ids": torch.full((1, 3), 2), "video_grid_thw": torch.tensor([[3, 2, 2]])}
    small = compress(model, inputs | {"pixel_values_videos": torch.randn(12, 96)}, capacity=2)
    assert small["input_ids"].shape == (1, 2) and small["video_grid_thw"].tolist() == [[2, 2, 2]]


@pytest.mark.parametrize("fps", [2.0, 20 / 7, 0.3, 29.97])
def test_slots_stand_at_their_middle_seconds(qwen25, fps):
    """Qwen2.5-VL, in the way of transformers: floor(seconds * tokens_per_second), behind the text before the video."""
    model, processor = qwen25
    inputs = processed(processor, [f"ab{VIDEO}c"], [video(PAIRS)], fps=fps)
    apart = inputs["second_per_grid_ts"]
    small = compress(model, inputs, capacity=3)
    assert small["video_grid_thw"].tolist() == [[3, 4, 4]]
    own, found = own_positions(model, inputs), small["position_ids"]
    begin, P = 3, 4
    assert torch.equal(found[:, :, :begin], own[:, :, :begin])
    middles = torch.tensor([1.0, 3.0, 4.5])
    want = begin + (middles * (2 * apart)).long()
    assert found[0, 0, begin : begin + 3 * P].tolist() == want.repeat_interleave(P).tolist()
    for axis in (1, 2):  # a slot's rows and columns are a step's, and text goes on where it went on
        assert torch.equal(found[axis, 0, begin : begin + 3 * P], own[axis, 0, begin : begin + 3 * P])
    assert torch.equal(found[:, :, begin + 3 * P :], own[:, :, begin + 6 * P :])
    torch.testing.assert_close(small["second_per_grid_ts"], apart * 3.5 / 2)
    # The model uses them, in forward and in generate, and goes on from them.
    assert torch.equal(positions(model, small)[0], found)
    first, *later = positions(model, small, max_new_tokens=3)
    assert torch.equal(first, found)
    end = int(own[0, 0, -1])
    assert [x.flatten().tolist() for x in later] == [[end + i] * 3 for i in (1, 2)]


@pytest.mark.parametrize("fps", [2.0, 20 / 7, 0.3, 29.97, 7.0])
def test_steps_that_stay_stand_where_they_stood(qwen25, fps):
    model, processor = qwen25
    clips = [video(list(range(60))), video([3, 4, 5])]
    image = video([9])[0]
    inputs = processed(processor, [f"a{VIDEO}b{IMAGE}", f"{VIDEO}"], clips, [image], fps=fps)
    small = compress(model, inputs, "concat")
    assert torch.equal(small["position_ids"], own_positions(model, inputs))
    last = compress(model, inputs, "fifo", capacity=7)  # counted from the oldest frame that is left
    begin = small["input_ids"].shape[1] - last["input_ids"].shape[1]
    moved = own_positions(model, inputs)[0, 0, 2 + 23 * 4 : 2 + 30 * 4] - small["position_ids"][0, 0, 2 + 23 * 4] + 2
    assert begin == 23 * 4 and (last["position_ids"][0, 0, 2 : 2 + 7 * 4] - moved).abs().max() <= 1


def test_given_seconds_are_positions(qwen25):
    model, processor = qwen25
    inputs = processed(processor, [VIDEO], [video(PAIRS)])
    seconds = [10.0, 11.0, 14.0, 20.0, 50.0, 60.0]
    small = compress(model, inputs, capacity=3, seconds=[seconds])
    assert small["position_ids"][0, 0, 1:13:4].tolist() == [1 + 2 * s for s in (2, 10, 45)]
    frames = [s + d for s in seconds for d in (-0.25, 0.25)]
    same = compress(model, inputs, capacity=3, seconds=[frames])
    assert torch.equal(same["position_ids"], small["position_ids"])


def test_qwen3_says_the_seconds_of_slots(qwen3):
    model, processor = qwen3
    read = processor.tokenizer.decode
    prompt = f"What{IMAGE}then{VIDEO}?"
    inputs = processed(processor, [prompt], [video(PAIRS)], [video([7])[0]], return_metadata=True)
    assert "<0.2 seconds>" in read(inputs["input_ids"][0])  # (0 + 0.5) / 2

    def said(inputs, **options):
        small = compress(model, inputs, capacity=3, **options)
        text = read(small["input_ids"][0])
        assert text.startswith("What<|vision_start|><|image_pad|>") and text.endswith("<|vision_end|><|vision_end|>?")
        assert text.count("<|video_pad|>") == 3 * 4 and small["video_grid_thw"].tolist() == [[3, 4, 4]]
        assert torch.equal(small["mm_token_type_ids"] == 2, small["input_ids"] == model.config.video_token_id)
        assert torch.equal(positions(model, small)[0], own_positions(model, small))
        assert answer(model, small).shape == (1, 4)
        return [part.split(" seconds")[0] for part in text.split("<") if " seconds" in part]

    told = inputs.pop("video_metadata")
    assert said(dict(inputs), processor=processor) == ["1.2", "3.2", "4.7"]  # as the prompt says: 0.2, 1.2, ...
    assert said(dict(inputs) | {"video_metadata": told}, processor=processor) == ["1.2", "3.2", "4.8"]
    assert said(dict(inputs), processor=processor, seconds=[[0, 10, 200, 300, 400, 500]]) == ["100.0", "300.0", "450.0"]
    assert said(dict(inputs)) == ["1.2", "3.2", "4.2"]  # no processor: the prompt's own text of the nearest step


def test_the_place_of_a_slot_is_the_one_of_a_short_video(qwen3):
    """To Qwen3-VL a compressed video is one of fewer steps with other times: fifo of the last steps."""
    model, processor = qwen3
    clip = video(list(range(12)))
    small = compress(model, processed(processor, [f"a{VIDEO}b"], [clip]), "fifo", capacity=2, processor=processor)
    short = processed(processor, [f"a{VIDEO}b"], [clip[8:]])
    assert processor.tokenizer.decode(short["input_ids"][0]).count("<0.2 seconds>") == 1
    own = short | {}
    own["input_ids"] = small["input_ids"]  # the same tokens but for the times
    torch.testing.assert_close(logits(model, small), logits(model, own), **CLOSE)


def test_all_levels_merge_alike(qwen3):
    model, processor = qwen3
    inputs = processed(processor, [f"a{VIDEO}b"], [video(list(range(8)))])
    with torch.no_grad():
        own = model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    one = compress(model, inputs, capacity=1)["mm_encoder_outputs"]["video"]
    for found, whole in zip(
        [one.pooler_output, *one.deepstack_features], [own.pooler_output, *own.deepstack_features], strict=True
    ):
        torch.testing.assert_close(found[0], whole[0].unflatten(0, (4, 4)).mean(0), **CLOSE)


@pytest.mark.parametrize(
    "kind, with_processor",
    [
        ("qwen3_vl", False), ("qwen3_vl", True), ("qwen3_vl_moe", False), ("qwen3_5", False), ("qwen3_5_moe", True),
        ("video_llama_3", False), ("video_llama_3", True),
    ],
)  # fmt: skip
def test_the_family(kind, with_processor):
    model, own = build(kind), processor(kind if kind == "video_llama_3" else "qwen3_vl")
    prompts = [f"say {VIDEO} and {VIDEO}{IMAGE}", f"x {VIDEO}"]
    inputs = processed(own, prompts, [video([*range(6)]), video([7, 8, 9]), video([*range(10, 22)])], [video([5])[0]])
    given = {"processor": own} if with_processor else {}
    same = compress(model, inputs, capacity=12, **given)
    assert torch.equal(same["input_ids"], inputs["input_ids"])
    torch.testing.assert_close(logits(model, same), logits(model, inputs), **CLOSE)
    assert torch.equal(answer(model, same), answer(model, inputs))
    small = compress(model, inputs, capacity=2, **given)
    counts = (small["input_ids"] == model.config.video_token_id).sum(1)
    assert counts.tolist() == [16, 8] and small["video_grid_thw"][:, 0].tolist() == [2, 2, 2]
    assert answer(model, small).shape == (2, 4)


def test_videollama3_and_the_tokens_its_processor_left_out(llama3):
    model, processor = llama3
    clip = video([0, 1, 1, 1, 2, 2])
    inputs = processed(processor, [f"see {VIDEO}?"], [clip])
    left = inputs["video_compression_mask"]
    assert left.sum() == 4 + 4 + 1 + 1 + 4 + 1
    for given in ({}, {"processor": processor}):
        same = compress(model, inputs, capacity=6, **given)
        assert torch.equal(same["input_ids"], inputs["input_ids"]) and "video_compression_mask" not in same
        torch.testing.assert_close(logits(model, same), logits(model, inputs), **CLOSE)
        small = compress(model, inputs, capacity=3, **given)
        text = processor.tokenizer.decode(small["input_ids"][0]).replace("<|video_pad|>" * 4, "[]")
        assert text == "see <|vision_start|>Time 0.0s:[],Time 1.0s:[],Time {}s:[]<|vision_end|>?".format(
            "2.2" if given else "2.0"
        )
        assert answer(model, small).shape == (1, 4)


@pytest.mark.parametrize(
    "before, link, said",
    [
        ([7, 40, 41], [9], [40, 41]),  # "see" "Time" " ", and "," "Time" " "
        ([7, 40, 41], [42], [41]),  # ",Time" " "
        ([7, 40, 41], [43, 44], [41]),  # ",T" "ime" " "
        ([45, 41], [9, 40], [41]),  # "seeTime" " ", and "," "Time" " "
    ],
)
def test_tokens_of_a_time_that_are_joined_with_others(before, link, said):
    """VideoLLaMA3's "Time 0.0s:" and ",Time 12.5s:", without a processor; 10 to 19 are digits, 50 is "s:"."""
    host = object.__new__(VideoLlama3)
    host.processor = None
    row = [*before, 10, 20, 10, 50, 90, *link, *said, 11, 12, 20, 15, 50, 90, *link, *said, 11, 13, 20, 10, 50, 90]
    units = [(i, i + 1) for i, x in enumerate(row) if x == 90]
    start, found, texts = host._texts(row, units)
    assert [*found, *texts[1]] == [*link, *said, 11, 12, 20, 15, 50]
    new = [*row[:start], *texts[2], 90, *found, *texts[1], 90]
    assert new == [*before, 11, 13, 20, 10, 50, 90, *link, *said, 11, 12, 20, 15, 50, 90]


def test_prompts_that_were_processed_one_at_a_time(qwen3):
    model, own = qwen3
    each = [processed(own, [f"{text}{VIDEO}b"], [video(frames)])
            for text, frames in (("a", [*range(8)]), ("more", [*range(9, 13)]))]  # fmt: skip
    small = compress(model, together(each, pad=own.tokenizer.pad_token_id), capacity=2, processor=own)
    for one, mine in zip(each, logits(model, small)):
        torch.testing.assert_close(mine[None], logits(model, compress(model, one, capacity=2, processor=own)), **CLOSE)


def drop(name):
    return lambda i: {k: x for k, x in i.items() if k != name}


WRONG = {
    "grid lost": (drop("video_grid_thw"), "video_grid_thw must be whole numbers"),
    "types lost": (drop("mm_token_type_ids"), "mm_token_type_ids must be there"),
    "types of text": (lambda i: i | {"mm_token_type_ids": 0 * i["input_ids"]}, "2 at videos' placeholders"),
    "types cut": (lambda i: i | {"mm_token_type_ids": i["mm_token_type_ids"][:, 1:]}, "as input_ids"),
    "grid of floats": (lambda i: i | {"video_grid_thw": i["video_grid_thw"].float()}, "must be whole numbers"),
    "a longer grid": (lambda i: i | {"video_grid_thw": i["video_grid_thw"] + torch.tensor([1, 0, 0])}, "patches of"),
    "an odd grid": (lambda i: i | {"video_grid_thw": torch.tensor([[16, 3, 2]])}, "multiples of 2"),
    "an empty grid": (lambda i: i | {"video_grid_thw": torch.tensor([[0, 4, 4]])}, "multiples of 2"),
    "fewer pixels": (lambda i: i | {"pixel_values_videos": i["pixel_values_videos"][:-16]}, "patches of the grids"),
    "frames as pixels": (lambda i: i | {"pixel_values_videos": torch.zeros(1, 12, 3, 16, 16)}, "patches of the grids"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("kind", ["qwen25", "qwen3"])
def test_what_is_lost_is_an_error(kind, case, request):
    model, processor = request.getfixturevalue(kind)
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        compress(model, change(dict(processed(processor, [f"a{VIDEO}b"], [video(PAIRS)]))), capacity=2)


def test_what_is_lost_is_an_error_of_each_host(qwen25, qwen3, llama3):
    model, own = qwen25
    inputs = dict(processed(own, [f"a{VIDEO}b"], [video(PAIRS)]))
    for apart in (torch.tensor([0.0]), torch.tensor([1.0, 1.0]), torch.tensor([torch.nan])):
        with pytest.raises(ValueError, match="second_per_grid_ts must be positive, one for each of 1"):
            compress(model, inputs | {"second_per_grid_ts": apart}, capacity=2)
    model, own = llama3
    inputs = dict(processed(own, [f"a{VIDEO}b"], [video(PAIRS)]))
    for name, x in (("video_merge_sizes", None), ("video_merge_sizes", torch.tensor([0])),
                    ("video_compression_mask", torch.ones(3, dtype=torch.bool)),
                    ("video_compression_mask", torch.zeros(48, dtype=torch.bool))):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            compress(model, inputs | {name: x}, capacity=2)
    model, own = qwen3
    inputs = dict(processed(own, [f"a{VIDEO}b"], [video(PAIRS)]))
    for other in (processor("video_llama_3"), processor("qwen2_5_vl"), object()):
        with pytest.raises(ValueError, match="processor must be that of the qwen3_vl model"):
            compress(model, inputs, capacity=2, processor=other)
    torn = inputs["input_ids"].clone()
    torn[torn == model.config.vision_end_token_id] = 5
    with pytest.raises(ValueError, match="the placeholders of each between"):
        compress(model, inputs | {"input_ids": torn}, capacity=2)
    untold = inputs["input_ids"][:, [i for i, x in enumerate(inputs["input_ids"][0].tolist()) if x > 255 or i == 0]]
    untold = inputs | {"input_ids": untold, "attention_mask": torch.ones_like(untold)}
    untold["mm_token_type_ids"] = (untold["input_ids"] == model.config.video_token_id) * 2
    assert compress(model, untold, capacity=2)["input_ids"].shape[1] == untold["input_ids"].shape[1] - 4 * 6
    with pytest.raises(ValueError, match="must say when each step of video 0 is, or seconds be given"):
        compress(model, untold, capacity=2, processor=own)
    begun = inputs["input_ids"].clone()
    begun[0, 2] = 5  # the "<" of the first time
    with pytest.raises(ValueError, match="must say when a video's first step is"):
        compress(model, inputs | {"input_ids": begun}, capacity=2)
