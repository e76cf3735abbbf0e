"""Readers of annotation files, on files of a few rows written here."""

import json

import pytest

from pyvidx.eval import task
from pyvidx.eval.annotations import FORMATS, absent, labels, parse, truth, write_rows
from pyvidx.train.data import rows


@pytest.fixture
def put(tmp_path):
    """Writes a file, JSON unless it is text, and gives its path."""

    def write(name, value):
        path = tmp_path / name
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return write


def test_msrvtt(put):
    pairs = put("test.csv", 'key,vid_key,video_id,sentence\nr0,m1,video1,"a dog, running"\nr1,m2,video2,a cat\n')
    found = parse("msrvtt_csv", pairs)
    assert [(s.video, s.captions) for s in found] == [("video1", ("a dog, running",)), ("video2", ("a cat",))]
    data = {
        "videos": [{"video_id": f"video{i}", "split": "train" if i else "test"} for i in range(3)],
        "sentences": [{"video_id": f"video{i % 3}", "caption": f"c{i}", "sen_id": i} for i in range(5)],
    }
    data = put("MSRVTT_data.json", data)
    assert [s.captions for s in parse("msrvtt_json", data, split="train")] == [("c1", "c4"), ("c2",)]
    assert [s.video for s in parse("msrvtt_json", data, videos=put("nine.csv", "video_id\nvideo2\n"))] == ["video2"]
    with pytest.raises(ValueError, match=r"sentences of 1 more videos, e.g. \['video9'\]"):
        parse("msrvtt_json", data, videos=put("nine.csv", "video_id\nvideo9\n"))
    with pytest.raises(ValueError, match="bad.csv, line 2 must have sentence"):
        parse("msrvtt_csv", put("bad.csv", "video_id,caption\nvideo1,a\n"))


def test_paragraphs(put):
    moments = [{"video": "a.avi", "description": "he sits", "times": [[0, 0]]}, {"video": "b.mov", "description": "x"},
               {"video": "a.avi", "description": "he stands "}]  # fmt: skip
    a, b = parse("didemo", put("didemo.json", moments))
    assert a.captions == ("he sits he stands",) and (a.start, a.end) == (0.0, 30.0) and b.video == "b.mov"
    value = {"v_1": {"duration": 9.5, "timestamps": [[0, 1], [2, 3]], "sentences": ["One.", " Two. "]}}
    (a,) = parse("activitynet", put("val_1.json", value))
    assert a.captions == ("One. Two.",) and a.extra == {"duration": 9.5} and a.end is None
    listed = put("bt.json", [{"video": "v_1.mp4", "caption": ["One.", "Two."]}])
    assert parse("bt_adapter", listed, paragraph=True)[0].captions == ("One. Two.",)
    assert parse("bt_adapter", put("j.json", {"video1.mp4": ["a", "b"]}))[0].captions == ("a", "b")
    with pytest.raises(ValueError, match="didemo.json, row 1 must have description"):
        parse("didemo", put("didemo.json", [{"video": "a"}]))
    with pytest.raises(ValueError, match="entry 'v' must hold a text"):
        parse("activitynet", put("val_1.json", {"v": {"sentences": []}}))


def test_lsmdc_and_msvd(put):
    line = '1004_Juno_00.00.32-00.00.37\t00:00:32\t00:00:37\t00:00:32\t00:00:37\tShe says "no.\n'
    (a,) = parse("lsmdc", put("lsmdc.tsv", line))
    assert a.video == "1004_Juno_00.00.32-00.00.37" and a.captions == ('She says "no.',) and a.start is None
    with pytest.raises(ValueError, match="line 2 must have 6 tab-separated columns, got 1"):
        parse("lsmdc", put("lsmdc.tsv", line + "x\n"))
    text = put("all.txt", "# comment\nv_1_5 a squirrel eats\nv_1_5 an animal\nw_0_3 a car\n")
    assert [s.captions for s in parse("msvd", text)] == [("a squirrel eats", "an animal"), ("a car",)]
    assert [s.video for s in parse("msvd", text, videos=put("test.txt", "w_0_3\n"))] == ["w_0_3"]
    assert parse("msvd", put("raw.json", {"v": [["a", "man"], ["a", "boy"]]}))[0].captions == ("a man", "a boy")
    with pytest.raises(ValueError, match="a pickle"):
        parse("msvd", put("raw.pkl", ""))


