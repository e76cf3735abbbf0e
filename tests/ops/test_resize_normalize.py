"""Levels are compared for equality: with Pillow's own resize, and with the reference's dense products."""

import numpy as np
import pytest
import torch

from pyvidx.ops._library import TELLS_NO_TYPES
from pyvidx.ops.resize_normalize import reference, resize_normalize
from tests.harness import DEVICES, DTYPES, needs_kernels, poisoned

FILTERS = ["bicubic", "bilinear"]
LEVELS = dict(std=(1 / 255,) * 3)  # out is the levels themselves
# H, W, h, w: reductions and enlargements, both at once, none, single pixels, odd and prime, one past a vector
CASES = [
    (1, 1, 1, 1), (1, 1, 5, 7), (5, 7, 1, 1), (2, 3, 9, 2), (40, 64, 40, 64), (40, 64, 40, 17), (40, 64, 13, 64),
    (97, 53, 31, 90), (33, 130, 17, 33), (61, 59, 20, 47), (120, 30, 6, 29),
]  # fmt: skip


def noise(*shape, hard=False, device="cpu", seed=0):
    """The worst input of an interpolation: independent levels, black and white if hard."""
    x = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
    return (x // 128 * 255 if hard else x).to(device, torch.uint8)


def levels(frames, size, filter="bicubic", **options):
    return resize_normalize(frames, size, filter=filter, **LEVELS, **options).round().to(torch.uint8)


def expected(frames, size, crop=None, filter="bicubic", mean=(0, 0, 0), std=(1, 1, 1), dtype=torch.float32):
    return reference(frames, size, crop or (0, 0, *size), filter == "bilinear", mean, std, dtype)


def pillow(frames, h, w, filter):
    Image = pytest.importorskip("PIL.Image")
    kind = Image.Resampling[filter.upper()]
    # In two steps, because Pillow 13 swaps its passes for tall images.
    images = [Image.fromarray(f.numpy()) for f in frames]
    images = [np.array(i.resize((w, i.height), kind).resize((w, h), kind)) for i in images]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("H, W, h, w", CASES)
def test_levels_are_pillows(H, W, h, w, hard, filter):
    frames = noise(2, H, W, 3, hard=hard)
    assert torch.equal(levels(frames, (h, w), filter), pillow(frames, h, w, filter))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("H, W, h, w", CASES)
def test_levels_are_the_references(H, W, h, w, filter, device):
    frames = noise(2, H, W, 3, hard=True, device=device)
    assert torch.equal(levels(frames, (h, w), filter), expected(frames, (h, w), filter=filter, **LEVELS).round().byte())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_forward_normalizes_in_every_dtype(dtype, device):
    frames, mean, std = noise(2, 30, 50, 3, device=device), (0.48, 0.45, 0.4), (0.26, -0.3, 2.0)
    got = resize_normalize(frames, (12, 21), mean=mean, std=std, dtype=dtype)
    assert got.dtype == dtype and got.is_contiguous()
    want = expected(frames, (12, 21), mean=mean, std=std, dtype=torch.float64)
    within = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert (got.double() - want).abs().max() <= within  # half a step of the largest value, 7.4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("crop", [(0, 0, 24, 40), (3, 5, 7, 9), (23, 39, 1, 1), (-4, -7, 40, 60), (20, -3, 9, 11),
                                  (-9, 2, 5, 4), (30, 50, 3, 3), (-(2**31) + 1, 2**31 - 9, 2, 2)])  # fmt: skip
def test_forward_of_a_crop_is_the_crop_of_the_whole(crop, device):
    """Beyond the resized frame there is black."""
    frames, (top, left, rows, columns) = noise(2, 57, 90, 3, device=device), crop
    whole = levels(frames, (24, 40))
    want = whole.new_zeros(2, 3, rows, columns)
    for y in range(max(0, -top), min(rows, 24 - top)):
        for x in range(max(0, -left), min(columns, 40 - left)):
            want[:, :, y, x] = whole[:, :, top + y, left + x]
    assert torch.equal(levels(frames, (24, 40), crop=crop), want)


