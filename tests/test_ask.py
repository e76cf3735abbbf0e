"""pyvidx ask, on tiny random hosts saved to folders: what it prints, live, and that the answer is the host's own."""

import io
import json
import os
import re
import sys
import threading

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20.2", reason="pip install 'pyvidx[hosts]'")
av = pytest.importorskip("av", reason="pip install 'pyvidx[video]'")

from tests.torchvision_shim import mend_torchvision  # noqa: E402

mend_torchvision()
pytest.importorskip("torchvision", reason="pip install 'pyvidx[hosts]'")

from pyvidx.cli.ask import main as ask  # noqa: E402
from pyvidx.files import printable  # noqa: E402
from pyvidx.hosts import Session, minigpt4  # noqa: E402
from pyvidx.hosts.instructblip import InstructBLIP  # noqa: E402
from pyvidx.memory import create  # noqa: E402
from pyvidx.video import read, stream  # noqa: E402
from tests.hosts.chats import PROCESSORS  # noqa: E402
from tests.hosts.tiny import entries  # noqa: E402
from tests.tiny_hosts import blip, bt_adapter_llava, save_minigpt4, tokenizer  # noqa: E402

QUESTION = "what is the person doing ?"
WORDS = ["--new-tokens", "5"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """The same 30 frames of 3 s as MP4 and as MPEG-TS."""
    folder = tmp_path_factory.mktemp("videos")
    frames = torch.randint(0, 256, (30, 48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name, kind in (("a.mp4", "mp4"), ("a.ts", "mpegts")):
        with av.open(str(folder / name), "w", format=kind) as file:
            video = file.add_stream("mpeg4", rate=10)
            video.width, video.height = 64, 48
            for frame in frames:
                file.mux(video.encode(av.VideoFrame.from_ndarray(frame.numpy(), "rgb24")))
            file.mux(video.encode())
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a LLaVA-OneVision, an InstructBLIP-Video, a BLIP-2, and a LLaVA and a MiniGPT-4 with BT-Adapter."""
    folder = tmp_path_factory.mktemp("models")
    entries()["llava_onevision"].model().save_pretrained(folder / "onevision")
    PROCESSORS["llava_onevision"]().save_pretrained(folder / "onevision")
    for kind in ("instructblipvideo", "blip-2"):
        blip(kind).save_pretrained(folder / kind)
        tokenizer(["<video>"]).save_pretrained(folder / kind)
    tokenizer(bos=False).save_pretrained(folder / "instructblipvideo" / "qformer_tokenizer")
    save_minigpt4(folder / "minigpt4")
    model, processor = bt_adapter_llava()
    model.save_pretrained(folder / "llava")
    processor.save_pretrained(folder / "llava")
    return folder


def slots(said: str) -> list[tuple[float, float]]:
    return [(float(a), float(b)) for a, b in re.findall(r"^ *\d+ +(\d+\.\d\d) +(\d+\.\d\d)$", said, re.M)]


def check_times(said: str) -> None:
    assert re.search(r"^time: load \d.*, read \d.*, encode \d.*, compress \d.*, generate \d+\.\d{3} s$", said, re.M)


def test_a_host_of_transformers(videos, models, capsys):
    folder = models / "onevision"
    given = [str(videos / "a.mp4"), QUESTION, "--model", str(folder), *WORDS]
    assert ask([*given, "--memory", "merge", "--capacity", "4", "--frames", "10"]) == 0
    said = capsys.readouterr().out
    from transformers import LlavaOnevisionForConditionalGeneration as Model
    from transformers import LlavaOnevisionProcessor as Processor

    model, processor = Model.from_pretrained(folder).eval(), Processor.from_pretrained(folder)
    session, clip = Session(model, processor, "merge", capacity=4), read(videos / "a.mp4", 10, "linspace")
    session.push(clip.frames, clip.seconds)
    want = session.ask(QUESTION, max_new_tokens=5)
    assert said.startswith(f"{printable(want.text)}\n10 frames, policy merge (capacity 4, weighted True, unit frame)\n")
    assert slots(said) == [(round(a, 2), round(b, 2)) for a, b in want.slots] and len(want.slots) == 4
    check_times(said)
    assert ask([*given, "--memory", "flash_vstream", "--capacity", "4", "--frames", "10"]) == 0
    assert "policy flash_vstream (capacity 4, clusters 4" in capsys.readouterr().out
    assert ask([*given, "--frames", "6"]) == 0
    said = capsys.readouterr().out
    clip = read(videos / "a.mp4", 6, "linspace")
    inputs = processor(
        text=[session._prompt(QUESTION)], videos=[clip.frames.permute(0, 3, 1, 2)], do_sample_frames=False,
        return_tensors="pt",
    )  # fmt: skip
    ids = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert said.startswith(
        f"{printable(processor.decode(ids, skip_special_tokens=True))}\n6 frames, all of them kept\ntime: "
    )


@pytest.mark.parametrize("kind", ["instructblipvideo", "blip-2"])
def test_ma_lmm(videos, models, kind, capsys):
    given = [str(videos / "a.mp4"), QUESTION, "--model", str(models / kind), *WORDS, "--fps", "5"]
    host = InstructBLIP.from_pretrained(models / kind)
    frames = torch.cat([clip.frames for clip in stream(videos / "a.mp4", fps=5)])
    fifo = ["--memory", "fifo", "--capacity", "4"], {"policy": create("fifo", capacity=4)}
    for options, memory in (([], {"capacity": 0}), (["--memory", "merge", "--capacity", "4"], {"capacity": 4}),
                            (["--memory", "merge:query=False"], {"query": False}), fifo):  # fmt: skip
        assert ask([*given, *options]) == 0
        said = capsys.readouterr().out
        assert said.startswith(host.answer(frames, QUESTION, max_new_tokens=5, **memory) + "\n15 frames, ")
        check_times(said)
        found = slots(said)
        assert len(found) == (4 if "policy" in memory else {0: 0, 4: 5}.get(memory.get("capacity"), 15))
        assert not found or found[0][0] == (2.2 if "policy" in memory else 0) and found[-1][1] == 2.8


@pytest.mark.parametrize("kind, frames", [("llava", 8), ("minigpt4", 12)])
def test_a_bt_adapter(videos, models, kind, frames, capsys):
    from pyvidx.hosts import llava

    torch.manual_seed(0)
    assert ask([str(videos / "a.mp4"), QUESTION, "--model", str(models / kind), *WORDS]) == 0
    said = capsys.readouterr().out
    chat = {"llava": llava, "minigpt4": minigpt4}[kind].open(models / kind)
    clip = read(videos / "a.mp4", None, lambda n, *_: torch.arange(n))
    torch.manual_seed(0)
    answer = chat.answer(clip.frames, QUESTION, max_new_tokens=5)  # of all frames takes its own
    assert said.startswith(f"{answer}\n{frames} frames, of which BT-Adapter reads {frames}")
    check_times(said)
    assert not re.search(r"encode (-|0\.000)", said)
    for options, count in ((["--frames", "4"], 4), (["--sampler", "uniform"], frames)):
        assert ask([str(videos / "a.mp4"), QUESTION, "--model", str(models / kind), *WORDS, *options]) == 0
        assert f"\n{count} frames, of which BT-Adapter reads {count}" in capsys.readouterr().out


def test_live(videos, models, capsys, monkeypatch):
    """A growing file with a question; typed questions; standard input."""
    given = ["--live", "--idle", "0.2", *WORDS]
    model = ["--model", str(models / "onevision"), "--memory", "fifo", "--capacity", "2"]
    assert ask([str(videos / "a.ts"), QUESTION, *given, *model, "--every", "1", "--fps", "2"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^(\d\.\d) s \| what is the person doing \? \| ", said, re.M) == ["1.0", "2.0", "2.5"]
    assert slots(said) == [(2.0, 2.0), (2.5, 2.5)]
    check_times(said)
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is red ?\n\ncolor of cup\n"))
    model = ["--model", str(models / "instructblipvideo"), "--memory", "merge:query=False"]
    assert ask([str(videos / "a.ts"), *given, *model]) == 0
    asked = re.findall(r" s \| ([^|]*) \| ", capsys.readouterr().out)
    assert asked == ["what is red ?", "color of cup"]
    end, start = os.pipe()

    def write():
        with os.fdopen(start, "wb") as file:
            file.write((videos / "a.ts").read_bytes())

    threading.Thread(target=write).start()
    with os.fdopen(end, "rb") as piped:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(piped))
        assert ask(["-", QUESTION, *given, *model]) == 0
    assert "2.0 s | what is the person doing ? | " in capsys.readouterr().out


@pytest.mark.parametrize("given, message", [
    ("a.mp4 --model m", "there must be a question"),
    ("a.mp4 '' --model m", "there must be a question"),
    ("a.mp4 q --model none", "there is no none"),
    ("b.mp4 q --model m", "there is no b.mp4"),
    ("m q --model m", "the video must be a file, m is a folder"),
    ("a.mp4 q", "required: --model"),
    ("https://host/a.mp4 q --model m", "download"),
    ("a.mp4 q --model m --frames 0", "at least 1"),
    ("a.mp4 q --model m --frames 4 --fps 1", "--frames or --fps must be given, not both"),
    ("a.mp4 q --model m --sampler none", "--sampler: sample: sampler must be one of"),
    ("a.mp4 q --model m --sampler random_segment", "needs a torch.Generator"),
    ("a.mp4 q --model m --sampler uniform --fps 1", "--sampler is of --frames"),
    ("a.mp4 q --model m --memory none", "must be one of"),
    ("a.mp4 q --model m --memory merge:capacity", "must be NAME=VALUE"),
    ("a.mp4 q --model m --memory merge:capacity=3 --capacity 4", "has a capacity already"),
    ("a.mp4 q --model m --memory merge:unit=both", "unit"),
    ("a.mp4 q --model m --memory merge:size=3", "size"),
    ("a.mp4 q --model m --memory fifo:anchors=3 --capacity 2", "capacity must leave room"),
    ("a.mp4 q --model m --every 3", "--every needs --live"),
    ("a.mp4 q --model m --idle 3", "--idle needs --live"),
    ("- q --model m", "- (standard input) needs --live"),
    ("- --model m --live", "give the question"),
    ("a.mp4 --model m --live --every 3", "--every needs a question"),
    ("a.mp4 q --model m --live --frames 3", "--frames must not be given with --live"),
    ("a.mp4 q --model m --device foo", "must be cpu"),
    ("a.mp4 q --model empty", "there is no empty/config.json"),
    ("a.mp4 q --model bert", "must hold one of blip-2, instructblip"),
    ("a.mp4 q --model blip --memory fifo:anchors=3 --capacity 2", "capacity must leave room"),
    ("a.mp4 q --model blip --memory merge:unit=frame", "takes query=False or visual=False, got unit"),
    ("a.mp4 --model blip --live --memory fifo", "must be merge:query=False where questions are typed"),
    ("a.mp4 --model blip --live", "must be merge:query=False where questions are typed"),
    ("a.mp4 q --model m", "no file named model.safetensors"),
    ("a.mp4 q --model llava", "no file named model.safetensors"),
    ("a.mp4 q --model blip", "no file named model.safetensors"),
    ("a.mp4 q --model broken", "header"),
    ("a.mp4 q --model llava --memory merge", "--memory must not be given with a BT-Adapter"),
    ("a.mp4 q --model llava --live", "--live must not be given with a BT-Adapter"),
])  # fmt: skip
def test_arguments(tmp_path, monkeypatch, given, message, capsys):
    """One line before anything is loaded: the folders hold nothing that could be."""
    import shlex

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"x")
    kinds = {"m": "llava_onevision", "blip": "instructblip", "llava": "llava", "bert": "bert"}
    kinds["broken"] = kinds["m"]
    (tmp_path / "empty").mkdir()
    for name, kind in kinds.items():
        (tmp_path / name).mkdir()
        about = {"model_type": kind, "vision_config": {"model_type": "pyvidx_bt_adapter_vision"}}
        about |= {"architectures": ["LlavaOnevisionForConditionalGeneration"]} if kind == "llava_onevision" else {}
        (tmp_path / name / "config.json").write_text(json.dumps(about))
    (tmp_path / "broken/model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(SystemExit) as stop:
        ask(shlex.split(given))
    said = capsys.readouterr()
    assert stop.value.code == 2 and not said.out and said.err.count("\n") == 1
    assert said.err.startswith("pyvidx ask: error: ") and message in said.err


def test_hosts_of_whole_frames(tmp_path, monkeypatch, capsys):
    """A policy that drops some positions of a frame is refused before a model that takes none is loaded."""
    from pyvidx.hosts.language import names
    from pyvidx.hosts.language.registry import HOSTS

    assert "video_llava" in names()
    monkeypatch.setattr(HOSTS["video_llava"], "ragged", False)
    (tmp_path / "config.json").write_text('{"model_type": "video_llava"}')
    with pytest.raises(SystemExit):
        ask([__file__, "q", "--model", str(tmp_path), "--memory", "dtd"])
    assert "--memory dtd keeps some tokens of a frame, and a video_llava takes whole frames" in capsys.readouterr().err


def test_interrupted(videos, models, capsys, monkeypatch):
    """Ctrl-C in a stream without end: what was held is told."""
    from pyvidx.cli import ask_hosts

    push, pushed = ask_hosts.Blip.push, []

    def stops(self, clip):
        if len(pushed) == 2:
            raise KeyboardInterrupt
        pushed.append(clip)
        push(self, clip)

    monkeypatch.setattr(ask_hosts.Blip, "push", stops)
    given = [str(videos / "a.ts"), QUESTION, "--live", "--model", str(models / "instructblipvideo"), "--idle", "0"]
    assert ask(given) == 130
    said = capsys.readouterr().out
    assert slots(said) == [(0.0, 0.0), (1.0, 1.0)]
    check_times(said)
