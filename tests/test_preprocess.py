"""Frames to pixels: against Pillow, transformers' CLIP processor, and the sources' own lines for the other presets."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyvidx.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    MMACTION_MEAN,
    MMACTION_STD,
    PRESETS,
    Preset,
    clip_preprocess,
    preprocess,
)

from .torchvision_shim import mend_torchvision

SIZES = [
    (240, 320), (360, 640), (640, 360), (720, 1280), (224, 224), (223, 223), (225, 224), (224, 500), (100, 301),
    (97, 53), (333, 667), (481, 1920), (32, 32), (801, 402),
]  # fmt: skip


def noise(*shape: int, hard: bool = False) -> torch.Tensor:
    """The worst input for an interpolation: independent values, black and white if hard."""
    return torch.randint(0, 2, shape, dtype=torch.uint8) * 255 if hard else torch.randint(0, 256, shape).byte()


def levels(pixels: torch.Tensor, mean=CLIP_MEAN, std=CLIP_STD) -> torch.Tensor:
    """Undo the normalization: values on the scale of 0..255."""
    return (pixels.double() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)) * 255


def pillow(frame: torch.Tensor, h: int, w: int) -> torch.Tensor:
    Image = pytest.importorskip("PIL.Image")
    image = Image.fromarray(frame.numpy())
    # In two steps, because Pillow 13 swaps its passes for tall images; in one step, all before it do just this.
    image = image.resize((w, image.height), Image.Resampling.BICUBIC).resize((w, h), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))


def center(x: torch.Tensor, size: int) -> torch.Tensor:
    top, left = (x.shape[-2] - size) // 2, (x.shape[-1] - size) // 2
    return x[..., top : top + size, left : left + size]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("size", [32, 224, 336])
def test_clip_resize_is_pillows(size, hard):
    sizes = [*SIZES, (1000, 300), (300, 1000)] if size == 224 else SIZES[::3]
    for H, W in sizes:
        frame = noise(1, H, W, 3, hard=hard)
        h, w = (size, size * W // H) if H <= W else (size * H // W, size)
        expected = center(pillow(frame[0], h, w).permute(2, 0, 1), size)[None]
        pixels = levels(clip_preprocess(frame, size))
        torch.testing.assert_close(pixels, expected.double(), rtol=0, atol=1e-3)  # float32 normalization


@pytest.mark.parametrize(("H", "W"), SIZES)
def test_matches_the_processor_of_transformers(H, W):
    pytest.importorskip("transformers")
    mend_torchvision()
    from transformers import CLIPImageProcessorPil

    frame = noise(H, W, 3)
    expected = CLIPImageProcessorPil()(frame.numpy(), return_tensors="pt", input_data_format="channels_last")
    expected = torch.as_tensor(np.asarray(expected["pixel_values"]))[0]
    pixels = clip_preprocess(frame)
    assert pixels.shape == expected.shape == (3, 224, 224) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("name", "resample"), [("siglip", 3), ("siglip2", 2)])
@pytest.mark.parametrize(("H", "W"), SIZES[::3])
def test_matches_siglips_processor(name, resample, H, W):
    pytest.importorskip("transformers")
    mend_torchvision()
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    frame = noise(H, W, 3)
    processor = SiglipImageProcessorPil(resample=resample)
    expected = processor(frame.numpy(), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    # Pillow 13 resizes a tall picture's rows first: up to a level off.
    torch.testing.assert_close(
        preprocess(frame, name), torch.as_tensor(np.asarray(expected))[0], rtol=0, atol=2e-6 if H <= 2 * W else 0.008
    )


def test_a_crop_beyond_the_frame_is_black_as_the_processors():
    pytest.importorskip("transformers")
    mend_torchvision()
    from transformers import CLIPImageProcessorPil

    for H, W, size, crop in ((40, 57, 24, 33), (57, 40, 24, 38), (30, 31, 11, 24)):
        frame = noise(H, W, 3)
        processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": crop, "width": crop})
        expected = processor(frame.numpy(), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        pixels = preprocess(frame, Preset(size, crop=crop))
        torch.testing.assert_close(pixels, torch.as_tensor(np.asarray(expected))[0], rtol=0, atol=2e-6)


def test_shapes_dtypes_strides_and_chunks(monkeypatch):
    video = noise(2, 5, 40, 64, 3)
    pixels = clip_preprocess(video, 32)
    assert pixels.shape == (2, 5, 3, 32, 32) and pixels.is_contiguous()
    assert clip_preprocess(video, 32, crop=False).shape == (2, 5, 3, 32, 51)
    assert clip_preprocess(video, 32, resize="squash", crop=False).shape == (2, 5, 3, 32, 32)
    assert clip_preprocess(video[:, :0], 32).shape == (2, 0, 3, 32, 32)
    assert clip_preprocess(video.transpose(2, 3)[:, ::2], 32).shape == (2, 3, 3, 32, 32)
    strided = video.transpose(2, 3)[:, ::2]
    assert torch.equal(clip_preprocess(strided, 32), clip_preprocess(strided.contiguous(), 32))
    assert torch.equal(clip_preprocess(video, 32, dtype=torch.float16), pixels.half())
    assert torch.equal(clip_preprocess(video[1, 3], 32), pixels[1, 3])
    sampled = Preset(32, crop=32, filter="bicubic")
    pixels = preprocess(video, sampled)
    monkeypatch.setattr("pyvidx.preprocess._CHUNK_VALUES", 3 * 40 * 64 * 3)  # three frames at a time
    assert torch.equal(preprocess(video, sampled), pixels)


def test_mean_and_std_are_applied():
    frame = torch.tensor([10, 20, 30], dtype=torch.uint8).expand(8, 8, 3)
    pixels = clip_preprocess(frame, 8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    expected = [(10 / 255 - 0.1) / 0.5, (20 / 255 - 0.2) / 0.25, (30 / 255 - 0.3) / 2]
    torch.testing.assert_close(pixels[:, 3, 3], torch.tensor(expected))


@pytest.mark.parametrize("hard", [False, True])
def test_ma_lmm_evaluation(hard):
    frames = noise(2, 256, 341, 3, hard=hard)
    resized = F.interpolate(frames.permute(3, 0, 1, 2).float(), size=(224, 224), mode="bicubic", align_corners=False)
    resized = resized.permute(1, 0, 2, 3)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    wrapped = torch.from_numpy(resized.trunc().numpy().astype(np.int64) % 256)
    official = (wrapped.float() / 255 - mean) / std
    torch.testing.assert_close(preprocess(frames, "ma_lmm_official"), official, rtol=0, atol=2e-6)
    clamped = (resized.clamp(0, 255).trunc() / 255 - mean) / std
    torch.testing.assert_close(preprocess(frames, "ma_lmm"), clamped, rtol=0, atol=2e-6)
    overshoot = (resized.trunc() < 0) | (resized >= 256)
    assert torch.equal((official - clamped).abs() > 1, overshoot) and overshoot.any()


@pytest.mark.parametrize(("H", "W"), [(240, 320), (101, 203), (500, 300)])
@pytest.mark.parametrize(("name", "size"), [("bt_adapter_retrieval", 224), ("bt_adapter_retrieval_256", 256)])
def test_bt_adapter_retrieval(name, size, H, W):
    frames = noise(2, H, W, 3)
    h, w = int(H * size / min(H, W) + 0.5), int(W * size / min(H, W) + 0.5)
    # Half a level of rounding, and 0.02 because the float32 kernel computes its coordinates in float32.
    resized = F.interpolate(frames.permute(0, 3, 1, 2).double(), size=(h, w), mode="bilinear", align_corners=False)
    expected = center(resized, 224)
    pixels = preprocess(frames, name)
    assert pixels.shape == (2, 3, 224, 224)
    torch.testing.assert_close(levels(pixels, MMACTION_MEAN, MMACTION_STD), expected, rtol=0, atol=0.52)


def test_bt_adapter_retrieval_is_opencvs_bilinear():
    # OpenCV computes in 11-bit fixed point: one level off in 13 % of the values.
    cv2 = pytest.importorskip("cv2")
    frames = noise(2, 240, 320, 3)
    expected = np.stack([cv2.resize(f.numpy(), (299, 224), interpolation=cv2.INTER_LINEAR) for f in frames])
    expected = center(torch.from_numpy(expected).permute(0, 3, 1, 2), 224).double()
    pixels = levels(preprocess(frames, "bt_adapter_retrieval"), MMACTION_MEAN, MMACTION_STD)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1.001)


@pytest.mark.parametrize(("H", "W"), [(240, 320), (720, 1280), (224, 224), (97, 531)])
def test_bt_adapter_chat_squashes_to_the_nearest_pixel(H, W):
    frames = noise(2, H, W, 3)
    squashed = F.interpolate(frames.permute(0, 3, 1, 2).float(), size=(224, 224)).to(torch.uint8)
    pixels = preprocess(frames, "bt_adapter_chat")
    assert torch.equal(levels(pixels).round().byte(), squashed)


def test_presets_are_data():
    larger = dataclasses.replace(PRESETS["clip"], size=336, crop=336)
    assert preprocess(noise(400, 500, 3), larger).shape == (3, 336, 336)
    frame = noise(100, 120, 3)
    assert torch.equal(preprocess(frame), clip_preprocess(frame))
    for name in PRESETS:
        assert preprocess(frame, name).shape == (3, 224, 224)


def test_errors_say_what_is_wrong():
    for bad in (torch.zeros(4, 4, 3), torch.zeros(3, 4, 4).byte(), torch.zeros(4, 3).byte(), noise(0, 4, 3)):
        with pytest.raises(ValueError, match=r"frames must be uint8 \[..., H, W, 3\]"):
            preprocess(bad)
    with pytest.raises(ValueError, match="preset must be one of .*'clip'"):
        preprocess(noise(4, 4, 3), "clip336")
    with pytest.raises(ValueError, match="resize must be one of"):
        clip_preprocess(noise(4, 4, 3), resize="longest")
    with pytest.raises(ValueError, match="crop <= size"):
        Preset(size=224, crop=256, filter="nearest")
    with pytest.raises(ValueError, match="filter must be one of"):
        Preset(filter="lanczos")
    for wrong in ({"mean": (0.5,)}, {"std": (0.5, 0.5)}, {"std": (0.5, 0.5, 0)}):
        with pytest.raises(ValueError, match="mean and std must be 3 numbers, std not 0"):
            Preset(filter="bilinear", **wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", PRESETS)
def test_same_pixels_on_a_gpu(name):
    frames = noise(3, 300, 400, 3)
    on_cpu, on_gpu = preprocess(frames, name), preprocess(frames.cuda(), name)
    assert on_gpu.is_cuda
    levels_apart = (levels(on_cpu) - levels(on_gpu.cpu())).abs()
    # float32 interpolation may fall on the other side of a rounding; the Pillow and nearest filters may not.
    assert levels_apart.max() < (1e-3 if PRESETS[name].filter in ("pillow", "pillow_bilinear", "nearest") else 1.3)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(41, 530), (530, 41), (3, 500)])
def test_only_what_survives_the_crop_of_a_huge_frame_is_made(monkeypatch, mode, shape):
    frames, preset = noise(2, *shape, 3), Preset(224, crop=200, filter=mode)
    expected = levels(preprocess(frames, preset))
    monkeypatch.setattr("pyvidx.preprocess._MOST_PIXELS", 200 * 200)
    # The same products, summed in another order: now and then across a rounding.
    difference = (levels(preprocess(frames, preset)) - expected).abs()
    assert difference.max() < 1.001 and (difference > 0.5).double().mean() < 5e-3


def test_a_resized_frame_that_no_crop_bounds_is_refused():
    with pytest.raises(ValueError, match="must have at most 16777216 pixels, got 224 x 14679840"):
        clip_preprocess(torch.zeros(1, 1, 65535, 3, dtype=torch.uint8), crop=False)
