"""Arguments that cannot be: one line at once, exit 2, before a model is loaded; and how commands end."""

import argparse
import importlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pyvidx.__main__ import COMMANDS
from pyvidx.__main__ import main as pyvidx
from pyvidx.cli import arguments
from pyvidx.cli.bench import main as bench
from pyvidx.cli.demo import main as demo
from pyvidx.cli.encode import find
from pyvidx.cli.encode import main as encode
from pyvidx.cli.eval import main as evaluate
from pyvidx.cli.flops import main as flops
from pyvidx.cli.memory import main as memory
from pyvidx.cli.plan import main as plan
from pyvidx.cli.train import main as train
from pyvidx.device import usable
from pyvidx.hosts import open as opening
from pyvidx.models import BTAdapter, TextVideo
from tests.test_readme import given_here

JUDGE = "judge --protocol qa --predictions t.csv --prompt t.csv"
PREDICT = "predict --task coin --annotations t.csv --format coin --config t.csv"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with names that are there, in which the commands run; no model can be loaded."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.mp4", "taken.npz", "taken.png", "taken.json", "t.csv"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr(opening, "opened", None)
    return tmp_path


def refused(command, given, capsys) -> str:
    """What a command says of arguments: one line, and exit 2."""
    with pytest.raises(SystemExit) as stop:
        command(given)
    said = capsys.readouterr()
    assert stop.value.code == 2 and not said.out
    assert said.err.count("\n") == 1 and said.err.startswith("pyvidx ")
    return said.err


@pytest.mark.parametrize("given, message", [
    ("a.mp4 --device foo", "must be cpu, cuda, cuda:N"),
    ("a.mp4 --device meta", "must be cpu, cuda, cuda:N"),
    pytest.param("a.mp4 --device cuda", "sees no CUDA GPU; give cpu", marks=NO_GPU),
    pytest.param("a.mp4 --device cuda:7", "sees no CUDA GPU; give cpu", marks=NO_GPU),
    ("a.mp4 --model x.pth", "there is no x.pth"),
    ("a.mp4 --model openai/clip-vit", "pyvidx downloads nothing"),
    ("a.mp4 --model https://host/x.pth", "download https://host/x.pth and give its path"),
    ("a.mp4 --module stann", "must be one of branch, bt_adapter"),
    ("a.mp4 --module stan:deep=2", "stan takes depth, time_length, per_frame"),
    ("a.mp4 --precision int4", "invalid choice"),
    ("a.mp4 --precision int8 --dtype float16", "--precision int8 is for --device cpu and float32"),
    ("a.mp4 --frames 99999", "of at most 10000, got '99999'"),
    ("a.mp4 --workers 9999", "of at most 1024"),
    ("a.mp4 --model taken.npz --out taken.npz --overwrite", "taken.npz is an input"),
    ("https://host/a.mp4", "download https://host/a.mp4 and give its path"),
    ("a.mp4 b.mp4 c.mp4", "there is no b.mp4, nor 1 more"),
    ("a.mp4 --frames 0", "at least 1, got '0'"),
    ("a.mp4 --frames -1", "at least 1, got '-1'"),
    ("a.mp4 --frames 1.5", "at least 1, got '1.5'"),
    ("a.mp4 --batch 0", "at least 1"),
    ("a.mp4 --workers 0", "at least 1"),
    ("a.mp4 --outputs pool", "pooled, tokens or pooled,tokens, got 'pool'"),
    ("a.mp4 --outputs pooled,pooled", "got 'pooled,pooled'"),
    ("a.mp4 --outputs ,", "got ','"),
    ("a.mp4 --start 5 --end 2", "--end must come after --start"),
    ("a.mp4 --end 0", "--end must come after --start"),
    ("a.mp4 --start nan", "must be seconds"),
    ("a.mp4 --end inf", "must be seconds"),
    ("a.mp4 --start -3", "must be seconds"),
    ("a.mp4 --sampler nearest", "invalid choice"),
    ("a.mp4 --out x.csv", "must end in"),
    ("a.mp4 --out s3://bucket/x", "must be a path on this machine, got 's3://bucket/x'"),
    ("a.mp4 --out=", "must be a path on this machine, got ''"),
    ("a.mp4 --out taken.npz", "taken.npz exists; give another name, or --overwrite"),
    ("a.mp4 --out t.csv/x.npz", "cannot be written to"),
])  # fmt: skip
def test_encode(there, given, message, capsys):
    assert message in refused(encode, given.split(), capsys)


