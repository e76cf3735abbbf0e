"""Captioned videos from a csv, a folder and tar shards, and batches that stay full where videos are broken."""

import io
import json
import pickle
import tarfile

import pytest
import torch

from pyvidx.data import captions
from pyvidx.data.captions import Packed, captioned, folder, shards, webvid
from pyvidx.train.data import Take, generator, shortened, sized
from pyvidx.train.pairs import PairVideos
from pyvidx.video import write


def videos(root, **levels):
    pytest.importorskip("av", reason="writing video needs PyAV: pip install 'pyvidx[video]'")
    root.mkdir(parents=True, exist_ok=True)
    for name, level in levels.items():
        write(root / f"{name}.mp4", torch.full((9, 32, 64, 3), level, dtype=torch.uint8))


def tar(path, **members):
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def contents(source):
    """name -> caption and bytes of the video."""
    found = {}
    for row in range(len(source)):
        try:
            with source.file(row) as path:
                video = path.read_bytes()
        except FileNotFoundError:
            video = None
        found[source.names[row]] = source.texts[row], video
    return found


def test_packed():
    strings = ["a", "", "größer 水", "b" * 300]
    packed = Packed(strings)
    assert list(packed) == strings and len(packed) == 4 and packed[2] == strings[2]
    assert list(Packed([])) == [] and list(pickle.loads(pickle.dumps(packed))) == strings


def test_webvid(tmp_path):
    (tmp_path / "v/p1").mkdir(parents=True)
    (tmp_path / "v/p1/7.mp4").write_bytes(b"seven")
    (tmp_path / "a.csv").write_text('7,"A dog, running",x,p1\n\n8,Rain,x,p2\n')
    source = webvid(tmp_path / "a.csv", tmp_path / "v")
    assert contents(source) == {"p1/7.mp4": ("A dog, running", b"seven"), "p2/8.mp4": ("Rain", None)}
    (tmp_path / "b.csv").write_text('videoid,name,page_dir\n7,"A dog, running",p1\n8,Rain,p2\n')
    named = {"caption": "name", "video": "{page_dir}/{videoid}.mp4", "header": True}
    again = captioned({"kind": "webvid", "table": str(tmp_path / "b.csv"), "root": str(tmp_path / "v"), **named})
    assert contents(again) == contents(source) and again.digest() == source.digest()
    for wrong in ({"caption": 9}, {"video": "{9}.mp4"}, {**named, "caption": "title"}):
        with pytest.raises(ValueError, match="line .* of .*b.csv has no column"):
            webvid(tmp_path / "b.csv", **wrong)
    (tmp_path / "c.csv").write_text("")
    with pytest.raises(ValueError, match="no row"):
        webvid(tmp_path / "c.csv")


