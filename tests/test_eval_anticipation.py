"""EPIC-Kitchens-100 from ranked texts: what they name, the numbers, and the submission."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pyvidx.cli.eval import main
from pyvidx.eval import anticipation, task
from pyvidx.eval.anticipated_texts import named, rank_texts, read_classes, read_ids, scores

VERBS = (
    "id,key,instances,category\n0,take,\"['take', 'pick-up', 'pick']\",x\n1,put-down,['put-down'],x\n2,put,['put'],x\n"
)
NOUNS = "id,key,instances,category\n0,tap,\"['tap', 'tap:kitchen']\",x\n1,plate,['plate'],x\n5,pan,['pan'],x\n"
SEGMENTS = "narration_id,participant_id,video_id,start_timestamp,verb,noun,verb_class,noun_class\n"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "verbs.csv").write_text(VERBS)
    (tmp_path / "nouns.csv").write_text(NOUNS)
    rows = "a,P01,v,00:00:09,take,plate,0,1\nb,P02,v,00:00:19,put,pan,2,5\n"
    (tmp_path / "val.csv").write_text(SEGMENTS + rows)
    (tmp_path / "said.json").write_text(
        json.dumps({"a": ["put pan", "Take the plate."], "b": ["sleep", "put down pan"]})
    )
    return tmp_path


def test_what_a_text_names(files):
    verbs, nouns = read_classes(files / "verbs.csv"), read_classes(files / "nouns.csv")
    for text, want in (
        ("take plate", (0, 1)), ("pick up the kitchen tap", (0, 0)), ("put down pan", (1, 5)), ("put pan", (2, 5)),
        ("Take a spaceship", (0, -1)), ("plate", (-1, -1)), ("", (-1, -1)),
    ):  # fmt: skip
        assert named(text, verbs, nouns) == want, text
    ranked = rank_texts([["put pan", "put pan", "sleep", "put plate", "take pan"], []], verbs, nouns)
    assert ranked.verb.tolist() == [[2, 0, -1, -1, -1], [-1] * 5]
    assert ranked.action.tolist()[0] == [2005, 2001, 5, -1, -1]
    (files / "verbs.csv").write_text("id,name\n0,take\n")
    with pytest.raises(ValueError, match="must have the columns id and key"):
        read_classes(files / "verbs.csv")


def test_nothing_that_is_not_named_is_found(files):
    """Five places, of which one is taken: the empty ones match no class, not even class 0."""
    ranked = anticipation.Ranked(*(torch.tensor([[3, -1, -1, -1, -1]] * 2),) * 3)
    segments = anticipation.read_segments(files / "val.csv")
    assert all(row["accuracy@5"] == 0 for row in anticipation.evaluate_ranked(ranked, segments).values())
    with pytest.raises(ValueError, match=r"must be \[2, 5\]"):
        anticipation.evaluate_ranked(anticipation.Ranked(*(x[:1] for x in ranked)), segments)


def test_scores_keep_the_order(files):
    verbs, nouns = read_classes(files / "verbs.csv"), read_classes(files / "nouns.csv")
    ranked = rank_texts([["put pan", "take plate"], ["sleep"]], verbs, nouns)
    verb, noun, (ids, values) = scores(ranked)
    assert verb[0].topk(2)[1].tolist() == [2, 0] and noun[0, 5] == 1.0 and not verb[1].any()
    assert ids[0, :2].tolist() == [2005, 1] and len(set(ids[0].tolist())) == 100
    assert (values.diff(dim=1) <= 0).all()


def test_command(files, capsys):
    (files / "tail.csv").write_text("verb\n2\n")
    (files / "unseen.csv").write_text("participant_id\nP02\n")
    out, submission = files / "out.json", files / "new/test.json"
    command = ["anticipation", "--segments", str(files / "val.csv"), "--verbs", str(files / "verbs.csv"), "--nouns",
               str(files / "nouns.csv"), "--overwrite", "--json", str(out)]  # fmt: skip
    said = ["--predictions", str(files / "said.json")]
    lists = ["--tail-verbs", str(files / "tail.csv"), "--unseen", str(files / "unseen.csv")]
    assert main([*command, *said, *lists, "--submission", str(submission), "--levels", "1", "3", "3"]) == 0
    result = json.loads(out.read_text())
    # a: "take plate" is second. b: "put down" is another verb than "put", its noun is right.
    assert result["action"]["accuracy@5"] == 50.0 and result["action"]["accuracy@1"] == 0.0
    assert result["verb"]["recall@5 tail"] == 0.0 and result["noun"]["recall@5 unseen"] == 100.0
    assert "chosen by pyvidx" in capsys.readouterr().out
    anticipation.check_submission(json.loads(submission.read_text()), ["a", "b"])
    with pytest.raises(SystemExit):
        main([*command, *said, "--submission", str(submission)])
    assert "needs --levels" in capsys.readouterr().err
    save_file({"verb": torch.eye(97)[[0, 2]], "noun": torch.eye(300)[[1, 5]]}, files / "s.safetensors")
    assert main([*command, "--scores", str(files / "s.safetensors")]) == 0
    assert json.loads(out.read_text())["action"]["accuracy@1"] == 100.0


def test_lists_and_what_is_ours(files):
    (files / "ids.csv").write_text("3\n7\n")
    assert read_ids(files / "ids.csv", "verb") == ["3", "7"]
    (files / "ids.csv").write_text("index,noun\n0,4\n")
    assert read_ids(files / "ids.csv", "noun") == ["4"]
    with pytest.raises(ValueError, match="must have the column verb"):
        read_ids(files / "ids.csv", "verb")
    ours = task("ek100_anticipation")
    assert {"prompt", "frames", "memory", "beams"} <= set(ours.ours) and not task("coin").ours
    with pytest.raises(ValueError, match="which is the work of pyvidx eval anticipation"):
        ours.score({}, {})
