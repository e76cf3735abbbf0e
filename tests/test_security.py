"""No network, no pickle, no code from files: what would use them fails here, or writes a mark that must not appear."""

import ast
import os
import pickle
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pyvidx import memory
from pyvidx.cli.encode import main as encode
from pyvidx.cli.eval import main as evaluate
from pyvidx.corpus import embeddings
from pyvidx.data.captions import shards
from pyvidx.eval.annotations import parse
from pyvidx.eval.files import Named, read_tensors
from pyvidx.eval.judge import ChatJudge, Request
from pyvidx.hosts.importing import LOCAL
from pyvidx.hosts.open import open_model
from pyvidx.models import MALMM, BTAdapter, TextVideo, VideoEncoder
from pyvidx.train import checkpoint
from pyvidx.video import read, stream, write
from pyvidx.weights.bt_adapter import load_official
from pyvidx.weights.malmm import load_malmm
from pyvidx.weights.projector import load_projector
from pyvidx.weights.state import read as read_weights
from tests.drawn import drawn_clip

ROOT = Path(__file__).parents[1]


@pytest.fixture
def no_network(monkeypatch):
    """Every way out of this machine raises, and is noted. Worker processes are joined by Unix sockets."""
    asked = []
    connect = socket.socket.connect

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("the network was asked")

    def local_alone(self, address):
        return connect(self, address) if self.family == socket.AF_UNIX else refuse(address)

    monkeypatch.setattr(socket.socket, "connect", local_alone)
    monkeypatch.setattr(socket.socket, "connect_ex", local_alone)
    monkeypatch.setattr(socket.socket, "sendto", refuse)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    return asked


def test_no_network(no_network, tmp_path, monkeypatch, capsys):
    """Reading, encoding, loading and evaluating; a name that is no folder is not looked up."""
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    write("a.mp4", drawn_clip(0.2, (32, 48)), fps=10)
    assert len(read("a.mp4", frames=2)) == 2 and sum(map(len, stream("a.mp4"))) == 15
    for model in (TextVideo.default().model, MALMM.default(), VideoEncoder.default("mean")):
        model.save(tmp_path / "saved")
        type(model).from_pretrained(tmp_path / "saved")
    TextVideo.default()
    assert encode(["a.mp4", "--frames", "2", "--out", "e.npz"]) == 0
    embeddings.load("e.npz")
    save_file({"text": torch.eye(3), "video": torch.eye(3)}, "s.safetensors")
    assert evaluate(["retrieval", "s.safetensors", "--json", "out.json"]) == 0
    for load in (BTAdapter.from_pretrained, MALMM.from_pretrained, open_model, load_official):
        with pytest.raises((FileNotFoundError, ValueError)):
            load("openai/clip-vit-base-patch16")
    for source in ("https://localhost/a.mp4", "http://localhost/a.mp4", "rtsp://localhost/a", "tcp://localhost:9"):
        with pytest.raises((FileNotFoundError, ValueError)):
            read(source, frames=1)
    assert not no_network


def test_the_judge_alone_uses_it_when_told_a_url(no_network):
    with pytest.raises(RuntimeError, match="gave no reply"):
        ChatJudge("http://localhost:9/v1", "m")(Request("1", []))
    assert no_network