def test_questions_and_those_that_are_missing(put):
    row = {"answer": "no", "answer_type": 3, "question": "is it", "question_id": "v_a_1", "video": "a"}
    ours = parse("ma_lmm_qa", put("qa.json", {"v_a_1": row}))
    assert truth(ours) == {"v_a_1": {"answer": "no", "answer_type": 3}}
    asked = [{"question_id": f"v_{v}_1", "question": "is it", "video_name": v} for v in "ab"]
    told = [{"question_id": f"v_{v}_1", "answer": "no", "type": 3} for v in "ba"]
    full = parse("official_qa", [put("test_q.json", asked), put("test_a.json", told)])
    assert [(s.id, s.video, s.extra["answer_type"]) for s in full] == [("v_a_1", "a", 3), ("v_b_1", "b", 3)]
    assert [s.id for s in absent(ours, full)] == ["v_b_1"]
    with pytest.raises(ValueError, match="shares no id"):
        absent(parse("ma_lmm_qa", put("qa.json", {"7": row})), full)
    with pytest.raises(ValueError, match="test_q.json, row 2 must have an answer"):
        parse("official_qa", [put("test_q.json", asked), put("test_a.json", told[1:])])
    with pytest.raises(ValueError, match=r"must only answer .*'v_b_1'"):
        parse("official_qa", [put("test_q.json", asked[:1]), put("test_a.json", told)])


def test_conversations(put):
    generic = [{"video_name": v, "Q": f"q{i}", "A": "a"} for i, v in enumerate("xyx")]
    assert [s.id for s in parse("video_chatgpt", put("generic.json", generic))] == ["x_0", "y_0", "x_1"]
    (s,) = parse("video_chatgpt", put("c.json", [{"video_name": "x", "Q1": "one", "Q2": "two", "A": "a"}]))
    assert s.question == "one" and s.extra == {"Q2": "two"}
    with pytest.raises(ValueError, match="c.json, row 1 must have Q, or Q1 and Q2"):
        parse("video_chatgpt", put("c.json", [{"video_name": "x", "Q1": "one", "A": "a"}]))


def test_lvu(put):
    value = {
        "a": {"subset": "test", "duration": 125, "genre": "comedy", "genre_answer": "(a)"},
        "b": {"subset": "test", "duration": 40, "genre": "drama"},
        "c": {"subset": "test", "duration": 99, "year": "1990s"},
    }
    found = parse("lvu", put("test.json", value), task="genre")
    assert [(s.id, s.start, s.end, s.answer) for s in found] == [
        ("a_0", 0, 99.1, "comedy"), ("a_20", 20, 119.1, "comedy"), ("b_0", 0, 99.1, "drama")]  # fmt: skip
    assert labels(found) == ["comedy", "drama"]
    with pytest.raises(ValueError, match=r"the options .*'task'.* always"):
        parse("lvu", put("test.json", value))
    (s,) = parse("lvu_official", put("g.csv", "3 comedy a0 path/a0\n"), task="genre")
    assert (s.video, s.answer, s.extra["label"]) == ("a0", "3", 3)
    (s,) = parse("lvu_official", put("l.csv", "900 100 a0 path\n"), task="like_ratio")
    assert s.extra["target"] == pytest.approx(9 - 9.138220535629456)
    with pytest.raises(ValueError, match="l.csv, line 1 must have counts above 0"):
        parse("lvu_official", put("l.csv", "0 0 a0 path\n"), task="like_ratio")
    with pytest.raises(ValueError, match="g.csv, line 1 must have a number as label, got 'label'"):
        parse("lvu_official", put("g.csv", "label name video path\n"), task="genre")


