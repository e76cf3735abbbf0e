"""Hosts to whom frames are images: what their own processors write, with slots in the place of the frames."""

import copy
import re

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20.2", reason="pip install 'pyvidx[hosts]'")

from pyvidx.hosts import compress  # noqa: E402
from tests.hosts import chats  # noqa: E402
from tests.hosts.tiny import Image, Video  # noqa: E402
from tests.hosts.tiny_internvl import ENTRY as INTERNVL  # noqa: E402
from tests.hosts.tiny_smolvlm import ENTRY as SMOLVLM  # noqa: E402
from tests.hosts.tiny_smolvlm import FAKE, GLOBAL  # noqa: E402

CLOSE = dict(atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def internvl():
    pytest.importorskip("torchvision", reason="the processors of transformers need it")
    return INTERNVL.model(), chats.internvl()


@pytest.fixture(scope="module")
def smolvlm():
    for package in ("torchvision", "num2words"):
        pytest.importorskip(package, reason="its processor needs it")
    return SMOLVLM.model(), chats.smolvlm()


def film(T, seed=0, height=40, width=40):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 255, (T, height, width, 3), generator=generator, dtype=torch.uint8).numpy()


def clock(T, step):
    from transformers.video_utils import VideoMetadata

    indices = [round(t * step * 10) for t in range(T)]
    return VideoMetadata(total_num_frames=T * step * 10, fps=10.0, duration=float(T * step), frames_indices=indices)


@torch.no_grad()
def logits(model, inputs):
    return model(**copy.deepcopy(dict(inputs))).logits[:, -1]


def test_internvl_of_its_processor(internvl):
    """Images in tiles, two videos in a prompt, another prompt beside it that is padded on the left."""
    model, processor = internvl
    prompts = ["a <IMG_CONTEXT> b <video>\nand <video>? ", "<video>"]
    given = dict(text=prompts, images=[film(1, 9, 30, 90)[0]], return_tensors="pt", padding=True)
    videos = [film(5, seed) for seed in range(3)]
    inputs = processor(videos=videos, **given)
    same = compress(model, inputs, "merge", capacity=5, processor=processor)
    assert torch.equal(same["input_ids"], inputs["input_ids"]) and type(same) is type(inputs)
    torch.testing.assert_close(logits(model, same), logits(model, inputs), **CLOSE)
    last = compress(model, inputs, "fifo", capacity=2, processor=processor)
    fewer = processor(videos=[v[3:] for v in videos], **given)
    assert torch.equal(last["input_ids"], fewer["input_ids"])
    assert torch.equal(last["attention_mask"], fewer["attention_mask"])
    torch.testing.assert_close(logits(model, last), logits(model, fewer), **CLOSE)


def test_smolvlm_of_its_processor(smolvlm):
    """Videos of unequal lengths, which the processor pads, and two of them in a prompt."""
    model, processor = smolvlm
    given = dict(text=["a <video> b <video>? ", "<video>"], return_tensors="pt", padding=True, padding_side="left")
    lengths, clocks = (6, 3, 5), [clock(6, 20), clock(3, 1), clock(5, 1)]
    a, b, c = [film(T, seed) for seed, T in enumerate(lengths)]
    metadata = [clocks[:2], clocks[2:]]
    inputs = processor(videos=[[a, b], [c]], video_metadata=metadata, do_sample_frames=False, **given)
    same = compress(model, inputs, "merge", capacity=6, processor=processor)
    assert torch.equal(same["input_ids"], inputs["input_ids"])
    torch.testing.assert_close(logits(model, same), logits(model, inputs), **CLOSE)
    last = compress(model, inputs, "fifo", capacity=4, processor=processor)
    first, second = processor.tokenizer.batch_decode(last["input_ids"])
    texts = re.findall(r"series of (\w+) frames from a (\S+) |Frame from (\S+):<fake", first + second)
    # the second says the number of frames that the processor padded it to, as it did
    want = ["four", "0:02:00", "00:40", "01:00", "01:20", "01:40"]
    want += ["six", "0:00:03", "00:00", "00:01", "00:02", "four", "0:00:05", "00:01", "00:02", "00:03", "00:04"]
    assert [said for group in texts for said in group if said] == want
    start = first.replace("<pad>", "").split("You are")[0]
    assert start == "a " and first.endswith("\n\n? ") and second.endswith(f"{FAKE}\n\n")


def test_smolvlm_says_the_middles_of_slots(smolvlm):
    model, processor = smolvlm
    inputs = SMOLVLM.inputs([5, Video(4), 6])
    options = dict(policy="average", processor=processor)
    for seconds, said in ((None, "00:01"), ([[70.0, 70.5, 79.0, 200.0]], "02:15")):
        text = processor.tokenizer.decode(compress(model, inputs, seconds=seconds, **options)["input_ids"][0])
        assert re.findall(r"Frame from (\S+?):<", text) == [said] and "series of one frames" in text


