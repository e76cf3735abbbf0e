"""Questions to videos: MSVD-QA, MSRVTT-QA, ActivityNet-QA, and Video-ChatGPT's conversations."""

from collections.abc import Iterable
from pathlib import Path

from pyvidx.eval.annotations.sample import Sample, checked, entries, items, texts


def ma_lmm_qa(path: str | Path) -> list[Sample]:
    """MA-LMM's questions: {id: {"question", "answer", "video", "answer_type"}}."""
    kept = ("answer_type", "frame_length")
    made = (
        Sample(key, str(row["video"]), question=row["question"], answer=str(row["answer"]),
               extra={name: row[name] for name in kept if name in row})
        for _, key, row in entries(path, ("question", "answer", "video"))
    )  # fmt: skip
    return checked(made, path)


def official_qa(questions: str | Path, answers: str | Path) -> list[Sample]:
    """The two lists of ActivityNet-QA, test_q and test_a, joined by question_id; Video-ChatGPT writes the other two
    data sets so too.

    Raises:
        ValueError: a question without an answer, or an answer without a question.
    """
    replies = {str(row["question_id"]): row for _, row in items(answers, ("question_id", "answer"))}
    made = []
    for where, row in items(questions, ("question_id", "question", "video_name")):
        reply = replies.pop(str(row["question_id"]), None)
        if reply is None:
            raise ValueError(f"annotations: {where} must have an answer in {answers}, got {row['question_id']!r}")
        extra = {"answer_type": reply["type"]} if "type" in reply else {}
        made.append(
            Sample(str(row["question_id"]), str(row["video_name"]), row["question"], str(reply["answer"]), extra=extra)
        )
    if replies:
        raise ValueError(f"annotations: {answers} must only answer {questions}, got also {sorted(replies)[:3]}")
    return checked(made, questions)


def video_chatgpt(path: str | Path) -> list[Sample]:
    """Video-ChatGPT's generic, temporal ("Q", "A") and consistency ("Q1", "Q2", "A") questions.

    Videos recur, so ids are numbered: VIDEO_0, VIDEO_1, as in the public evaluation. The second question of a
    consistency row is extra["Q2"].
    """
    made = []
    rows = list(items(path, ("video_name", "A")))
    for key, (where, row) in zip(numbered(row["video_name"] for _, row in rows), rows):
        question = texts(row.get("Q", row.get("Q1")), f"{where}, Q or Q1")[0]
        second = {"Q2": texts(row["Q2"], f"{where}, Q2")[0]} if "Q2" in row else {}
        if ("Q1" in row) != bool(second):
            raise ValueError(f"annotations: {where} must have Q, or Q1 and Q2")
        made.append(Sample(key, row["video_name"], question, str(row["A"]), extra=second))
    return checked(made, path)


def numbered(videos: Iterable[str]) -> list[str]:
    """VIDEO_0 for the first of each video, VIDEO_1 for the second."""
    count: dict[str, int] = {}
    keys = []
    for video in videos:
        count[video] = count.get(video, -1) + 1
        keys.append(f"{video}_{count[video]}")
    return keys
