"""Texts and tables of strangers: encodings, sizes, rows that cannot be, shards that are cut, names that lead away."""

import codecs
import csv
import io
import json
import os
import tarfile
import warnings

import pytest
import torch

from pyvidx.data import tables
from pyvidx.data.captions import captioned, folder, shards, webvid
from pyvidx.eval.annotations import FORMATS, parse
from pyvidx.train.data import rows

NAMED = {"caption": "caption", "video": "{video}", "header": True}


def tar(path, members, **flags):
    with tarfile.open(path, "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def captions_of(source):
    return dict(zip(source.names, source.texts))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_marks_tell_the_encoding(encoding, tmp_path):
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}.get(encoding, b"")
    text = 'video,caption\r\na.mp4,größer 水\r\n\r\nb.mp4,"two\r\nlines, one quote """\r\n'
    (tmp_path / "t.csv").write_bytes(mark + text.encode(encoding))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = webvid(tmp_path / "t.csv", **NAMED)
    assert captions_of(source) == {"a.mp4": "größer 水", "b.mp4": 'two\r\nlines, one quote "'}
    (tmp_path / "rows.csv").write_bytes(mark + "video,prompt,answer\na.mp4,p,größer\n".encode(encoding))
    assert rows(tmp_path / "rows.csv")[0].answer == "größer"
    (tmp_path / "rows.jsonl").write_bytes(mark + '{"video": "a", "prompt": "p", "answer": "größer"}\n'.encode(encoding))
    assert rows(tmp_path / "rows.jsonl")[0].answer == "größer"
    (tmp_path / "m.csv").write_bytes(mark + "video_id,sentence\na,größer\n".encode(encoding))
    assert parse("msrvtt_csv", tmp_path / "m.csv")[0].captions == ("größer",)
    (tmp_path / "m.json").write_bytes(mark + '{"a": ["größer"]}'.encode(encoding))
    assert parse("msvd", tmp_path / "m.json")[0].captions == ("größer",)


def test_bad_rows_are_counted_listed_and_left_out(tmp_path):
    long = "x" * 200_000
    lines = [b"video,caption", b"a.mp4,one", "b.mp4,caf\xe9".encode("latin-1"), b"c.mp4,nul\0", b"d.mp4",
             f"e.mp4,{long}".encode(), b"f.mp4," + b"y" * (tables.FIELD + 1), b'g.mp4,"a "quoted" word"', b"h.mp4,end",
             b"i.mp4,more", b"j.mp4,more", b"k.mp4,more"]  # fmt: skip
    (tmp_path / "t.csv").write_bytes(b"\n".join(lines))
    with pytest.warns(UserWarning, match="5 rows are left out: line 3 of .*t.csv holds bytes that are not UTF-8"):
        source = webvid(tmp_path / "t.csv", **NAMED)
    want = {"a.mp4": "one", "e.mp4": long, "h.mp4": "end", "i.mp4": "more", "j.mp4": "more", "k.mp4": "more"}
    assert captions_of(source) == want
    said = source.left_out.reasons
    for line, why in ((3, "not UTF-8"), (4, "NUL"), (5, "no column"), (7, "field larger"), (8, "expected after")):
        assert any(f"line {line} of" in reason and why in reason for reason in said), (line, said)
    assert source.left_out.count == len(said) == 5
    (tmp_path / "t.csv").write_bytes(b"\n".join(lines[:5]))
    with pytest.raises(ValueError, match="there is 1 rows for 3 left out: line 3 of .*t.csv"):
        webvid(tmp_path / "t.csv", **NAMED)
    with pytest.raises(ValueError, match="t.csv, line 3 holds bytes that are not UTF-8; save the file as UTF-8"):
        list(tables.csv_rows(tmp_path / "t.csv", tables.strict(tmp_path / "t.csv", "annotations")))


def test_a_quote_that_is_not_closed_does_not_swallow_the_file(tmp_path):
    (tmp_path / "t.csv").write_text('video,caption\na.mp4,one\nb.mp4,two\nc.mp4,three\nd.mp4,"four\ne.mp4,five\n')
    with pytest.warns(UserWarning, match=r"1 rows are left out: line 5 of .* cannot be read: .*\(up to line 6\)"):
        assert len(webvid(tmp_path / "t.csv", **NAMED)) == 3


