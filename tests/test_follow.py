"""Videos that are still being written: a file that grows, a pipe; the same frames as when they are whole."""

import io
import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch

av = pytest.importorskip("av", reason="pip install 'pyvidx[video]'")

from pyvidx.video import follow, stream  # noqa: E402


@pytest.fixture(scope="module", params=["mpegts", "matroska"])
def path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("follow") / "a.video"
    frames = torch.randint(0, 256, (20, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with av.open(str(path), "w", format=request.param) as file:
        video = file.add_stream("mpeg4", rate=10)
        video.width = video.height = 64
        for frame in frames:
            file.mux(video.encode(av.VideoFrame.from_ndarray(frame.numpy(), "rgb24")))
        file.mux(video.encode())
    return path


def same(found, path, **options):
    want = list(stream(path, chunk=4, **options))
    assert len(found) == len(want)
    for a, b in zip(found, want):
        assert torch.equal(a.frames, b.frames) and torch.equal(a.seconds, b.seconds) and not a.damaged


@pytest.mark.parametrize("options", [{}, {"fps": 2}])
def test_a_file_that_grows(path, tmp_path, options):
    data, grown = path.read_bytes(), tmp_path / "grown.video"
    grown.write_bytes(b"")

    def write():
        for i in range(0, len(data), 1 + len(data) // 10):
            time.sleep(0.02)
            with grown.open("ab") as file:
                file.write(data[i : i + 1 + len(data) // 10])

    writer = threading.Thread(target=write)
    writer.start()
    same(list(follow(grown, idle=0.5, **options)), path, **options)
    writer.join()


def test_a_pipe_and_a_file_object(path):
    data, (end, start) = path.read_bytes(), os.pipe()

    def write():
        with os.fdopen(start, "wb") as file:
            for i in range(0, len(data), 1000):
                file.write(data[i : i + 1000])
                file.flush()

    threading.Thread(target=write).start()
    same(list(follow(os.fdopen(end, "rb"))), path)
    same(list(follow(io.BytesIO(data))), path)


@pytest.mark.filterwarnings("ignore:stream")
def test_a_part_is_what_is_there(path):
    """Cut in the middle, it ends there."""
    data = path.read_bytes()
    clips = list(follow(io.BytesIO(data[: len(data) * 2 // 3])))
    assert 2 <= len(clips) < 5 and torch.equal(clips[0].frames, next(stream(path, chunk=4)).frames)


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        follow(tmp_path / "a.ts")
    for wrong, message in (
        ((tmp_path,), "got the folder"),
        ((io.StringIO(""),), "must give bytes"),
        ((5,), "must be a path, '-' or a file object, got int"),
    ):
        with pytest.raises(ValueError, match=message):
            follow(*wrong)
    with pytest.raises(ValueError, match="must give bytes, got str"):
        list(follow(SimpleNamespace(read=lambda size: "x")))
    with pytest.raises(ValueError, match="idle must be"):
        follow(io.BytesIO(), idle=-1)
    with pytest.raises(RuntimeError, match="cannot be decoded by PyAV"):
        list(follow(io.BytesIO(b"no video")))