@pytest.mark.parametrize("text", ["Frame from 00:00:", "x Frame from 00:00:", "\nFrame from 1:", "\nFrame from 00:0:"])
def test_what_is_no_frame_of_smolvlm_is_an_image(smolvlm, text):
    model, processor = smolvlm
    ids = processor.tokenizer(text + FAKE + GLOBAL + "<image>" * 4 + FAKE, return_tensors="pt")["input_ids"]
    inputs = {"input_ids": ids, "pixel_values": INTERNVL.frames(Video(1))[None]}
    assert compress(model, inputs, "merge", capacity=1, processor=processor) == inputs


def test_a_frame_of_smolvlm_without_the_sentence(smolvlm):
    """A prompt that is not of the processor: nothing but the frames' own texts."""
    model, processor = smolvlm
    shown = FAKE + GLOBAL + "<image>" * 4 + FAKE
    text = "look:" + "".join(f"\nFrame from 00:{i:02d}:{shown}" for i in range(4))
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    inputs = {"input_ids": ids, "pixel_values": SMOLVLM.frames(Video(4))[None]}
    small = compress(model, inputs, "fifo", capacity=2, processor=processor)
    wanted = "look:" + "".join(f"\nFrame from 00:{i:02d}:{shown}" for i in (2, 3))
    assert processor.tokenizer.decode(small["input_ids"][0]) == wanted


def test_images_in_a_row_stay_images(internvl):
    """The form InternVL's authors give for several images, and numbers that do not go up by one."""
    model, processor = internvl
    shown = f"<img>{'<IMG_CONTEXT>' * 4}</img>"
    for text in (f"Image-1: {shown}\nImage-2: {shown}", f"{shown}\n{shown}", f"Frame2: {shown}\nFrame3: {shown}"):
        ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
        inputs = {"input_ids": ids, "pixel_values": INTERNVL.frames(Video(2))}
        assert compress(model, inputs, "merge", capacity=1, processor=processor) == inputs
    text = f"Frame1: {shown}\nFrame2: {shown}\nFrame4: {shown}\nFrame1: {shown}\nFrame2: {shown}"
    inputs = {"input_ids": processor.tokenizer(text, return_tensors="pt")["input_ids"]}
    inputs["pixel_values"] = INTERNVL.frames(Video(5))
    small = compress(model, inputs, "fifo", capacity=1, processor=processor)
    want = f"Frame1: {shown}\nFrame4: {shown}\nFrame1: {shown}"
    assert processor.tokenizer.decode(small["input_ids"][0]) == want
    chosen = {"input_ids": small["input_ids"], "pixel_values": inputs["pixel_values"][[1, 2, 4]]}
    torch.testing.assert_close(logits(model, small), logits(model, chosen), **CLOSE)


@pytest.mark.parametrize("entry", [INTERNVL, SMOLVLM], ids=lambda e: e.kind)
def test_misfits(entry, monkeypatch):
    model = entry.model()
    row = [5, Image(1), 6, Video(4), 7]
    inputs, options = entry.inputs(row), dict(capacity=2, processor=entry.processor)
    monkeypatch.setattr(type(model.base_model), "get_image_features", lambda *a, **k: pytest.fail("the encoder ran"))
    pixels = inputs["pixel_values"]
    with pytest.raises(ValueError, match=f"{entry.kind} marks the frames .* give processor="):
        compress(model, inputs, capacity=2)
    with pytest.raises(ValueError, match=f"give processor=.*got {type(entry.processor.tokenizer).__name__}"):
        compress(model, inputs, capacity=2, processor=entry.processor.tokenizer)
    with pytest.raises(ValueError, match=r"hold 24 placeholders .* ask for 4 in each of"):
        compress(model, inputs | {"pixel_values": pixels[:-1]}, **options)
    with pytest.raises(ValueError, match="ask for 1 in each of"):
        compress(model, inputs | {"pixel_values": pixels[..., :16, :16]}, **options)
    with pytest.raises(ValueError, match="pixel_values must be"):
        compress(model, inputs | {"pixel_values": pixels[0]}, **options)
    with pytest.raises(ValueError, match="pixel_values must be"):
        compress(model, inputs | {"pixel_values": [pixels]}, **options)
    with pytest.raises(ValueError, match="encoded frames already"):
        compress(model, inputs | {"mm_encoder_outputs": {"image": 1}}, **options)


def test_smolvlm_of_transformers_5_20_takes_groups_of_tokens():
    """Its merger cuts a row's image tokens in groups of patch_size, which some numbers of slots do not fill."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    from tests.hosts.tiny import IMAGE, TEXT
    from tests.hosts.tiny_smolvlm import VISION

    pytest.importorskip("num2words")
    text = dict(model_type="llama", **TEXT)
    config = SmolVLMConfig(
        vision_config=VISION | {"patch_size": 8}, text_config=text, image_token_id=IMAGE, scale_factor=2
    )
    model = SmolVLMForConditionalGeneration(config).eval()
    inputs = SMOLVLM.inputs([5, Video(4), 6])
    assert compress(model, inputs, capacity=2, processor=SMOLVLM.processor)["input_ids"].shape[0] == 1
    if hasattr(model.base_model, "inputs_merger"):
        with pytest.raises(ValueError, match="multiples of its patch_size 8"):
            compress(model, inputs, capacity=3, processor=SMOLVLM.processor)
    else:
        small = compress(model, inputs, capacity=3, processor=SMOLVLM.processor)
        assert logits(model, small).isfinite().all()
