"""What transformers' own processors make, of frames of 40 x 40 pixels, goes through compress; and prompts together."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.20.2", reason="pip install 'pyvidx[hosts]'")

from pyvidx.hosts import compress, together  # noqa: E402
from tests.hosts.test_compress import CLOSE, ENTRIES, answer, logits  # noqa: E402
from tests.hosts.tiny import IMAGE, VIDEO  # noqa: E402

SIZE, EDGE, CROPS = {"height": 32, "width": 32}, {"shortest_edge": 32}, [[32, 32], [32, 64]]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<pad>": 0, "<unk>": 1, "</s>": 2, "<image>": IMAGE, "<video>": VIDEO}
    vocab |= {word: i + 3 for i, word in enumerate("USER : ASSISTANT what is in who does ?".split())}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(["<pad>", "</s>", "<image>", "<video>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", padding_side="left"
    )


def onevision():
    return transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=SIZE, image_grid_pinpoints=CROPS),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=SIZE),
        tokenizer=tokenizer(), num_image_tokens=16, vision_feature_select_strategy="full",
    )  # fmt: skip


def next_video():
    return transformers.LlavaNextVideoProcessor(
        image_processor=transformers.LlavaNextImageProcessor(size=EDGE, crop_size=SIZE, image_grid_pinpoints=CROPS),
        video_processor=transformers.LlavaNextVideoVideoProcessor(size=SIZE, do_center_crop=False),
        tokenizer=tokenizer(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def video_llava():
    return transformers.VideoLlavaProcessor(
        image_processor=transformers.VideoLlavaImageProcessor(size=EDGE, crop_size=SIZE),
        video_processor=transformers.VideoLlavaVideoProcessor(size=EDGE, crop_size=SIZE),
        tokenizer=tokenizer(), patch_size=8, num_additional_image_tokens=1,
    )  # fmt: skip


def pictures(*shape, seed=0):
    return torch.randint(0, 255, (*shape, 40, 40, 3), generator=torch.Generator().manual_seed(seed)).byte().numpy()


@pytest.fixture(scope="module", params=[("llava_onevision", onevision), ("llava_next_video", next_video),
                                        ("video_llava", video_llava)], ids=lambda p: p[0])  # fmt: skip
def host(request):
    kind, processor = request.param
    return ENTRIES[kind].model(), processor()


def test_what_a_processor_makes(host):
    model, processor = host
    texts, videos = ["USER what <image> is <video> ?", "is <video> in <video>"], [pictures(6, seed=i) for i in range(3)]
    inputs = processor(text=texts, images=[pictures()], videos=videos, return_tensors="pt", padding=True)
    same = compress(model, inputs, "merge", capacity=6, processor=processor)
    assert type(same) is type(inputs) and torch.equal(same["input_ids"], inputs["input_ids"])
    torch.testing.assert_close(logits(model, same), logits(model, inputs), **CLOSE)
    assert torch.equal(answer(model, same), answer(model, inputs))
    small = compress(model, inputs, "merge", capacity=2).to("cpu")
    assert small["attention_mask"].sum() < inputs["attention_mask"].sum() and answer(model, small).shape == (2, 4)


def test_frames_of_another_size(host, monkeypatch):
    """Are an error before the encoder runs."""
    model, processor = host
    inputs = processor(text=["what is <video>"], videos=[pictures(3)], return_tensors="pt")
    monkeypatch.setattr(type(model.base_model), "get_video_features", lambda *a, **k: pytest.fail("the encoder ran"))
    for wrong in (inputs["pixel_values_videos"][..., :24, :], inputs["pixel_values_videos"][:, :, :1]):
        with pytest.raises(ValueError, match=r"frames of video 0 must be \(3, 32, 32\), as the encoder's, got"):
            compress(model, inputs | {"pixel_values_videos": wrong}, capacity=2)


def test_prompts_together(host):
    """Videos of unequal lengths, images of unequal numbers of crops, a prompt without a video."""
    model, processor = host
    asked = [
        {"text": ["USER what <image> is <video> ?"], "images": [pictures()], "videos": [pictures(6)]},
        {"text": ["is <video> in <image> <video>"], "videos": [pictures(4, seed=i) for i in (1, 2)],
         "images": [pictures(seed=4)[:16]]},
        {"text": ["who does <video>"], "videos": [pictures(1, seed=3)]},
        {"text": ["who is USER"]},
    ]  # fmt: skip
    each = [processor(**one, return_tensors="pt") for one in asked]
    for side in ("left", "right"):
        batch = compress(model, together(each, side=side), "merge", capacity=6)
        assert type(batch) is type(each[0]) and batch["attention_mask"][:, -1].all() == (side == "left")
        for one, mine in zip(each, logits(model, batch)):
            torch.testing.assert_close(mine[None], logits(model, one), **CLOSE)


def test_what_does_not_join():
    ids, words = {"input_ids": torch.ones(1, 3, dtype=torch.int64)}, {"input_ids": torch.ones(1, 2, dtype=torch.int64)}
    for several, options, message in (
        ([], {}, "at least one prompt"),
        ([ids], {"side": "top"}, "side must be"),
        ([ids, {"x": torch.ones(1)}], {}, "holds input_ids .*got None"),
        ([ids, {"input_ids": [[1, 2]]}], {}, "holds input_ids .*got list"),
        (ids, {}, "holds input_ids .*got str"),
        ([ids | {"labels": ids["input_ids"]}, words], {}, "labels must be there for all"),
        ([ids | {"x": torch.ones(1, 2, 3)}, words | {"x": torch.ones(1, 2, 4)}], {}, "x must have one shape"),
        ([ids | {"x": [1]}, words | {"x": torch.ones(1)}], {}, "x must be tensors, or lists"),
    ):
        with pytest.raises(ValueError, match=message):
            together(several, **options)
    joined = together([ids | {"labels": ids["input_ids"]}, words | {"labels": words["input_ids"]}], pad=7)
    assert joined["input_ids"].tolist() == [[1, 1, 1], [7, 1, 1]] and joined["labels"].tolist()[1] == [-100, 1, 1]
    assert joined["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
