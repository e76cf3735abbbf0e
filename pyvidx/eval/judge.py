"""Answers in words graded by a judge: question answering and the five aspects of a conversation (Video-ChatGPT).

The judge is a function from a Request to its reply, so any model, a service or a recording can be it. The text of the
prompts is the user's file: the published ones are part of the published evaluation, and numbers only compare under
the same prompt and the same judge.
"""

import ast
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pyvidx.eval.annotations.questions import numbered
from pyvidx.eval.annotations.sample import items, load, need, texts
from pyvidx.eval.files import digest, json_lines, open_to_append

# The questions each aspect is asked about. correctness, detail and context share one set.
ASPECTS = {
    "correctness": "generic",
    "detail": "generic",
    "context": "generic",
    "temporal": "temporal",
    "consistency": "consistency",
}
COMPAT = (None, "video_chatgpt")


class Item(NamedTuple):
    """What is graded: fields are question, answer and pred, or question1, question2, answer, pred1 and pred2."""

    id: str
    fields: dict[str, str]


class Request(NamedTuple):
    """messages: of a chat, each with role and content."""

    id: str
    messages: list[dict[str, str]]


Judge = Callable[[Request], str]


def predictions(path: str | Path) -> list[Item]:
    """A JSON list of answered questions.

    Rows are {"video_name", "Q", "A", "pred"}, or with Q1, Q2, pred1, pred2 for consistency, or {"id", "question",
    "answer", "pred"} as the public inference script writes them. Videos recur: their ids are numbered VIDEO_0, ...

    Raises:
        ValueError: a row lacks one of them, or a prediction is empty.
    """
    rows = list(items(path))
    keys, fields = [], []
    for where, row in rows:
        if "Q1" in row:
            names = {"question1": "Q1", "question2": "Q2", "answer": "A", "pred1": "pred1", "pred2": "pred2"}
        elif "Q" in row:
            names = {"question": "Q", "answer": "A", "pred": "pred"}
        else:
            names = {"question": "question", "answer": "answer", "pred": "pred"}
        key = "id" if "id" in row and "video_name" not in row else "video_name"
        need(row, (key, *names.values()), where)
        fields.append({name: texts(str(row[column]), f"{where}, {column}")[0] for name, column in names.items()})
        keys.append((key, str(row[key])))
    videos = iter(numbered(value for key, value in keys if key == "video_name"))
    ids = [next(videos) if key == "video_name" else value for key, value in keys]
    if not ids or len(set(ids)) != len(ids):
        raise ValueError(f"judge: {path} must hold rows with ids that differ")
    return [Item(*pair) for pair in zip(ids, fields)]


@dataclass(frozen=True)
class Prompt:
    """Messages with {question}, {answer}, {pred} (or question1, ...) where an item's text goes; other braces stay."""

    messages: tuple[Mapping[str, str], ...]

    @classmethod
    def from_file(cls, path: str | Path) -> "Prompt":
        """A JSON list of {"role", "content"}."""
        found = [need(row, ("role", "content"), f"{path}, message {n}") for n, row in enumerate(load(path, list), 1)]
        return cls(tuple({"role": row["role"], "content": row["content"]} for row in found))

    def fill(self, item: Item) -> Request:
        """Byte for byte, in one pass: a field's own text is not searched for braces.

        Raises:
            ValueError: an answer of the item is nowhere in the messages.
        """
        pattern = re.compile(r"\{(" + "|".join(item.fields) + r")\}")
        used = {name for m in self.messages for name in pattern.findall(m["content"])}
        if unused := sorted(set(item.fields) - used):
            raise ValueError(f"judge: the prompt must hold {', '.join('{' + n + '}' for n in unused)}")
        content = [pattern.sub(lambda match: item.fields[match[1]], m["content"]) for m in self.messages]
        return Request(item.id, [{"role": m["role"], "content": c} for m, c in zip(self.messages, content)])


