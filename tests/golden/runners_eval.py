"""Metrics of the benchmarks against the public scorers."""

import pytest
import torch

from pyvidx.eval import anticipation, lvu
from pyvidx.eval.answers import by_type, correct, exact_match
from pyvidx.eval.judge import judged
from pyvidx.eval.retrieval import retrieval
from tests.golden.vectors import runner


@runner("metric_ek100", runs=lambda file: [""])
def ek100(file, run, variant, check):
    x = file.part("in.")
    n = len(x["verb"])
    people = [str(p) for p in x["participant"].tolist()]
    segments = anticipation.Segments([str(i) for i in range(n)], people, x["verb_class"], x["noun_class"])
    found = anticipation.evaluate(
        x["verb"], x["noun"], segments, unseen=[str(p) for p in x["unseen_participants"].tolist()],
        tail_verbs=x["tail_verbs"].tolist(), tail_nouns=x["tail_nouns"].tolist(),
    )  # fmt: skip
    rows = [found[name] for name in ("verb", "noun", "action")]
    check("out.acc_top1_top5", torch.tensor([[r["accuracy@1"], r["accuracy@5"]] for r in rows]) / 100)
    for name, key in (("overall", "recall@5"), ("unseen", "recall@5 unseen"), ("tail", "recall@5 tail")):
        check(f"out.mt5r_{name}", torch.tensor([r[key] for r in rows]) / 100)
    check.equal("out.action_rank_top5", anticipation.actions(x["verb"], x["noun"])[0][:, :5])


@runner("metric_retrieval", runs=lambda file: [""], may_lack=("out.ranks0", "out.c4c_ties_nrows"))
def retrieved(file, run, variant, check):
    x = file.part("in.")

    def rows(*args, **options):
        return (torch.tensor(list(row.values())) for row in retrieval(*args, **options).values())

    for ties in ("average", "optimistic", "pessimistic"):
        text, video = rows(x["sim"], ties=ties)
        check("out.c4c", text)
        check("out.c4c_v2t", video)
        check("out.frozen_v2t", video)
    check("out.c4c_ties", next(rows(x["sim_ties"], compat="clip4clip")))
    check("out.frozen_ties", next(rows(x["sim_ties"], ties="optimistic")))
    text, video = rows(x["sim_multi"], x["caps_per_video"].tolist())
    check("out.multi_t2v", text)
    check("out.multi_v2t", video)


@runner("metric_text", runs=lambda file: [""])
def text(file, run, variant, check):
    case = file.meta["activitynet_qa"]
    predicted = {row["question_id"]: row["answer"] for row in case["pred"]}
    asked = [predicted[row["question_id"]] for row in case["gt"]]
    given = (asked, [row["answer"] for row in case["gt"]], [row["type"] for row in case["gt"]])
    found = by_type(*given)
    assert found["all"] == pytest.approx(case["all"]) and found["free"] == pytest.approx(case["free_by_definition"])
    assert by_type(*given, compat="official")["free"] == pytest.approx(case["free_official"])
    assert all(found[f"type {t}"] == pytest.approx(value) for t, value in case["per_type"].items())

    case = file.meta["malmm_cls_exact"]
    for k in (1, 2):
        assert exact_match(case["beams"], case["label"], top=k) == pytest.approx(case[f"top{k}"])
    case = file.meta["malmm_qa_first_word"]
    assert exact_match(case["pred"], case["gt"], first_word=True) == pytest.approx(case["top1_msvd_msrvtt"])
    assert exact_match(case["pred"], case["gt"]) == pytest.approx(case["top1_other"])

    case = file.meta["lvu_cls"]
    logits = torch.tensor([row["logits"] for row in case["clips"]])
    videos, labels = ([row[key] for row in case["clips"]] for key in ("video", "label"))
    assert lvu.vote(logits, videos, labels) == pytest.approx(case["video_acc"])
    per_clip = correct([str(k) for k in logits.argmax(1).tolist()], [str(k) for k in labels])
    assert 100 * sum(per_clip) / len(per_clip) == pytest.approx(case["clip_acc"])
    views, likes = file.meta["lvu_reg"]["view_count"], file.meta["lvu_reg"]["like_ratio"]
    assert lvu.view_label(views["raw"]) == pytest.approx(views["label"])
    assert lvu.like_label(likes["like"], likes["dislike"]) == pytest.approx(likes["label"])

    case = file.meta["video_chatgpt"]
    for replies in (case["judge"], [str(reply) for reply in case["judge"]]):
        found = judged(replies, compat="video_chatgpt")
        assert found["accuracy"] == pytest.approx(case["accuracy"]) and found["score"] == pytest.approx(case["score"])