def test_breakfast_and_coin(put):
    names = ("P03-cam01-P03_tea", "P28-cam01-P28_cereals", "P47-cam01-P47_milk")
    path = put("b.json", {name: {"class_name": name.split("_")[1], "frame_length": 9} for name in names})
    assert [s.answer for s in parse("breakfast", path)] == ["tea", "milk"], "one is named as broken"
    assert [s.answer for s in parse("breakfast", path, split="test")] == ["milk"]
    assert len(parse("breakfast", path, split="train", keep_broken=True)) == 2
    rows = {
        "AfiVmAjfTNs": {"subset": "testing", "target": "t", "num_frames_actual": 3},
        "x": {"subset": "testing", "target": "make tea", "num_frames_actual": 3},
        "y": {"subset": "testing", "target": "make tea"},
        "z": {"subset": "training", "target": "make tea", "num_frames_actual": 3},
    }
    assert [s.id for s in parse("coin", put("COIN.json", rows))] == ["x"]
    assert [s.id for s in parse("coin", put("COIN.json", {"database": rows}), keep_broken=True)] == [
        "AfiVmAjfTNs", "x", "y"]  # fmt: skip
    with pytest.raises(ValueError, match="must hold at least one sample"):
        parse("coin", put("COIN.json", rows), subset="validation")


def test_epic_kitchens(put):
    head = "narration_id,participant_id,video_id,start_timestamp,verb,noun,verb_class,noun_class\n"
    text = head + "P01_11_0,P01,P01_11,00:01:02.50,take,plate,0,2\nP01_11_1,P01,P01_11,00:00:00.40,put,pan,1,5\n"
    a, b = parse("epic_kitchens", put("val.csv", text))
    assert (a.start, a.end, a.answer) == (51.5, 61.5, "take plate") and a.extra["noun_class"] == 2
    assert (b.start, b.end) == (0.0, 0.1), "nothing is seen a second before it"
    (a,) = parse(
        "epic_kitchens", put("test.csv", "narration_id,participant_id,video_id,start_timestamp\ni,P,v,0:0:9\n")
    )
    assert a.answer is None and a.end == 8.0
    with pytest.raises(ValueError, match="val.csv, line 2 must have times"):
        parse("epic_kitchens", put("val.csv", text.replace("00:01:02.50", "soon")))


def test_lists_captions_and_rows_for_training(put, tmp_path):
    listed = put("list.txt", "some dir/a.mp4 1\nb.mp4 0\n")
    found = parse("video_list", listed, classes=put("names.txt", "run\njump\n"))
    assert [(s.video, s.answer) for s in found] == [("some dir/a.mp4", "jump"), ("b.mp4", "run")]
    with pytest.raises(ValueError, match="list.txt, line 1 must name a class of the 1, got 1"):
        parse("video_list", listed, classes=put("names.txt", "run\n"))
    value = {"s": {"video": "v", "caption": "stir", "start_time": 47, "end_time": 60, "id": 0}}
    captions = parse("ma_lmm_captions", put("cap.json", value))
    path = write_rows(tmp_path / "rows.jsonl", captions, task("youcook2_caption").ask, suffix=".mp4")
    (row,) = rows(path)
    assert (row.video, row.prompt, row.answer) == ("v.mp4", "what does the video describe?", "stir")
    assert (row.start, row.end) == (47.0, 60.0)


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_names_a_file_that_it_cannot_read(name, put):
    path = put("odd.json", '{"x": 1}')
    options = {"task": "genre"} if name.startswith("lvu") else {}
    files = [path, path] if name == "official_qa" else path
    with pytest.raises(ValueError, match="annotations: .*odd.json"):
        parse(name, files, **options)
    with pytest.raises(ValueError, match="takes . file"):
        parse(name, files, colour=1, **options)