class ChatJudge:
    """A model behind an OpenAI-compatible URL, e.g. ChatJudge("http://localhost:8000/v1", "my-model").

    A call posts to URL/chat/completions, temperature 0. Errors of the service are raised as RuntimeError.
    """

    def __init__(self, url: str, model: str, *, key: str | None = None, timeout: float = 60.0):
        self.url, self.name, self.key, self.timeout = url.rstrip("/") + "/chat/completions", model, key, timeout

    def __call__(self, request: Request) -> str:
        body = json.dumps({"model": self.name, "messages": request.messages, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url, body, headers), timeout=self.timeout
            ) as response:
                content = json.load(response)["choices"][0]["message"]["content"]
        except (urllib.error.URLError, TimeoutError, ValueError, LookupError, TypeError) as error:
            raise RuntimeError(f"judge: {self.url} gave no reply: {type(error).__name__}: {error}") from error
        if not isinstance(content, str):
            raise RuntimeError(f"judge: {self.url} gave no text, got {type(content).__name__}")
        return content


def replay(path: str | Path) -> Judge:
    """Recorded replies as a judge: JSON lines {"id", "reply"}, or a JSON object {id: reply}.

    A reply is text or an object; a list, as Video-ChatGPT keeps [reply, question], counts by its first.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        found = {line["id"]: line["reply"] for line in json_lines(path, ("id", "reply"))}
    else:
        found = load(path, dict)

    def judge(request: Request) -> str:
        if request.id not in found:
            raise RuntimeError(f"judge: {path} must have a reply to {request.id!r}")
        reply = found[request.id]
        reply = reply[0] if isinstance(reply, list) else reply
        return reply if isinstance(reply, str) else repr(reply)

    return judge


def read_reply(reply: str | Mapping, *, verdict: bool, compat: str | None = None) -> dict:
    """{"score": number} and, if `verdict`, {"pred": "yes" or "no"}, from what a judge wrote.

    The text must hold one Python dict, alone or among words; the score must be from 0 to 5. With compat
    "video_chatgpt" the text must be the dict alone and any number is a score and any word a verdict.

    Raises:
        ValueError: it does not.
    """
    value = reply
    if isinstance(reply, str):
        text = reply.strip()
        braces = re.findall(r"\{[^{}]*\}", text)
        if compat is None and len(braces) == 1:
            text = braces[0]
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
    if not isinstance(value, Mapping) or "score" not in value or (verdict and "pred" not in value):
        wanted = "'pred' and 'score'" if verdict else "a 'score'"
        raise ValueError(f"judge: a reply must be a dict with {wanted}, got {reply!r}")
    try:
        score = float(value["score"])
        int(score)  # neither NaN nor infinite
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"judge: the score must be a number, got {value['score']!r}") from None
    if compat is None and not 0 <= score <= 5:
        raise ValueError(f"judge: the score must be from 0 to 5, got {score:g}")
    found = {"score": score}
    if verdict:
        found["pred"] = str(value["pred"]).strip().lower()
        if compat is None and found["pred"] not in ("yes", "no"):
            raise ValueError(f"judge: 'pred' must be yes or no, got {value['pred']!r}")
    return found


def judged(replies: Sequence[Mapping | str], *, verdict: bool = True, compat: str | None = None) -> dict[str, float]:
    """The numbers of a set of replies.

    Args:
        replies: texts or dicts, all of which must read.
        verdict: question answering, with accuracy = yes / replies; otherwise an aspect, with a score alone.
        compat: "video_chatgpt": the published arithmetic. score = mean of int(score), so 4.8 counts 4; accuracy =
            yes / (yes + no), each looked for inside the word, yes first, so a reply with neither only counts for the
            score.

    Returns:
        {"accuracy": in [0, 1] if `verdict`, "score": from 0 to 5}.
    """
    if compat not in COMPAT:
        raise ValueError(f"judged: compat must be None or 'video_chatgpt', got {compat!r}")
    found = [read_reply(reply, verdict=verdict, compat=compat) for reply in replies]
    if not found:
        raise ValueError("judged: there must be at least one reply")
    scores = [int(r["score"]) if compat else r["score"] for r in found]
    result = {"score": sum(scores) / len(scores)}
    if verdict:
        yes = sum("yes" in r["pred"] for r in found)
        no = sum("yes" not in r["pred"] and "no" in r["pred"] for r in found)
        if not yes + no:
            raise ValueError(f"judged: no reply of {len(found)} says yes or no")
        result = {"accuracy": yes / (yes + no)} | result
    return result


def aspects(replies: Mapping[str, Sequence[Mapping | str]], *, compat: str | None = None) -> dict[str, float]:
    """The five means of the conversation benchmark and their plain mean.

    Args:
        replies: of each of ASPECTS.
    """
    if set(replies) != set(ASPECTS):
        raise ValueError(f"aspects: there must be replies of {', '.join(ASPECTS)}, got {', '.join(replies)}")
    found = {name: judged(replies[name], verdict=False, compat=compat)["score"] for name in ASPECTS}
    return found | {"mean": sum(found.values()) / len(found)}


class Replies(NamedTuple):
    """found: id -> reply that reads. failed: id -> why there is none."""

    found: dict[str, str]
    failed: dict[str, str]


def run(
    asked: Iterable[Item],
    prompt: Prompt,
    judge: Judge,
    job: str | Path,
    *,
    verdict: bool,
    compat: str | None = None,
    attempts: int = 3,
    pause: float = 1.0,
    name: str = "",
) -> Replies:
    """Ask the judge about every item, and write each reply to `job` at once: run again, it goes on where it ended.

    A reply in `job` counts if it reads and answers the same messages to the same judge.

    Args:
        job: JSON lines {"id", "by" (a digest of judge and prompt), "messages" (a digest), "reply"}.
        verdict, compat: what a reply must hold, see read_reply.
        attempts: per item, for a reply that does not read or an error of the judge (RuntimeError).
        pause: seconds before the second attempt, doubled before each further one.
        name: of the judge; a job with another's replies is not taken over.
    """
    job = Path(job)
    requests = [prompt.fill(item) for item in asked]
    graded_by = digest([name, prompt.messages])
    digests = {r.id: digest([name, r.messages]) for r in requests}
    done = {}
    for line in json_lines(job, ("id", "reply")) if job.exists() else ():
        if digests.get(line["id"]) == line.get("messages") and _reads(line["reply"], verdict, compat) is None:
            done[line["id"]] = line["reply"]
    failed = {}
    with open_to_append(job) as file:
        for request in requests:
            if request.id in done:
                continue
            for attempt in range(attempts):
                if attempt:
                    time.sleep(pause * 2 ** (attempt - 1))
                try:
                    reply = judge(request)
                except RuntimeError as error:
                    failed[request.id] = str(error)
                    continue
                line = {"id": request.id, "by": graded_by, "messages": digests[request.id], "reply": reply}
                file.write(json.dumps(line) + "\n")
                file.flush()
                why = _reads(reply, verdict, compat)
                if why is None:
                    done[request.id] = reply
                    failed.pop(request.id, None)
                    break
                failed[request.id] = why
    return Replies({r.id: done[r.id] for r in requests if r.id in done}, failed)


def recorded(job: str | Path, *, verdict: bool, compat: str | None = None) -> dict[str, str]:
    """The last reply that reads to each item of a job file.

    Raises:
        ValueError: they come from several judges or prompts.
    """
    kept = {x["id"]: x for x in json_lines(job, ("id", "reply")) if _reads(x["reply"], verdict, compat) is None}
    if len({x.get("by") for x in kept.values()}) > 1:
        raise ValueError(f"judge: the replies in {job} must come from one judge and one prompt")
    return {key: x["reply"] for key, x in kept.items()}


def _reads(reply: str, verdict: bool, compat: str | None) -> str | None:
    """Why a reply does not read, or None."""
    try:
        read_reply(reply, verdict=verdict, compat=compat)
    except ValueError as error:
        return str(error)
    return None
