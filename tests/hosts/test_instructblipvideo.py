"""InstructBlipVideo, whose slots are handed in as embeddings: what the table of test_compress.py does not ask."""

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20.2", reason="pip install 'pyvidx[hosts]'")

from pyvidx.hosts import Session, compress, together  # noqa: E402
from tests.hosts.spelled import tokenizer  # noqa: E402
from tests.hosts.tiny import VIDEO, Video  # noqa: E402
from tests.hosts.tiny_instructblipvideo import ENTRY, QFORMER, VISION  # noqa: E402

TEXTS = {
    "opt": dict(
        model_type="opt", vocab_size=300, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, pad_token_id=1, bos_token_id=2, eos_token_id=2, max_position_embeddings=128,
    ),
    "t5": dict(
        model_type="t5", vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0,
        decoder_start_token_id=0,
    ),
}  # fmt: skip
GREEDY = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=1)


def model_of(text):
    from transformers import InstructBlipVideoConfig, InstructBlipVideoForConditionalGeneration

    torch.manual_seed(0)
    config = InstructBlipVideoConfig(
        vision_config=VISION, qformer_config=QFORMER, text_config=TEXTS[text], num_query_tokens=3,
        video_token_index=VIDEO,
    )  # fmt: skip
    return InstructBlipVideoForConditionalGeneration(config).eval()


@pytest.mark.parametrize("text", TEXTS)
@torch.no_grad()
def test_other_language_models(text):
    """A decoder whose positions are learned, and an encoder with a decoder."""
    model = model_of(text)
    inputs = ENTRY.inputs([Video(4), 2, 7, 8], [Video(4, 1), 2, 9, 10])
    more = {"decoder_input_ids": torch.tensor([[0, 5], [0, 6]])} if text == "t5" else {}
    same = compress(model, inputs, "merge", capacity=4)
    mine, own = (model(**copy.deepcopy(x), **more).logits[:, -1] for x in (same, inputs))
    torch.testing.assert_close(mine, own, atol=1e-5, rtol=0)
    assert torch.equal(model.generate(**same, **GREEDY)[:, -4:], model.generate(**inputs, **GREEDY)[:, -4:])
    options = GREEDY | {"num_beams": 2, "repetition_penalty": 1.5}
    assert torch.equal(model.generate(**same, **options)[:, -4:], model.generate(**inputs, **options)[:, -4:])
    small = compress(model, inputs, "merge", capacity=2)
    assert small["attention_mask"].shape == (2, 9) and len(model.generate(**small, **GREEDY)) == 2


@pytest.fixture(scope="module")
def model():
    return ENTRY.model()


@torch.no_grad()
def test_more_frames_than_the_processor_writes_placeholders_for(model):
    """It writes those of four frames, whatever it is given."""
    row = [Video(4), 5, 6]
    for T in (7, 3):
        inputs = ENTRY.inputs(row) | {"pixel_values": ENTRY.frames(Video(T))[None]}
        own = ENTRY.inputs([Video(T), 5, 6])
        same = compress(model, inputs, "merge", capacity=8)
        torch.testing.assert_close(model(**same).logits[:, -1], model(**own).logits[:, -1], atol=1e-5, rtol=0)
        two = [compress(model, x, "merge", capacity=2) for x in (inputs, own)]
        assert all(torch.equal(two[0][name], two[1][name]) for name in ("inputs_embeds", "attention_mask"))


@torch.no_grad()
def test_of_its_processor(model):
    """It pads between the video and the words, as it puts the video before what it has padded."""
    pytest.importorskip("torchvision")
    from transformers import InstructBlipVideoProcessor, InstructBlipVideoVideoProcessor

    words = [tokenizer("<image>", "<video>", []) for _ in range(2)]
    words[0].padding_side = "left"
    pixels = InstructBlipVideoVideoProcessor(size={"height": 32, "width": 32})
    processor = InstructBlipVideoProcessor(pixels, *words, num_query_tokens=3)
    videos = [torch.randint(0, 255, (4, 3, 40, 40), dtype=torch.uint8) for _ in range(2)]
    options = dict(padding=True, return_tensors="pt")
    inputs = processor(images=videos, text=["!", "!#!"], **options)
    inputs["qformer_input_ids"] %= 50  # the tiny Q-Former knows no more
    assert inputs["attention_mask"].tolist() == [[1] * 12 + [0, 0, 1], [1] * 15]
    same = compress(model, inputs, "merge", capacity=4)
    assert torch.equal(same["attention_mask"], inputs["attention_mask"])
    torch.testing.assert_close(model(**same).logits, model(**inputs).logits, atol=1e-5, rtol=0)
    assert torch.equal(model.generate(**same, **GREEDY)[:, -4:], model.generate(**inputs, **GREEDY)[:, -4:])
    small = compress(model, inputs, "fifo", capacity=3)
    fewer = dict(inputs) | {"pixel_values": inputs["pixel_values"][:, 1:]}
    fewer |= {name: inputs[name][:, 3:] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**small).logits, model(**fewer).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_questions_of_unequal_lengths_together(model):
    """Rows that were processed one at a time, as the processor makes no batch of videos of unequal lengths."""
    rows = [ENTRY.inputs([Video(4), 5, 6]), ENTRY.inputs([Video(6, 1), 7])]
    rows[1] |= {name: rows[1][name][:, :2] for name in ("qformer_input_ids", "qformer_attention_mask")}
    batch = compress(model, together(rows), "merge", capacity=3)
    for mine, row in zip(model(**batch).logits, rows):
        alone = model(**compress(model, row, "merge", capacity=3)).logits[0]
        torch.testing.assert_close(mine[-1], alone[-1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_prompt_of_nothing_but_a_video(model):
    inputs = ENTRY.inputs([Video(6)])
    small = compress(model, {k: v for k, v in inputs.items() if k != "attention_mask"}, "merge", capacity=2)
    assert model.generate(**small, **GREEDY).shape == (1, 6 + 4)


WRONG = {
    "placeholders of five frames": (lambda i: i | {"pixel_values": i["pixel_values"][:, :2]}, "for each frame"),
    "two videos": (lambda i: i | {"pixel_values": torch.cat([i["pixel_values"]] * 2)}, "for each frame"),
    "apart": (lambda i: i | {"input_ids": i["input_ids"].roll(2, 1)}, "must stand together"),
    "no question": (lambda i: {k: v for k, v in i.items() if k != "qformer_input_ids"}, "must hold qformer_input_ids"),
    "questions": (lambda i: i | {"qformer_input_ids": torch.ones(2, 3, dtype=torch.int64)}, r"qformer_input_ids \[1"),
    "a mask": (lambda i: i | {"qformer_attention_mask": torch.ones(1, 2)}, "qformer_attention_mask must be"),
    "no video token": (lambda i: i | {"input_ids": torch.ones_like(i["input_ids"])}, r"got \[0\]"),
    "again": (lambda i: i, "inputs_embeds"),
}


@pytest.mark.parametrize("case", WRONG)
def test_misfits(model, case, monkeypatch):
    change, message = WRONG[case]
    inputs = ENTRY.inputs([Video(5), 5])
    if case == "again":
        inputs = dict(compress(model, inputs, capacity=2))
    monkeypatch.setattr(type(model), "get_video_features", lambda *a, **k: pytest.fail("the encoder ran"))
    with pytest.raises(ValueError, match=message):
        compress(model, change(inputs), capacity=2)


def test_a_session_cannot_look_before_it_is_asked(model):
    with pytest.raises(ValueError, match="reads the question"):
        Session(model, object(), capacity=2)
