"""pyvidx.eval.watch and what lmms-eval makes of it: a memory and its controls on one budget."""

import importlib
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20.2", reason="pip install 'pyvidx[hosts]'")

from pyvidx.data import motion  # noqa: E402
from pyvidx.eval.watch import Watcher, until  # noqa: E402
from pyvidx.hosts import Session  # noqa: E402
from pyvidx.video import read  # noqa: E402
from tests.hosts.chats import PROCESSORS  # noqa: E402
from tests.hosts.tiny import entries  # noqa: E402

QUESTION = "What moves?"
GREEDY = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)


@pytest.fixture(scope="module", params=["llava_onevision", "qwen3_vl"])
def host(request):
    """The model, its processor and the frames of a step."""
    return entries()[request.param].model(), PROCESSORS[request.param](), 1 + (request.param == "qwen3_vl")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for i, scene in enumerate(motion.random_scenes(3, seed=5)):
        motion.write_clip(folder / f"{i}.mp4", scene, frames=40, size=32, fps=8.0)
    return [str(folder / f"{i}.mp4") for i in range(3)]


def by_hand(host, clip, **options):
    model, processor, n = host
    return Session(model, processor, clip=4 * n, **options).push(clip.frames, clip.seconds).ask(QUESTION, **GREEDY)


def same(a, b) -> bool:
    return torch.equal(a.tokens, b.tokens) and a.slots == b.slots


def test_a_memory_and_its_controls_have_one_budget(host, videos):
    model, processor, n = host
    watch = {name: Watcher(model, processor, name, capacity=4, frames=10) for name in ("merge", "uniform", "random")}
    found = {name: one(videos[0], QUESTION, **GREEDY) for name, one in watch.items()}
    assert [len(x.slots) for x in found.values()] == [4, 4, 4]
    ten, four = (read(videos[0], k * n, "linspace") for k in (10, 4))
    assert same(found["merge"], by_hand(host, ten, policy="merge", capacity=4))
    assert same(found["uniform"], by_hand(host, four, policy="concat"))
    seen = {(float(a), float(b)) for a, b in by_hand(host, ten, policy="concat").slots}
    assert set(found["random"].slots) < seen and found["random"].slots == sorted(found["random"].slots)


def test_a_policy_without_a_capacity_goes_by_its_options(host, videos):
    model, processor, n = host
    watch = Watcher(model, processor, "average", capacity=None, frames=6, anchors=1)
    want = Session(model, processor, "average", clip=6 * n, anchors=1)
    clip = read(videos[0], 6 * n, "linspace")
    answer = watch(videos[0], QUESTION, **GREEDY)
    assert same(answer, want.push(clip.frames, clip.seconds).ask(QUESTION, **GREEDY)) and len(answer.slots) == 2


def test_what_is_drawn(host, videos):
    model, processor, _ = host

    def slots(video, seed):
        return Watcher(model, processor, "random", capacity=4, frames=10, seed=seed).session(video).slots()

    assert slots(videos[0], 1) == slots(videos[0], 1)
    assert len({tuple(slots(video, seed)) for video in videos for seed in range(3)}) > 6
    everything = Watcher(model, processor, "random", capacity=10, frames=10)
    assert (
        everything.session(videos[0]).slots()
        == Watcher(model, processor, capacity=None, frames=10).session(videos[0]).slots()
    )


def test_a_video_is_watched_once(host, videos):
    watch = Watcher(*host[:2], capacity=3, frames=5)
    first = watch.session(videos[0])
    watch(videos[0], "And then?", **GREEDY)
    assert watch.session(videos[0]) is first and watch.session(videos[1]) is not first


def test_what_does_not_fit(host):
    for options, said in (
        (dict(capacity=0), "capacity must be a whole number"),
        (dict(capacity=9, frames=8), "capacity must be at most frames"),
        (dict(policy="random", anchors=1), "takes no options"),
        (dict(policy="nothing"), "policy must be one of"),
        (dict(policy="nothing", capacity=None), "policy must be one of"),
        (dict(policy="concat"), "concat has no capacity"),
        (dict(policy="moviechat"), "moviechat has no capacity"),
        (dict(policy="merge", capacity=None, anchors=1), "merge needs a capacity"),
        (dict(policy="keyframes"), "of a stream of frames"),
        (dict(sampler="nothing"), "sampler must be one of"),
    ):
        with pytest.raises(ValueError, match=said):
            Watcher(*host[:2], **options)