def test_folder(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.mp4", "in/b.webm", "c.mp4"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "in/b.txt").write_text("two")
    want = {"a.mp4": ("one", b"a.mp4"), "c.mp4": ("", b"c.mp4"), "in/b.webm": ("two", b"in/b.webm")}
    assert contents(folder(tmp_path)) == want
    (tmp_path / "captions.csv").write_text("video,caption\nc.mp4,three\n")
    assert contents(folder(tmp_path)) == {"c.mp4": ("three", b"c.mp4")}
    (tmp_path / "captions.json").write_text(json.dumps({"a.mp4": "four"}))
    assert contents(captioned({"kind": "folder", "root": str(tmp_path)})) == {"a.mp4": ("four", b"a.mp4")}
    (tmp_path / "captions.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="captions.json must be"):
        folder(tmp_path)


def test_shards(tmp_path, monkeypatch):
    tar(tmp_path / "00.tar", a__mp4=b"video a", a__txt=b"one\n", b__json=b'{"caption": "two"}', b__mp4=b"video b")
    tar(
        tmp_path / "01.tar",
        **{"dir/a__json": b'{"id": 3}', "dir/a__mp4": b"video c", "d__txt": b"lost", "e__jpg": b"-"},
    )
    want = {
        "00.tar/a": ("one", b"video a"), "00.tar/b": ("two", b"video b"), "01.tar/dir/a": ("", b"video c"),
        "01.tar/d": ("lost", None),
    }  # fmt: skip
    source = shards(str(tmp_path / "*.tar"))
    assert contents(source) == want
    assert (
        contents(captioned({"kind": "shards", "files": [str(tmp_path / "00.tar"), str(tmp_path / "01.tar")]})) == want
    )
    assert contents(pickle.loads(pickle.dumps(source))) == want  # as workers get it
    index = tmp_path / "index.pt"
    first = shards(str(tmp_path / "*.tar"), index)
    with monkeypatch.context() as patched:
        patched.setattr(captions, "_members", None)  # a second time it is not looked for
        again = captioned({"kind": "shards", "files": str(tmp_path / "*.tar"), "index": str(index)})
    assert contents(first) == contents(again) == want and again.digest() == source.digest()
    tar(tmp_path / "01.tar", f__txt=b"six", f__mp4=b"video f")
    assert contents(shards(str(tmp_path / "*.tar"), index))["01.tar/f"] == ("six", b"video f")
    whole = (tmp_path / "00.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:700])
    (tmp_path / "text.tar").write_bytes(b"no archive" * 100)
    for name in ("cut.tar", "text.tar"):
        with pytest.raises(ValueError, match="not a plain .tar"):
            shards(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="there is no"):
        shards(str(tmp_path / "2*.tar"))


@pytest.mark.parametrize(
    "source, text",
    [({"kind": "zip"}, "must be one of webvid, folder, shards"), ({"kind": "folder", "path": "x"}, "folder: .*'root'")],
)
def test_sources_that_mean_nothing(source, text):
    with pytest.raises(ValueError, match=text):
        captioned(source)


def test_a_broken_row_gives_its_place_to_the_next(tmp_path):
    videos(tmp_path, a=10, d=200)
    (tmp_path / "b.mp4").write_bytes(b"this is not a video" * 100)
    videos(tmp_path, c=90)
    for name in "abd":
        (tmp_path / f"{name}.txt").write_text(name)
    take = Take(4, "random_segment", sized("bt_adapter_train", 16), 24, (0.08, 1.0))
    data = PairVideos(folder(tmp_path), take, seed=1)
    batch = data.collate([data[3, row] for row in range(4)])
    assert batch.at == [(3, 0), (3, 3), (3, 3), (3, 3)] and batch.text == ["a", "d", "d", "d"]
    assert set(batch.broken) == {"b.mp4", "c.mp4"} and "no caption" in batch.broken["c.mp4"]
    assert len(batch) == 4 and batch.frames == 4 and batch.video.shape == (4, 4, 3, 16, 16)
    preset = take.preset
    for row, level in ((0, 10), (1, 200)):  # a gray video stays one, whatever box
        want = (level / 255 - torch.tensor(preset.mean)) / torch.tensor(preset.std)
        assert (batch.video[row] - want[:, None, None]).abs().max() < 0.05
    (tmp_path / "a.mp4").unlink()
    (tmp_path / "d.mp4").unlink()
    lost = PairVideos(folder(tmp_path), take, seed=1)
    with pytest.raises(RuntimeError, match="2 rows from b.mp4 on cannot be read"):
        lost[0, 0]


def test_draws_are_of_seed_epoch_row_and_purpose():
    keys = [(s, e, r) for s in (1, 2) for e in (0, 300) for r in (0, 5)] + [(1, 0, 0, "mask")]
    drawn = {float(torch.rand((), generator=generator(*key))) for key in keys}
    assert len(drawn) == len(keys)
    assert torch.rand((), generator=generator(1, 2, 3)) == torch.rand((), generator=generator(1, 2, 3))


def test_the_shorter_side_first():
    frames = torch.randint(0, 256, (2, 30, 60, 3), dtype=torch.uint8)
    small = shortened(frames, 10)
    assert small.dtype == torch.uint8 and small.shape == (2, 10, 20, 3)
    # Every third pixel is the middle of its three: no antialiasing.
    assert torch.equal(small, frames[:, 1::3, 1::3]) and torch.equal(shortened(frames, 30), frames)


def test_a_shard_reads_as_a_folder(tmp_path):
    videos(tmp_path / "v", a=40, b=180)
    for name in "ab":
        (tmp_path / f"v/{name}.txt").write_text(f"text of {name}")
    files = {f"{p.stem}__{p.suffix[1:]}": p.read_bytes() for p in sorted((tmp_path / "v").iterdir())}
    tar(tmp_path / "0.tar", **files)
    take = Take(3, "random_segment", sized("bt_adapter_train", 16), area=(0.3, 1.0))
    left, right = (PairVideos(s, take, seed=1) for s in (folder(tmp_path / "v"), shards(str(tmp_path / "0.tar"))))
    for row in range(2):
        assert torch.equal(left[1, row].video, right[1, row].video) and left[1, row].text == right[1, row].text
    assert not torch.equal(left[1, 0].video, left[1, 1].video) and not left[1, 0].broken