@pytest.mark.parametrize("command, given, message", [
    (demo, "--frames 0", "at least 1"),
    (demo, "b.mp4", "no such file: b.mp4"),
    (demo, "https://host/a.mp4", "download"),
    (flops, "--frames 8 0", "at least 1"),
    (flops, "--json taken.json", "exists"),
    (flops, "--plot x.mp3", "must end in"),
    (flops, "--json new.png --plot new.png", "files must differ"),
    (memory, "b.mp4", "there is no b.mp4"),
    (memory, "https://host/a.mp4", "download"),
    (memory, "a.mp4 --out taken.png", "exists"),
    (memory, "a.mp4 --out x.mp3", "must end in"),
    (memory, "a.mp4 --save x.pt", "must end in .safetensors"),
    (memory, "a.mp4 --capacity 0", "capacity"),
    (memory, "a.mp4 --fps nan", "--fps: must be above 0"),
    (memory, "a.mp4 --position -1", "at least 0"),
    (memory, "a.mp4 --features colors --model t.csv", "--model must not be given with --features colors"),
    (memory, "a.mp4 --policy fifo:unit=token", "unit"),
    (memory, "a.mp4 --policy first", "must be one of fifo"),
    (memory, "a.mp4 --policy merge:capacity=3 --capacity 4", "has a capacity already"),
    (memory, "a.mp4 --policy merge:capacity", "must be NAME=VALUE"),
    (memory, "a.mp4 --policy merge:unit=both", "unit"),
    (memory, "a.mp4 --anchors -1", "at least 0"),
    (memory, "taken.png --out taken.png --overwrite", "taken.png is an input"),
    (memory, "a.mp4 --device foo", "must be cpu"),
    (memory, "a.mp4 --features model --model x.pth", "there is no x.pth"),
    (train, "malmm --config no.json", "no.json"),
    (train, "malmm", "required: --config"),
    (plan, "pretrain --cards 0", "at least 1"),
    (plan, "pretrain --videos nan", "at least 1"),
    (plan, "pretrain --decode-seconds -1", "must be seconds"),
    (plan, "pretrain --decode-video b.mp4", "no such file: b.mp4"),
    (plan, "pretrain --decode-seconds 1 --decode-video a.mp4", "not allowed with"),
    (plan, "pretrain --decode-seconds 1 --cached-features", "--cached-features decodes nothing"),
    (plan, "pretrain --mask-rate 1", "mask rate must be in [0, 1)"),
    (plan, "pretrain --products-share 2", "share of products must be in (0, 1]"),
    (plan, "encode", "there must be videos to measure on, or --rates"),
    (plan, "encode a.mp4 --rates t.csv", "there must be videos to measure on, or --rates"),
    (plan, "encode --rates t.csv", "must hold rates"),
    (plan, "encode a.mp4 --videos 0", "at least 1"),
    (plan, "encode --rates t.csv --json t.csv --overwrite", "t.csv is an input"),
    (bench, ["report", "b.json"], "no such file"),
    (bench, ["report", "a.mp4"], "must be JSON"),
    (evaluate, "retrieval t.csv --json taken.json", "exists"),
    (evaluate, "retrieval e.safetensors", "no such file: e.safetensors"),
    (evaluate, "retrieval a.mp4", "is no safetensors file"),
    (evaluate, "retrieval --config c.json", "c.json"),
    (evaluate, "retrieval t.csv --plot p.txt.gzip", "must end in"),
    (evaluate, f"{PREDICT} --out o.jsonl --frames 0", "at least 1"),
    (evaluate, f"{PREDICT} --out o.jsonl --device foo", "must be cpu"),
    (evaluate, "rows --task coin --annotations t.csv --format coin --out taken.json", "exists"),
    (evaluate, f"{JUDGE} --job t.csv/j --replay t.csv", "cannot be written"),
    (evaluate, f"{JUDGE} --job t.csv --replay t.csv", "t.csv is an input"),
    (evaluate, f"{JUDGE} --job j --url localhost:8000 --model x", "must begin with http"),
    (evaluate, f"{JUDGE} --job j --url http://localhost:8000/v1", "--url needs --model"),
    (evaluate, f"{JUDGE} --job j --replay t.csv --model x", "--model needs --url"),
    (evaluate, f"{JUDGE} --job j --replay t.csv --key-file t.csv", "--key-file needs --url"),
    (evaluate, f"{JUDGE} --job j --replay t.csv --attempts 0", "at least 1"),
    (evaluate, "retrieval t.csv --broken exclude", "--broken needs --config"),
    (evaluate, "retrieval t.csv --json t.csv --overwrite", "t.csv is an input"),
    (evaluate, "retrieval t.csv --config t.csv", "not allowed with"),
    (evaluate, "retrieval", "one of the arguments --config embeddings is required"),
    (evaluate, "anticipation --segments t.csv --predictions t.csv", "--predictions needs --verbs"),
    (evaluate, "anticipation --segments t.csv --scores t.csv --submission s.json", "--submission needs --levels"),
    (evaluate, "anticipation --segments t.csv --scores t.csv --submission s --levels 1 2 9", "of at most 5"),
    (evaluate, "rows --task coin --annotations t.csv --out o.jsonl", "required: --format"),
    (evaluate, "rows --task coin --annotations t.csv --format coin --out o.jsonl --option a", "must be NAME=VALUE"),
    (evaluate, "answers --task msvd_qa --annotations t.csv --predictions t.csv --reference t.csv", "needs --format"),
    (evaluate, f"{PREDICT} --out o.json", "end in .jsonl"),
    (evaluate, f"{PREDICT} --out o.jsonl --root t.csv",
     "must be a folder, t.csv is a file"),
    (evaluate, "lvu --task genre --annotations a.csv --scores t.csv", "no such file: a.csv"),
    (evaluate, "lvu --task genre --annotations . --scores t.csv", "must be a file, . is a folder"),
    (evaluate, ["lvu", "--task", "genre", "--annotations", "", "--scores", "t.csv"], "must be a path"),
    (evaluate, ["lvu", "--task", "genre", "--annotations", "a" * 5000, "--scores", "t.csv"], "no such file"),
])  # fmt: skip
def test_the_others(there, command, given, message, capsys):
    assert message in refused(command, given.split() if isinstance(given, str) else given, capsys)