def test_rows_to_train_on(tmp_path):
    good = {"video": "a.mp4", "prompt": "p", "answer": "b"}
    bad = [[1], {**good, "answer": None}, {**good, "start": "soon"}, {**good, "end": float("inf")},
           {**good, "video": 3}, {**good, "video": "../a.mp4"}]  # fmt: skip
    text = [json.dumps(row).encode() for row in [good] * 8 + bad] + [b'{"video": "a', b'{"video": "\xe9"}', b"\xff\xfe"]
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(text))
    with pytest.raises(ValueError, match="holds 8 rows that can be used, 9 that cannot"):
        rows(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(text + text[:1]))
    with pytest.warns(UserWarning, match=r"9 rows are left out: line 9 of .*t.jsonl must be an object, got list"):
        assert len(rows(tmp_path / "t.jsonl")) == 9
    (tmp_path / "t.txt").write_text("")
    with pytest.raises(ValueError, match="must be .jsonl or .csv"):
        rows(tmp_path / "t.txt")
    with pytest.raises(FileNotFoundError):
        rows(tmp_path / "no.csv")


def test_what_is_too_large_is_not_read(tmp_path):
    """A text of 20 GB that takes no room on the disk, where a caption, a JSON and a table belong."""

    def huge(name, start=b""):
        with open(tmp_path / name, "wb") as file:
            file.write(start)
            file.truncate(20 << 30)

    for name in "abc":
        (tmp_path / f"{name}.mp4").write_bytes(b"")
    (tmp_path / "a.txt").write_text("one")
    huge("b.txt")
    with pytest.warns(UserWarning, match="b.txt must have at most 1048576 bytes"):
        assert captions_of(folder(tmp_path)) == {"a.mp4": "one", "c.mp4": ""}
    huge("captions.json")
    with pytest.raises(ValueError, match="captions.json must be .* at most"):
        folder(tmp_path)
    huge("m.json")
    with pytest.raises(ValueError, match="at most"):
        parse("msvd", tmp_path / "m.json")


def test_a_line_without_an_end_is_skipped_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LINE", 1000)
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n' + "x" * 5000 + '\n{"a": 2}\n' + "y" * 3000)
    left = tables.LeftOut("t")
    assert [v for _, v in tables.json_objects(tmp_path / "t.jsonl", left)] == [{"a": 1}, {"a": 2}]
    assert left.count == 2 and "line 2 of t cannot be read: is longer than 1000" in left.reasons[0]


def test_json_that_is_nested_too_deep(tmp_path):
    (tmp_path / "m.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="m.json must be JSON: it is nested too deep"):
        parse("msvd", tmp_path / "m.json")


def test_a_bad_caption_costs_its_row_alone(tmp_path):
    video = b"v" * 10
    path = tar(tmp_path / "0.tar", [
        ("a.mp4", video), ("a.json", b'{"caption": null}'), ("b.mp4", video), ("b.json", b'{"caption": "two"}'),
        ("c.mp4", video), ("c.txt", b"caf\xe9"), ("d.mp4", video), ("d.json", b"{"), ("e.json", b"[1]"),
        ("e.mp4", video), ("f.txt", b"six"), ("f.mp4", video), ("g.json", b'{"caption": null}'), ("g.txt", b"seven"),
        ("g.mp4", video), ("h.mp4", video), ("h.txt", b"x" * (tables.FIELD + 1)), ("i.mp4", video), ("i.txt", b"9"),
        ("j.mp4", video), ("j.txt", b"10"), ("k.txt", b"\xef\xbb\xbfmark"), ("k.mp4", video),
    ])  # fmt: skip
    with pytest.warns(UserWarning, match="5 rows are left out: .*0.tar/a: its caption must be a text, got NoneType"):
        source = shards(str(path), tmp_path / "index")
    want = {"b": "two", "f": "six", "g": "seven", "i": "9", "j": "10", "k": "mark"}
    assert captions_of(source) == {f"0.tar/{key}": text for key, text in want.items()}
    with pytest.warns(UserWarning, match="5 rows are left out"):
        again = shards(str(path), tmp_path / "index")
    assert again.digest() == source.digest() and again.left_out.reasons == source.left_out.reasons


def test_shards_that_are_cut_or_damaged(tmp_path):
    members = [(f"{i}.{kind}", f"{kind} {i}".encode()) for i in range(4) for kind in ("mp4", "txt")]
    whole = tar(tmp_path / "0.tar", members).read_bytes()
    for cut in range(4 * 1024 + 100, 8 * 1024, 500):
        (tmp_path / "0.tar").write_bytes(whole[:cut])
        with pytest.warns(UserWarning, match="0.tar is not a plain .tar of videos and captions from . on"):
            found = captions_of(shards(str(tmp_path / "0.tar")))
        assert {"0.tar/0": "txt 0", "0.tar/1": "txt 1"}.items() <= found.items() and len(found) < 4 or cut > 7 * 1024
    damaged = bytearray(whole)
    damaged[4 * 1024 + 148 : 4 * 1024 + 156] = b"99999999"  # the checksum of the fifth header
    (tmp_path / "0.tar").write_bytes(damaged)
    with pytest.warns(UserWarning, match="a damaged header"):
        assert len(shards(str(tmp_path / "0.tar"))) == 2
    source_file = tar(tmp_path / "1.tar", members)
    source = shards(str(source_file))
    source_file.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="1.tar ends before the video 1.tar/3 does"), source.file(3):
        pass
    for content in (b"", b"no archive" * 100, b"\x1f\x8b" + whole):
        (tmp_path / "2.tar").write_bytes(content)
        with pytest.raises(ValueError, match="2.tar is not a plain .tar"):
            shards(str(tmp_path / "2.tar"))


