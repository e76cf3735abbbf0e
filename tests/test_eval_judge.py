"""Judges: prompts to the byte, replies that read, jobs that go on, the arithmetic of the public script."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from pyvidx.cli.eval import main
from pyvidx.eval import judge
from pyvidx.eval.judge import ChatJudge, Item, Prompt, aspects, judged, read_reply

PROMPT = [
    {"role": "system", "content": "Grade. Answer like {'pred': 'yes', 'score': 4.8}."},
    {"role": "user", "content": "Q: {question}\nA: {answer}\nP: {pred}"},
]


def rows(n=3):
    return [{"video_name": "v", "Q": f"what {i}?", "A": "this", "pred": "that {answer}"} for i in range(n)]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "pred.json").write_text(json.dumps(rows()))
    (tmp_path / "prompt.json").write_text(json.dumps(PROMPT))
    return tmp_path


def test_prompts_are_filled_to_the_byte(files):
    items = judge.predictions(files / "pred.json")
    assert [item.id for item in items] == ["v_0", "v_1", "v_2"]
    request = Prompt.from_file(files / "prompt.json").fill(items[1])
    assert request.messages[0] == PROMPT[0]
    assert request.messages[1]["content"] == "Q: what 1?\nA: this\nP: that {answer}"
    with pytest.raises(ValueError, match="the prompt must hold {answer}, {question}"):
        Prompt(({"role": "user", "content": "{pred}"},)).fill(items[0])


def test_predictions(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"id": "v_1", "question": "q", "answer": "a", "pred": "p"}]))
    assert judge.predictions(path) == [Item("v_1", {"question": "q", "answer": "a", "pred": "p"})]
    path.write_text(json.dumps([{"video_name": "v", "Q1": "q", "Q2": "r", "A": "a", "pred1": "p", "pred2": "s"}]))
    assert sorted(judge.predictions(path)[0].fields) == ["answer", "pred1", "pred2", "question1", "question2"]
    path.write_text(json.dumps(rows(1) + [{"video_name": "v", "Q": "q", "A": "a"}]))
    with pytest.raises(ValueError, match="p.json, row 2 must have pred"):
        judge.predictions(path)


def test_replies():
    assert read_reply("Sure: {'pred': 'Yes', 'score': 4.8}.", verdict=True) == {"pred": "yes", "score": 4.8}
    assert read_reply('{"score": "3"}', verdict=False) == {"score": 3.0}
    for text, why in (
        ("I think so", "must be a dict with 'pred' and 'score'"), ("{'score': 4}", "must be a dict with 'pred'"),
        ("{'pred': 'yes', 'score': 'high'}", "must be a number"), ("{'pred': 'yes', 'score': 9}", "from 0 to 5"),
        ("{'pred': 'unsure', 'score': 3}", "yes or no"), ("{'pred': 'yes', 'score': 1e999}", "must be a number"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            read_reply(text, verdict=True)
    with pytest.raises(ValueError, match="must be a dict"):
        read_reply("Sure: {'pred': 'Yes', 'score': 4.8}.", verdict=True, compat="video_chatgpt")


def test_numbers():
    replies = ["{'pred': 'Yes', 'score': 4.8}", {"pred": "no", "score": 1}]
    assert judged(replies) == {"accuracy": 0.5, "score": 2.9}
    assert judged(replies, compat="video_chatgpt") == {"accuracy": 0.5, "score": 2.5}
    unsure = [*replies, {"pred": "unsure", "score": 3}]
    assert judged(unsure, compat="video_chatgpt") == {"accuracy": 0.5, "score": pytest.approx(8 / 3)}
    found = aspects({name: [{"score": i}] for i, name in enumerate(judge.ASPECTS)})
    assert found["consistency"] == 4 and found["mean"] == 2
    with pytest.raises(ValueError, match="replies of correctness"):
        aspects({"detail": [{"score": 1}]})


def test_a_job_goes_on_where_it_ended(files):
    items, prompt, asked = judge.predictions(files / "pred.json"), Prompt.from_file(files / "prompt.json"), []

    def flaky(request):
        asked.append(request.id)
        if request.id == "v_1":
            raise RuntimeError("busy")
        return "no idea" if request.id == "v_2" and asked.count("v_2") == 1 else "{'pred': 'yes', 'score': 5}"

    job, options = files / "runs/job.jsonl", {"verdict": True, "pause": 0.0, "attempts": 2}
    found = judge.run(items, prompt, flaky, job, **options)
    assert asked == ["v_0", "v_1", "v_1", "v_2", "v_2"] and found.failed == {"v_1": "busy"}
    assert list(found.found) == ["v_0", "v_2"]
    with job.open("a") as file:
        file.write('{"id": "v_1", "mess')  # killed while it wrote
    asked.clear()
    found = judge.run(items, prompt, lambda r: asked.append(r.id) or "{'pred': 'no', 'score': 0}", job, **options)
    assert asked == ["v_1"] and not found.failed and judged(list(found.found.values()))["accuracy"] == 2 / 3
    assert set(judge.recorded(job, verdict=True)) == {"v_0", "v_1", "v_2"}
    judge.run(items, prompt, lambda r: asked.append(r.id) or "{'pred': 'no', 'score': 0}", job, name="b", **options)
    assert len(asked) == 4, "another judge's replies do not count"
    with job.open("a") as file:
        file.write(json.dumps({"id": "v_0", "by": "hand", "reply": "{'pred': 'no', 'score': 0}"}) + "\n")
    with pytest.raises(ValueError, match="one judge and one prompt"):
        judge.recorded(job, verdict=True)


def test_a_service(files, capsys):
    bodies = []

    class Service(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            good = self.headers["Authorization"] == "Bearer secret" and self.path == "/v1/chat/completions"
            self.send_response(200 if good else 401)
            self.end_headers()
            reply = {"choices": [{"message": {"content": "{'pred': 'yes', 'score': 4}"}}]}
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1/"
        (files / "key").write_text("secret\n")
        command = ["judge", "--protocol", "qa", "--predictions", str(files / "pred.json"), "--prompt",
                   str(files / "prompt.json"), "--job", str(files / "job.jsonl")]  # fmt: skip
        assert main([*command, "--url", url, "--model", "m", "--key-file", str(files / "key")]) == 0
        assert "4.00" in capsys.readouterr().out and len(bodies) == 3
        assert bodies[2]["model"] == "m" and bodies[2]["messages"][1]["content"].startswith("Q: what 2?")
        with pytest.raises(RuntimeError, match="gave no reply: HTTPError"):
            ChatJudge(url, "m", key="wrong")(judge.Request("x", []))
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_replay_and_aspects(files, capsys):
    replies = {f"v_{i}": [{"score": 4.8 if i else 1}, {"q": "kept"}] for i in range(2)}
    (files / "recorded.json").write_text(json.dumps(replies))
    command = ["judge", "--protocol", "detail", "--predictions", str(files / "pred.json"), "--prompt",
               str(files / "prompt.json"), "--job", str(files / "job.jsonl"), "--replay",
               str(files / "recorded.json")]  # fmt: skip
    assert main(command) == 1
    assert "1 of 3 have no reply that reads, e.g. v_2" in capsys.readouterr().err
    out = files / "out.json"
    assert main([*command, "--partial", "--json", str(out), "--compat", "video_chatgpt"]) == 0
    result = json.loads(out.read_text())
    assert result["detail"] == {"score": 2.5} and list(result["about"]["left out"]) == ["v_2"]
    jobs = [word for name in judge.ASPECTS for word in (f"--{name}", str(files / "job.jsonl"))]
    assert main(["aspects", *jobs, "--overwrite", "--plot", str(files / "plot.png"), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["score"]["mean"] == pytest.approx(2.9)
    assert (files / "plot.png").read_bytes().startswith(b"\x89PNG")