def test_stops():
    assert until("a\nb.c", ["\n", "."]) == "a" and until("a.b", ".") == "a" and until("ab", []) == "ab"


def test_what_lmms_eval_hands_over(videos, tmp_path, monkeypatch):
    """Without it: options as its command line has them, and what a task leaves out."""
    parts = {
        "instance": {"GenerationResult": SimpleNamespace, "TokenCounts": SimpleNamespace},
        "model": {"lmms": object},
    }
    for name in ("lmms_eval", "lmms_eval.api", *(f"lmms_eval.api.{part}" for part in parts)):
        module = ModuleType(name)
        vars(module).update(parts.get(name.rpartition(".")[2], {}))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "pyvidx.eval.lmms_model", raising=False)
    own = importlib.import_module("pyvidx.eval.lmms_model")
    del sys.modules["pyvidx.eval.lmms_model"]  # what it imported is not lmms-eval
    for part in (entries()["llava_onevision"].model(), PROCESSORS["llava_onevision"]()):
        part.save_pretrained(tmp_path)
    model = own.Pyvidx(str(tmp_path), "dtd", capacity="None", frames=4, threshold="None", ratio=0.5, device="cpu")
    assert model.watch.session(videos[0]).policy.spec()["ratio"] == 0.5
    given = []
    model.watch = lambda video, question, **options: given.append(options) or SimpleNamespace(text="a.b", tokens=[1])
    model.task_dict = {"task": {"test": [{}]}}
    for settings in ({}, {"max_new_tokens": 3, "do_sample": True, "temperature": 0.5, "until": "."}):
        args = (QUESTION, settings, lambda doc: [videos[0]], 0, "task", "test")
        (found,) = model.generate_until([SimpleNamespace(args=args)])
        assert found.text == ("a" if settings else "a.b")
    assert given == [
        {"max_new_tokens": own.LONGEST, "do_sample": False},
        {"max_new_tokens": 3, "do_sample": True, "temperature": 0.5},
    ]
    with pytest.raises(ValueError, match="batch_size must be 1, got auto"):
        own.Pyvidx(str(tmp_path), batch_size="auto")


def test_lmms_eval_runs_a_task(videos, tmp_path, monkeypatch):
    """Run with lmms-eval 0.7.3 on three samples."""
    pytest.importorskip("lmms_eval", reason="needs lmms-eval")
    evaluator = pytest.importorskip("lmms_eval.evaluator", reason="needs what lmms-eval imports")
    from lmms_eval import models
    from lmms_eval.tasks import TaskManager

    from pyvidx.eval.lmms import manifest

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    models.MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    for part in (entries()["llava_onevision"].model(), PROCESSORS["llava_onevision"]()):
        part.save_pretrained(tmp_path / "model")
    samples = [json.dumps({"video": video, "question": QUESTION, "answer": "x"}) for video in videos]
    (tmp_path / "samples.jsonl").write_text("\n".join(samples))
    (tmp_path / "task").mkdir()
    (tmp_path / "task/utils.py").write_text(
        "def visual(doc):\n    return [doc['video']]\n\n\ndef text(doc, lmms_eval_specific_kwargs=None):\n"
        "    return doc['question']\n\n\ndef results(doc, found):\n    return {'length': len(found[0])}\n\n\n"
        "def mean(values):\n    return sum(values) / len(values)\n"
    )
    (tmp_path / "task/motion.yaml").write_text(
        f"task: pyvidx_motion\ndataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path}/samples.jsonl\n"
        "test_split: train\noutput_type: generate_until\ndoc_to_visual: !function utils.visual\n"
        "doc_to_text: !function utils.text\ndoc_to_target: answer\nprocess_results: !function utils.results\n"
        "generation_kwargs:\n  max_new_tokens: 3\n  temperature: 0\n  do_sample: false\n"
        "metric_list:\n  - metric: length\n    aggregation: !function utils.mean\n    higher_is_better: true\n"
    )
    for policy in ("merge", "uniform", "random"):
        found = evaluator.simple_evaluate(
            model="pyvidx", model_args=f"pretrained={tmp_path}/model,policy={policy},capacity=3,frames=6",
            tasks=["pyvidx_motion"], batch_size=1, device="cpu",
            task_manager=TaskManager(include_path=str(tmp_path / "task"), model_name="pyvidx"),
        )  # fmt: skip
        assert found["n-samples"]["pyvidx_motion"]["effective"] == 3 and len(found["samples"]["pyvidx_motion"]) == 3