def test_members_that_are_no_files(tmp_path):
    """Links, devices, names that lead elsewhere, and headers that claim any length: labels at most, and no file."""
    with tarfile.open(tmp_path / "0.tar", "w") as file:
        for name, kind in (("l.mp4", tarfile.SYMTYPE), ("h.mp4", tarfile.LNKTYPE), ("z.mp4", tarfile.CHRTYPE),
                           ("p.mp4", tarfile.FIFOTYPE)):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
        for name in ("/abs.mp4", "../../up.mp4", "/abs.txt", "../../up.txt", os.fsdecode(b"caf\xe9.mp4")):
            info = tarfile.TarInfo(name)
            info.size = 1
            file.addfile(info, io.BytesIO(b"x"))
    found = captions_of(shards(str(tmp_path / "0.tar")))
    assert found == {"0.tar/abs": "x", "0.tar/../../up": "x", os.fsdecode(b"0.tar/caf\xe9"): ""}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.tar"]
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 8 << 30
    with open(tmp_path / "1.tar", "wb") as file:
        file.write(info.tobuf())
        file.truncate(9 << 30)
    with pytest.raises(ValueError, match="1.tar is not a plain .tar"):
        shards(str(tmp_path / "1.tar"))


def test_an_index_is_made_again_where_it_is_damaged(tmp_path):
    path = tar(tmp_path / "0.tar", [("a.mp4", b"v"), ("a.txt", b"one"), ("b.mp4", b"w"), ("b.txt", b"two")])
    index = tmp_path / "index.pt"
    want = captions_of(shards(str(path), index))
    whole = index.read_bytes()
    for n in range(60):
        content = bytearray(whole[: max(24, len(whole) * n // 60)])
        if n % 2:
            content = bytearray(whole)
            content[24 + n * 7 % (len(whole) - 24)] ^= 1 << n % 8
        index.write_bytes(content)
        found = shards(str(path), index)
        assert len(found) == 2 and all(isinstance(text, str) for text in captions_of(found).values())
    index.write_bytes(whole[:-5])
    assert captions_of(shards(str(path), index)) == want and index.stat().st_size == len(whole)
    torch.save({"shards": [], "places": None}, index)  # as it was before
    assert captions_of(shards(str(path), index)) == want and index.stat().st_size == len(whole)
    index.write_text("my notes")
    with pytest.raises(ValueError, match="index .* must be a new file or an index"):
        shards(str(path), index)
    assert index.read_text() == "my notes"


@pytest.mark.parametrize("name", ["../x.mp4", "/etc/passwd", "a/../../x.mp4", "a/../b.mp4", "..", ""])
def test_names_stay_below_the_root(name, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "x.mp4").write_bytes(b"x")
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([("video", "caption"), (name, "one"), ("b.mp4", "two")])
    source = {"kind": "webvid", "table": str(tmp_path / "t.csv"), "root": str(tmp_path / "in"), **NAMED}
    with pytest.warns(UserWarning, match="not below the folder of the videos; outside=True allows that"):
        assert captions_of(captioned(source)) == {"b.mp4": "two"}
    assert captions_of(captioned({**source, "outside": True})) == {name: "one", "b.mp4": "two"}
    (tmp_path / "in/captions.json").write_text(json.dumps({name: "one", "b.mp4": "two"}))
    with pytest.warns(UserWarning, match="not below the folder"):
        assert captions_of(folder(tmp_path / "in")) == {"b.mp4": "two"}
    line = json.dumps({"video": name, "prompt": "p", "answer": "a"}) + "\n"
    (tmp_path / "t.jsonl").write_text(line)
    with pytest.raises(ValueError, match="not below the folder|must have video"):
        rows(tmp_path / "t.jsonl")
    if name:
        assert rows(tmp_path / "t.jsonl", outside=True)[0].video == name


def test_links_are_followed(tmp_path):
    """Data sets are often linked together; a name is judged as it is written."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/a.mp4").write_bytes(b"v")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/part").symlink_to(tmp_path / "disk")
    (tmp_path / "t.csv").write_text("video,caption\npart/a.mp4,one\n")
    with webvid(tmp_path / "t.csv", tmp_path / "root", **NAMED).file(0) as path:
        assert path.read_bytes() == b"v"


def test_names_of_any_bytes_in_a_folder(tmp_path):
    name = os.fsdecode(b"caf\xe9.mp4")
    (tmp_path / name).write_bytes(b"v")
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("one")
    source = folder(tmp_path)
    assert captions_of(source) == {name: "one"}
    with source.file(0) as path:
        assert path.read_bytes() == b"v"


SOUND = {
    "msrvtt_csv": "video_id,sentence\nv,a\n",
    "msrvtt_json": {"videos": [{"video_id": "v", "split": "test"}], "sentences": [{"video_id": "v", "caption": "a"}]},
    "bt_adapter": [{"video": "v", "caption": ["a"]}],
    "didemo": [{"video": "v", "description": "a"}],
    "activitynet": {"v": {"sentences": ["a"], "duration": 3}},
    "msvd": {"v": ["a", ["b", "c"]]},
    "ma_lmm_captions": {"1": {"video": "v", "caption": "a", "start_time": 1, "end_time": 2}},
    "ma_lmm_qa": {"1": {"question": "q", "answer": "a", "video": "v", "answer_type": 3}},
    "video_chatgpt": [{"video_name": "v", "Q": "q", "A": "a"}],
    "lvu": {"v": {"duration": 120, "genre": "a"}},
    "breakfast": {"P03_x": {"class_name": "a"}},
    "coin": {"v": {"subset": "testing", "target": 1, "num_frames_actual": 3}},
}
ODD = (None, 5, -1.5, float("nan"), float("inf"), [], {}, [None], {"a": 1}, "", "x", "a\0", "\udce9", True, 10**30)


@pytest.mark.parametrize("format", sorted(SOUND))
def test_values_of_another_kind_are_the_documented_error(format, tmp_path):
    """Every value of a sound file replaced by odd ones: samples, or a ValueError that names the file."""
    options = {"lvu": {"task": "genre"}, "msrvtt_json": {"split": "test"}}.get(format, {})
    path = tmp_path / ("a.csv" if isinstance(SOUND[format], str) else "a.json")
    text = SOUND[format] if isinstance(SOUND[format], str) else json.dumps(SOUND[format])
    path.write_text(text)
    assert parse(format, path, **options)
    texts = [text[:n] for n in range(len(text))] + [json.dumps(odd) for odd in ODD]
    if not isinstance(SOUND[format], str):
        texts += [json.dumps(value) for value in changed(SOUND[format])]
    for text in texts:
        path.write_text(text)
        try:
            assert parse(format, path, **options)
        except ValueError as error:
            assert "a.json" in str(error) or "a.csv" in str(error), error
    with pytest.raises(FileNotFoundError):
        parse(format, tmp_path / f"no{path.suffix}", **options)
    assert format in FORMATS


def changed(value):
    """The value with each part of it replaced by each of ODD."""
    yield from ODD
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        for part in changed(value[key]):
            copy = value.copy()
            copy[key] = part
            yield copy