LAYOUTS = {
    "a window of a larger buffer": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    "every other frame": lambda x: x.repeat_interleave(2, 0)[::2],
    "planes": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "turned": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "four channels": lambda x: torch.cat([x, x[..., :1]], 3)[..., :3],
    "one frame for all": lambda x: x[:1].expand(x.shape),
    "an odd address": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_reads_any_strides(layout, device):
    frames = LAYOUTS[layout](noise(3, 36, 52, 3, device=device))
    assert torch.equal(levels(frames, (16, 24)), levels(frames.contiguous(), (16, 24)))


@pytest.mark.parametrize("device", DEVICES)
def test_forward_into_out(device):
    frames = noise(2, 30, 50, 3, device=device)
    room = poisoned((2, 5, 14, 25), frames.float())
    out = room[:, 1:4, 1:13, :21]
    assert resize_normalize(frames, (12, 21), out=out) is out
    assert torch.equal(out, resize_normalize(frames, (12, 21)))
    assert int(room.isnan().sum()) == room.numel() - out.numel()


@pytest.mark.parametrize("device", DEVICES)
def test_forward_of_no_frames(device):
    assert resize_normalize(noise(0, 4, 5, 3, device=device), (3, 2)).shape == (0, 3, 3, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("H, W, size, crop", [
    (3, 9000, (3, 4), None), (9000, 3, (4, 3), None),  # windows longer than any tile
    (4, 700, (6, 1100), (1, 30, 4, 1060)),  # more columns than one turn takes
    (1, 5000, (224, 1120000), (0, 559888, 224, 224)),
])  # fmt: skip
def test_forward_of_extreme_shapes(H, W, size, crop, device):
    frames = noise(1, H, W, 3, hard=True, device=device)
    got = levels(frames, size, crop=crop)
    assert torch.equal(got, expected(frames, size, crop, **LEVELS).round().byte())


def test_threads_share_frames():
    frames = noise(3, 300, 200, 3)
    one, threads = levels(frames, (260, 170)), torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        assert torch.equal(levels(frames, (260, 170)), one)
    finally:
        torch.set_num_threads(threads)


def test_registration():
    op, frames = torch.ops.pyvidx.resize_normalize, noise(2, 9, 11, 3)
    args = frames, [5, 6], [1, 1, 3, 4], False, [0.5] * 3, [0.5] * 3
    torch.library.opcheck(op.default, (*args, torch.float16))
    torch.library.opcheck(torch.ops.pyvidx.resize_normalize_out.default, (*args, torch.empty(2, 3, 3, 4)))


def test_compiled_for_any_number_of_frames():
    f = torch.compile(lambda x: resize_normalize(x, (5, 6), mean=(0.5,) * 3) * 2, fullgraph=True, backend="aot_eager")
    for T, H in ((2, 9), (3, 12), (5, 14)):
        frames = noise(T, H, 11, 3)
        torch.testing.assert_close(f(frames), resize_normalize(frames, (5, 6), mean=(0.5,) * 3) * 2)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(frames=torch.zeros(2, 4, 4, 3)), r"frames must be uint8 \[T, H, W, 3\], got \(2, 4, 4, 3\) float32"),
        (dict(frames=noise(4, 4, 3)), "frames must be uint8"),
        (dict(frames=noise(2, 4, 4, 4)), "frames must be uint8"),
        (dict(frames=noise(2, 0, 4, 3)), "H and W of frames must be in"),
        (dict(frames=np.zeros((2, 4, 4, 3), np.uint8)), "frames must be a tensor, got numpy"),
        (dict(size=(3,)), r"size must be .*, got \(3,\)"),
        (dict(size=(0, 3)), "size must be"),
        (dict(size=(3, 2**31)), "size must be"),
        (dict(crop=(0, 0, 0, 3)), "crop must be"),
        (dict(crop=(0, 0, 3)), "crop must be"),
        (dict(crop=(0, -(2**31), 3, 3)), "crop must be"),
        (dict(filter="lanczos"), "filter must be 'bicubic' or 'bilinear'"),
        (dict(mean=(0.5,)), "mean and std must have 3 values"),
        (dict(std=(1, 0, 1)), "std must not be 0"),
        (dict(dtype=torch.int32), "dtype must be float32"),
        (dict(out=torch.zeros(2, 3, 3, 4)), r"out must be \(2, 3, 3, 3\)"),
        (dict(out=torch.zeros(2, 3, 3, 3, dtype=torch.int32)), "out must be float32"),
    ],
)
def test_rejects(options, message):
    options = {"frames": noise(2, 4, 4, 3), "size": (3, 3)} | options
    with pytest.raises(ValueError, match="resize_normalize: " + message):
        resize_normalize(**options)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(frames=torch.zeros(2, 4, 4, 3)), r"frames .*must be .*uint8.*, got \(2, 4, 4, 3\) float32"),
        (dict(size=[3]), "size must be"),
        (dict(size=[3, 2**40]), "size must be"),
        (dict(crop=[0, 0, 2**62, 3]), "crop must be"),
        (dict(std=[0.0, 1.0, 1.0]), "std must not be 0"),
        (dict(dtype=torch.uint8), "dtype must be"),
    ],
)
def test_raw_calls_are_checked(change, message):
    args = dict(frames=noise(2, 4, 4, 3), size=[3, 3], crop=[0, 0, 3, 3], bilinear=False, mean=[0.0] * 3,
                std=[1.0] * 3, dtype=torch.float32)  # fmt: skip
    refused = (ValueError, RuntimeError) if TELLS_NO_TYPES else ValueError
    with pytest.raises(refused, match="resize_normalize: " + message):
        torch.ops.pyvidx.resize_normalize(*(args | change).values())


@needs_kernels
def test_out_must_not_lie_in_frames():
    room = torch.zeros(2, 3, 3, 3)
    frames = room.view(-1).view(torch.uint8)[:96].view(2, 4, 4, 3)
    with pytest.raises(ValueError, match="out is written and must not share memory with frames"):
        resize_normalize(frames, (3, 3), out=room)