def test_the_demo_keeps_what_is_there(there, capsys):
    (there / "demo").mkdir()
    (there / "demo/clip.mp4").write_bytes(b"mine")
    assert "clip.mp4 exists" in refused(demo, [], capsys)
    assert (there / "demo/clip.mp4").read_bytes() == b"mine"


def test_outputs_that_the_model_has_not(tmp_path, capsys):
    """Known once the model is there, before a video is opened."""
    model = TextVideo.default().model
    config = {**model.config.to_dict(), "part": "tokens"}
    BTAdapter(type(model.config).from_dict(config)).save(tmp_path / "m.safetensors")
    (tmp_path / "a.mp4").write_bytes(b"x")
    given = [str(tmp_path / "a.mp4"), "--model", str(tmp_path / "m.safetensors"), "--outputs", "pooled,tokens"]
    with pytest.raises(SystemExit) as stop:
        encode(given)
    assert stop.value.code == 2
    assert "--outputs must be tokens with this model, got pooled" in capsys.readouterr().err


def test_a_folder_says_what_it_leaves_out(tmp_path):
    for name in ("a.MP4", "b.asf", "c.m2ts", "in/d.gif", "notes.txt", "in/e.jpg", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    videos, said = find([tmp_path])
    assert [Path(v).name for v in videos] == ["a.MP4", "b.asf", "c.m2ts", "d.gif"]
    assert "left out 3 files" in said and "1 .txt" in said and "1 without suffix" in said and "e.jpg" in said
    assert find([tmp_path / "a.MP4"])[1] == ""


def test_usable():
    assert usable("cpu") == torch.device("cpu")
    for name in ("foo", "meta", "", "cuda:x"):
        with pytest.raises(ValueError, match="must be cpu, cuda"):
            usable(name)


def test_ends(capsys):
    def raising(error):
        def command():
            raise error

        return arguments.ended("pyvidx x", command)

    assert raising(KeyboardInterrupt()) == 130 and capsys.readouterr().err == "pyvidx x: interrupted\n"
    assert raising(OSError(28, "No space left on device")) == 1
    assert capsys.readouterr().err == "pyvidx x: OSError: [Errno 28] No space left on device\n"
    assert arguments.ended("x", lambda: None) == 0 and arguments.ended("x", lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):  # a fault of ours is shown as one
        raising(ZeroDivisionError())


def test_what_is_asked_first(capsys, monkeypatch):
    """pyvidx, pyvidx --help, --version and a command that there is not."""
    said = {}
    for given in ([], ["--help"], ["--version"], ["encod"]):
        monkeypatch.setattr(sys, "argv", ["pyvidx", *given])
        said[" ".join(given)] = pyvidx(), *capsys.readouterr()
    code, out, _ = said["--help"]
    assert code == 0 and said[""] == said["--help"] and all(f"  {name} " in out for name in COMMANDS)
    assert said["--version"][0] == 0 and said["--version"][1].strip()
    assert said["encod"][0] == 2 and "COMMAND must be one of encode, " in said["encod"][2]


def test_types():
    for convert, bad in ((arguments.count, "1e3"), (arguments.amount, "0.5"), (arguments.existing, "/")):
        with pytest.raises(argparse.ArgumentTypeError):
            convert(bad)
    assert arguments.count("3") == 3 and arguments.amount("2.5e6") == 2.5e6 and arguments.seconds("0") == 0.0


def run(*given, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-m", "pyvidx", *given], stderr=subprocess.PIPE, text=True,
                            env=environment, **options)  # fmt: skip


def test_a_reader_that_went_away():
    """`pyvidx info | head -1`"""
    process = run("info", stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == arguments.PIPE_CLOSED


def test_ctrl_c_leaves_one_line_and_no_file(tmp_path):
    pipe = tmp_path / "t.csv"  # a reader of it waits for ever
    os.mkfifo(pipe)
    process = run("eval", "rows", "--task", "coin", "--format", "msrvtt_csv", "--annotations", str(pipe), "--out",
                  str(tmp_path / "rows.jsonl"),
                  # a job in the background ignores it
                  preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    writer = os.open(pipe, os.O_WRONLY)  # returns when the command has opened it
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    os.close(writer)
    assert process.stderr.read() == "pyvidx eval: interrupted\n"
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def parsers(parser: arguments.Parser):
    """A parser, or those of its commands."""
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [p for action in inner for p in action.choices.values()] if inner else [parser]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole = importlib.import_module(f"pyvidx.cli.{command}").parser()
    assert whole.prog == f"pyvidx {command.replace('_', ' ')}"
    for parser in parsers(whole):
        words = shlex.split(parser.example)
        assert " ".join(words).startswith(parser.prog + " "), "the name that users type"
        whole.parse_args(given_here(words[len(whole.prog.split()) :], tmp_path))
        with pytest.raises(SystemExit) as stop:
            whole.parse_args([*words[len(whole.prog.split()) : len(parser.prog.split())], "--help"])
        assert stop.value.code == 0 and capsys.readouterr().out.rstrip().endswith(parser.example)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is(command):
    """Choices and switches say it by their names; the rest has a help."""
    for parser in parsers(importlib.import_module(f"pyvidx.cli.{command}").parser()):
        for action in parser._actions:
            assert action.help, f"{parser.prog}: {action.dest}"


def test_the_table_of_commands():
    """One table, and a module of cli for each of its rows."""
    folder = Path(arguments.__file__).parent
    with_main = {p.stem for p in folder.glob("*.py") if "\ndef main(" in p.read_text()}
    assert {*COMMANDS} <= with_main
    script = (folder.parents[1] / "pyproject.toml").read_text()
    assert 'pyvidx = "pyvidx.__main__:main"' in script
