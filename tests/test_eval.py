"""Tasks as data, metrics on cases small enough to count by hand, files in and out."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pyvidx.cli.eval import main
from pyvidx.eval import anticipation, lvu, names, task
from pyvidx.eval.answers import exact_match
from pyvidx.eval.retrieval import ranks, retrieval
from pyvidx.preprocess import PRESETS
from pyvidx.video import sampling


@pytest.mark.parametrize("name", names())
def test_every_task_names_what_exists(name):
    t = task(name)
    assert t.preset in PRESETS and {t.train_sampler, t.eval_sampler} <= set(sampling.names())
    assert 1 <= t.min_tokens <= t.max_tokens and t.returned <= t.beams and t.memory < t.frames
    assert t.ask("who?" if "{question}" in t.prompt else None).count("{") == 0


def test_prompts_of_the_paper():
    assert task("lvu_way_speaking").ask() == "what is the way_speaking of the movie?"
    assert task("msvd_qa").ask("who runs?") == "Question: who runs? Short answer:"
    with pytest.raises(ValueError, match="takes a question"):
        task("msvd_qa").ask()
    with pytest.raises(ValueError, match="the name must be one of lvu_director"):
        task("lvu")


def test_scores_of_tasks():
    beams = {"a": ["tea", "pancake"], "b": ["coffee", "milk"]}
    answers = {"a": {"answer": "pancake"}, "b": {"answer": "coffee"}}
    assert task("breakfast").score(beams, answers) == {"top-1": 50.0, "top-5": 100.0}
    assert task("msvd_qa").score(
        {"a": "man running", "b": "dog"}, {"a": {"answer": "man"}, "b": {"answer": "cat"}}
    ) == {"top-1": 50.0}
    with pytest.raises(ValueError, match="predictions lack 1 samples"):
        task("coin").score({}, {"a": {"answer": "x"}})
    with pytest.raises(ValueError, match="it has no compat"):
        task("coin").score({"a": "x"}, {"a": {"answer": "x"}}, compat="official")
    with pytest.raises(ValueError, match="annotations must hold answer and answer_type"):
        task("activitynet_qa").score({"a": "x"}, {"a": {"answer": "x"}})
    for odd in ([], {"b": 1}, 5):
        with pytest.raises(ValueError, match="a prediction must be a text"):
            task("coin").score({"a": odd}, {"a": {"answer": "x"}})
    for odd in (5, {"answer": 5}):  # 5 would equal no text
        with pytest.raises(ValueError, match=r"annotations must hold answer, e.g. \['a'\]"):
            task("coin").score({"a": "5"}, {"a": odd})
    with pytest.raises(ValueError, match="an answer_type must be a whole number, got 'y'"):
        task("activitynet_qa").score({"a": "x"}, {"a": {"answer": "x", "answer_type": "y"}})
    with pytest.raises(ValueError, match="pycocoevalcap"):
        task("msvd_caption").score({}, {})
    with pytest.raises(ValueError, match="one prediction per answer, got 1 for 2"):
        exact_match(["a"], ["a", "b"])


def test_windows_and_errors_of_lvu():
    assert lvu.windows(150) == [(0, 99), (20, 119), (40, 139)]
    assert lvu.windows(30) == [(0, 99)]
    predictions = torch.tensor([1.0, 3.0, 5.0])
    texts, videos = ["drama", "comedy", "comedy", "b", "a"], ["x", "x", "x", "y", "y"]
    assert lvu.vote_texts(texts, videos, ["comedy"] * 3 + ["a"] * 2) == 50.0, "of a tie the first window's text"
    with pytest.raises(ValueError, match="share an answer"):
        lvu.vote_texts(texts, videos, ["comedy"] * 3 + ["a", "b"])
    assert lvu.regression_error(predictions, ["a", "a", "b"], [1.0, 1.0, 5.0]) == pytest.approx(0.5)


def test_ties_neither_help_nor_hurt():
    same = torch.ones(3, 3)
    target = torch.arange(3)
    assert ranks(same, target).tolist() == [1, 1, 1]
    assert ranks(same, target, ties="optimistic").tolist() == [0, 0, 0]
    assert ranks(same, target, ties="pessimistic").tolist() == [2, 2, 2]
    found = retrieval(torch.eye(4), dsl=True)
    assert found["text to video (DSL)"]["R@1"] == 100.0
    with pytest.raises(ValueError, match="captions must count"):
        retrieval(torch.ones(3, 2), [1, 1])
    with pytest.raises(ValueError, match="must be finite"):
        retrieval(torch.full((3, 3), torch.nan))
    with pytest.raises(ValueError, match="takes no ties"):
        retrieval(torch.eye(3), ties="pessimistic", compat="clip4clip")


def test_dual_softmax_comes_before_both_directions():
    s = torch.rand(4, 4, dtype=torch.float64)
    weighted = s * (100 * s).exp() / (100 * s).exp().sum(0, keepdim=True)  # over the texts
    found, want = retrieval(s, dsl=True), retrieval(weighted)
    # exp(-190) and exp(-200) are no numbers of float32: text 0 is farther from its own video than from the other.
    far = retrieval(torch.tensor([[-0.9, -1.0], [1.0, 1.0]]), dsl=True)
    assert far["text to video (DSL)"]["R@1"] == 50.0 and far["text to video (DSL)"]["MnR"] == 1.75
    assert list(found.values()) == list(want.values()) and set(found) == {f"{name} (DSL)" for name in want}


def test_many_captions():
    # Texts 0 and 1 are of video 0, text 2 of video 1. Text 1 is nearer to video 1.
    s = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.1, 0.8]])
    found = retrieval(s, [2, 1])
    assert found["text to video"]["R@1"] == pytest.approx(200 / 3)
    assert found["text to video"]["MnR"] == pytest.approx(4 / 3)
    assert found["video to text"]["R@1"] == 100.0, "a video's nearest caption counts"
    # Video 1 is nearest to a caption of video 0, whichever of the two.
    assert retrieval(torch.tensor([[0.9, 0.1], [0.2, 0.9], [0.1, 0.8]]), [2, 1])["video to text"]["R@1"] == 50.0


def test_submission(tmp_path):
    n = 3
    verb, noun = torch.randn(n, anticipation.VERBS), torch.randn(n, anticipation.NOUNS)
    ids = [f"P01_{i}" for i in range(n)]
    levels = {"sls_pt": 1, "sls_tl": 3, "sls_td": 3}
    path = anticipation.write_submission(tmp_path / "test.json", ids, verb, noun, supervision=levels)
    submission = json.loads(path.read_text())
    anticipation.check_submission(submission, ids)
    best = max(submission["results"]["P01_1"]["action"].items(), key=lambda item: item[1])[0]
    assert best == f"{int(verb[1].argmax())},{int(noun[1].argmax())}"
    with pytest.raises(ValueError, match="results must be of 2 segments, got 3"):
        anticipation.check_submission(submission, ids[:2])
    with pytest.raises(ValueError, match="ids must be unique"):
        anticipation.write_submission(path, ["a"] * n, verb, noun, supervision=levels)
    submission["results"]["P01_0"]["verb"]["97"] = submission["results"]["P01_0"]["verb"].pop("0")
    with pytest.raises(ValueError, match="P01_0 must name classes 0 to 96"):
        anticipation.check_submission(submission, ids)
    submission = json.loads(path.read_text())
    del submission["results"]["P01_1"]["verb"]["0"]
    with pytest.raises(ValueError, match="P01_1 must have 97 verbs"):
        anticipation.check_submission(submission, ids)


def test_segments_and_class_means(tmp_path):
    path = tmp_path / "validation.csv"
    path.write_text("narration_id,participant_id,verb_class,noun_class\na,P01,0,5\nb,P02,0,5\nc,P02,3,7\n")
    segments = anticipation.read_segments(path)
    assert segments.participants == ["P01", "P02", "P02"] and segments.verb.tolist() == [0, 0, 3]
    top = torch.tensor([[0, 1], [1, 2], [3, 4]])  # class 0: one of two, class 3: one of one
    assert anticipation.class_mean_recall(top, segments.verb) == 0.75
    path.write_text("narration_id,verb_class\na,0\n")
    with pytest.raises(ValueError, match="must have rows with noun_class, participant_id"):
        anticipation.read_segments(path)


def test_command(tmp_path, capsys):
    for name, value in (("p", {"a": ["tea"], "b": "milk"}), ("a", {"a": {"answer": "tea"}, "b": {"answer": "tea"}})):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    arguments = ["--predictions", str(tmp_path / "p.json"), "--annotations", str(tmp_path / "a.json")]
    assert main(["answers", "--task", "breakfast", *arguments, "--out", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["breakfast"] == {"top-1": 50.0}
    assert "50.00" in capsys.readouterr().out
    text = torch.randn(6, 8)
    save_file({"text": text, "video": text + 0.01}, tmp_path / "e.safetensors")
    assert main(["retrieval", str(tmp_path / "e.safetensors")]) == 0
    assert capsys.readouterr().out.count("100.00") >= 2
    with pytest.raises(SystemExit):
        main(["retrieval", str(tmp_path / "none.safetensors")])


def test_answers_of_annotation_files(tmp_path, capsys):
    def put(name, value):
        (tmp_path / name).write_text(json.dumps(value))
        return str(tmp_path / name)

    windows = put("lvu.json", {"a": {"duration": 145, "genre": "drama"}, "b": {"duration": 9, "genre": "comedy"}})
    said = put("p.json", {"a_0": "comedy", "a_20": ["drama", "x"], "a_40": "drama", "b_0": "drama"})
    command = ["answers", "--task", "lvu_genre", "--format", "lvu", "--annotations", windows, "--predictions", said]
    out = tmp_path / "out.json"
    assert main([*command, "--json", str(out), "--plot", str(tmp_path / "plot.png")]) == 0
    result = json.loads(out.read_text())
    assert result["lvu_genre, every window"]["top-1"] == 50.0 and result["about"]["labels"] == 2
    assert result["lvu_genre, vote of each video"] == {"top-1": 50.0}
    row = {"answer": "no", "answer_type": 3, "question": "is it", "video": "a"}
    asked = put("q.json", [{"question_id": f"{v}_1", "question": "is it", "video_name": v} for v in "ab"])
    told = put("t.json", [{"question_id": f"{v}_1", "answer": "no", "type": 3} for v in "ab"])
    command = ["answers", "--task", "activitynet_qa", "--format", "ma_lmm_qa", "--annotations",
               put("qa.json", {"a_1": row}), "--predictions", put("q1.json", {"a_1": "no"})]  # fmt: skip
    capsys.readouterr()
    assert main([*command, "--reference", asked, told]) == 0
    text = capsys.readouterr().out
    assert "questions missing from the annotations: 1: b_1" in text and "videos of those: 1" in text
    assert main(["rows", "--task", "lvu_genre", "--format", "lvu", "--annotations", windows, "--option", "stride=50",
                 "--suffix", ".mp4", "--out", str(tmp_path / "rows.jsonl")]) == 0  # fmt: skip
    first = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    assert first == {"video": "a.mp4", "prompt": "what is the genre of the movie?", "answer": "drama", "start": 0,
                     "end": 99.1}  # fmt: skip
    with pytest.raises(SystemExit):
        main([*command, "--option", "odd"])
    assert "must be NAME=VALUE" in capsys.readouterr().err


def test_lvu_by_clips(tmp_path, capsys):
    (tmp_path / "genre.csv").write_text("0 a0 x\n1 b0 x\n")
    scores = torch.tensor([[2.0, 1.0], [0.0, 1.5], [0.0, 1.0]])
    save_file({"video": torch.tensor([0, 0, 1]), "scores": scores}, tmp_path / "s.safetensors")
    command = ["lvu", "--scores", str(tmp_path / "s.safetensors"), "--task"]
    out = tmp_path / "out.json"
    assert main([*command, "genre", "--annotations", str(tmp_path / "genre.csv"), "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["each video"]["top-1"] == 50.0 and result["every clip"]["top-1"] == pytest.approx(200 / 3)
    (tmp_path / "views.csv").write_text("100000 a0 x\n")
    command += ["view_count", "--annotations", str(tmp_path / "views.csv")]
    views = scores[:, 0].contiguous()
    save_file({"video": torch.zeros(3, dtype=torch.long), "scores": views}, tmp_path / "s.safetensors")
    assert main(command) == 0
    assert f"{(2 / 3 - lvu.view_label(100000)) ** 2:.2f}" in capsys.readouterr().out
    save_file({"video": torch.tensor([0, 0, 1]), "scores": views}, tmp_path / "s.safetensors")
    with pytest.raises(SystemExit):
        main(command)
    assert "must hold clips of all 1 videos, got 2" in capsys.readouterr().err