class Writes:
    """A pickle of it writes a mark when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.write_text, (self.mark, "code ran")


def test_no_pickle_runs(tmp_path):
    mark = tmp_path / "mark"
    evil = {"state_dict": {"weight": Writes(mark)}, "weight": torch.zeros(2, 2)}
    pickle.loads(pickle.dumps(Writes(mark)))
    assert mark.read_text() == "code ran"  # the trap works
    mark.unlink()
    files = {}
    for suffix in (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".npz", ".parquet", ".tar", ".json", ".csv"):
        for kind in ("plain", "torch"):
            path = files[suffix, kind] = tmp_path / f"{kind}{suffix}"
            if kind == "torch":
                torch.save(evil, path)
            else:
                path.write_bytes(pickle.dumps(evil))
    folder = tmp_path / "sharded"
    folder.mkdir()
    torch.save(evil, folder / "pytorch_model.bin")
    np.savez(tmp_path / "objects.npz", about=np.array([Writes(mark)], dtype=object), seconds=np.zeros((1, 1)))
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:  # as torch.jit.save lays it out
        archive.writestr("script/data.pkl", pickle.dumps(Writes(mark)))
        archive.writestr("script/constants.pkl", pickle.dumps(Writes(mark)))
        archive.writestr("script/code/__torch__.py", f"open({str(mark)!r}, 'w')")
        archive.writestr("script/version", "3")
    readers = [read_weights, open_model, load_official, load_malmm, load_projector, BTAdapter.from_pretrained,
               MALMM.from_pretrained, VideoEncoder.from_pretrained, TextVideo.load, memory.load, embeddings.load,
               lambda p: read_tensors(p, {"text": 2}), lambda p: shards(str(p)),
               lambda p: parse("msvd", p), lambda p: parse("msrvtt_csv", p)]  # fmt: skip
    for path in [*files.values(), folder, tmp_path / "objects.npz", tmp_path / "script.pt"]:
        for reader in readers:
            try:
                reader(path)
            except (FileNotFoundError, ValueError, IsADirectoryError):
                pass
            assert not mark.exists(), f"{reader} ran code of {path.name}"


def test_no_checkpoint_runs_code(tmp_path):
    mark = tmp_path / "mark"
    torch.save({"step": 1, "model": Writes(mark)}, tmp_path / "checkpoint.pt")
    with pytest.raises(pickle.UnpicklingError, match="[Ww]eights.only"):
        checkpoint._content(tmp_path / "checkpoint.pt")
    assert not mark.exists()


def test_annotated_names_are_searched_for_below_the_root_alone(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("out.mp4", "in/a.mp4"):
        (tmp_path / name).write_bytes(b"v")
    files = Named.under(tmp_path / "in")
    assert files.find("a") == str(tmp_path / "in/a.mp4")
    for name in ("../out.mp4", "../out", str(tmp_path / "out.mp4"), "/etc/passwd", "../../../etc/passwd", "", ".."):
        assert files.find(name) is None


def calls():
    """(file:line, name of what is called, keywords) of the package."""
    for path in sorted((ROOT / "pyvidx").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), ast.unparse(node)


def test_no_call_could_run_code_or_download():
    """torch.load and np.load are told to; transformers' doors are local; nothing compiles or unpickles."""
    wrong = []
    for where, name, text in calls():
        last = name.rsplit(".", 1)[-1]
        if name == "torch.load" and "weights_only=True" not in text:
            wrong.append((where, text))
        if name == "np.load" and "allow_pickle=False" not in text:
            wrong.append((where, text))
        if name in ("eval", "exec", "compile", "os.system", "os.popen", "torch.jit.load", "torch.hub.load"):
            wrong.append((where, text))
        if last == "from_pretrained" and ("CLIP" in name or "Auto" in name) and "LOCAL" not in text:
            wrong.append((where, text))
    assert not wrong
    assert LOCAL == {"local_files_only": True, "trust_remote_code": False}


# What may, and why.
MAY = {
    "urllib": {"pyvidx/eval/judge.py"},  # the judge, when told a URL
    "pickle": {
        "pyvidx/corpus/engines/ray.py",
        "pyvidx/video/pool.py",
        "pyvidx/video/worker.py",
        "pyvidx/weights/torchscript.py",
        "pyvidx/train/checkpoint.py",
    },  # the name of an error
    "huggingface_hub": {"pyvidx/hosts/llava/tower.py"},  # the decorator of transformers' configurations, no more
    "socket": {"pyvidx/files.py", "pyvidx/video/worker.py", "pyvidx/video/process.py"},  # a host's name; own processes
}


def test_who_may_import_what():
    """pickle: between a process and its own workers, and an Unpickler that finds no class but those it names."""
    found = {}
    for path in sorted((ROOT / "pyvidx").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                found.setdefault(name.split(".")[0], set()).add(str(path.relative_to(ROOT)))
    for name, files in MAY.items():
        assert found.get(name, set()) <= files, (name, found[name] - files)
    for name in (
        "requests",
        "http",
        "ftplib",
        "ssl",
        "aiohttp",
        "httpx",
        "marshal",
        "shelve",
        "dill",
    ):
        assert name not in found, (name, found.get(name))


def test_file_names_do_not_reach_a_shell(tmp_path, monkeypatch, capsys):
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    name = "$(touch mark);`touch mark`.mp4"
    write("a.mp4", drawn_clip(0.2, (32, 48)), fps=10)
    os.rename("a.mp4", name)
    assert encode([name, "--frames", "2", "--out", "e.safetensors"]) == 0
    assert embeddings.load("e.safetensors")[0][0].path == name and not Path("mark").exists()
