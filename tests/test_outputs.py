"""What is written is there whole or not at all, whatever the names, however full the disk; and read back as it was."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pyvidx.cli.encode import main as encode
from pyvidx.corpus import embeddings
from pyvidx.corpus.encode import Encoded
from pyvidx.eval.files import Named
from pyvidx.models import Encoding
from pyvidx.video import Damage, write
from tests.drawn import drawn_clip

pytest.importorskip("pyarrow")
ROOT = Path(__file__).parents[1]
SUFFIXES = [suffix[1:] for suffix in embeddings.FORMATS]
RAW = os.fsdecode(b"caf\xe9 \xff.mp4")  # no UTF-8

# Calls that write a file. A log grows by lines, which its readers take one by one.
WRITERS = {"write_text", "write_bytes", "savefig", "save_file", "savez", "savez_compressed", "write_table", "to_csv"}
APART = {
    "pyvidx/bench/cubin.py": "what a disassembler reads, in a temporary folder",
    "pyvidx/files.py": "it is the place itself",
    "pyvidx/eval/files.py": "open_to_append: a log",
    "pyvidx/train/curve.py": "a log",
    "pyvidx/video/worker.py": "memory and /proc, no files",
    "bench/conftest.py": "a log",
    "bench/gpu_check.py": "stands alone: it runs before pyvidx is built",
}


def writes(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    of = getattr(getattr(call.func, "value", None), "id", "")
    if name in WRITERS or (name == "save" and of in ("torch", "np")):
        return True
    texts = [a.value for a in [*call.args, *(k.value for k in call.keywords)] if isinstance(a, ast.Constant)]
    return name == "open" and any(
        isinstance(t, str) and set(t) <= set("rwaxbt+") and set(t) & set("wax") for t in texts
    )


def test_every_writer_is_inside_whole():
    """A file that is written in place is half a file after a kill or on a full disk."""
    bare = []
    for path in sorted([*ROOT.glob("pyvidx/**/*.py"), *ROOT.glob("bench/**/*.py")]):
        name = path.relative_to(ROOT).as_posix()
        if name in APART:
            continue
        tree = ast.parse(path.read_text())
        within = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.With) and any(_is_whole(item.context_expr) for item in node.items):
                within |= {id(inner) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and writes(node) and id(node) not in within and not _of_files(node):
                bare.append(f"{name}:{node.lineno}")
    assert not bare, f"written in place, not with pyvidx.files: {bare}"


def _is_whole(node: ast.expr) -> bool:
    name = getattr(node, "func", node)
    return getattr(name, "attr", getattr(name, "id", "")) in ("whole", "written")


def _of_files(call: ast.Call) -> bool:
    """pyvidx.files.write_text(path, text), not path.write_text(text)."""
    return isinstance(call.func, ast.Name) and call.func.id == "write_text"


FULL = """
import os, resource, signal, sys
import torch
from pathlib import Path
from pyvidx import memory
from pyvidx.corpus import embeddings
from pyvidx.bench.report import plot as bench_plot
from pyvidx.data.captions import shards
from pyvidx.corpus.encode import Encoded
from pyvidx.eval import report
from pyvidx.eval.annotations import Sample, write_rows
from pyvidx.files import write_json
from pyvidx.models import Encoding, flops
from pyvidx.video import write

folder = Path(sys.argv[1])
one = Encoding(torch.randn(1, 40, 64), torch.randn(1, 64), torch.zeros(1, 8))
results = [Encoded(f"{i}.mp4", one, torch.zeros(8, dtype=torch.float64)) for i in range(9)]
policy = memory.create("merge", capacity=8)
bank = policy.push(policy.new(1, 64, 256), torch.randn(1, 64, 256), torch.zeros(1))
cost = flops.Cost(*["x" if t in (str, "str") else 2 for t in flops.Cost.__annotations__.values()])
case = {"op": "o", "shape": {"T": 8}, "dtype": "float32", "ms": 1.0, "bytes": 4, "spread": 0.1, "gbps": 1.0,
        "copy_gbps": 1.0, "floor_share": 0.5, "vs_eager": 2.0, "device": "cpu", "threads": 1, "torch": "2"}
noise = torch.randint(0, 256, (20, 64, 64, 3), dtype=torch.uint8)
rows = [Sample(str(i), str(i), answer="a" * 99) for i in range(99)]
writers = {
    "e.safetensors": lambda p: embeddings.save(p, results, {}),
    "e.npz": lambda p: embeddings.save(p, results, {}),
    "e.parquet": lambda p: embeddings.save(p, results, {}),
    "bank.safetensors": lambda p: memory.save(p, policy, bank),
    "bank.png": lambda p: memory.plot(bank, p),
    "costs.png": lambda p: flops.plot([cost], p),
    "bench.png": lambda p: bench_plot([case], p),
    "report.png": lambda p: report.plot(p, {"a": {"R@1": 3.0}}),
    "report.json": lambda p: report.write_json(p, {"a" * 9999: {"R@1": 3.0}}),
    "rows.jsonl": lambda p: write_rows(p, rows, lambda q: "what"),
    "index.safetensors": lambda p: shards(str(folder / "s.tar"), p),
    "clip.mp4": lambda p: write(p, noise),
}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
for name, writer in writers.items():
    for path in (folder / name, folder / "new" / name):
        try:
            writer(path)
        except OSError as error:
            print(name, "OSError")
        except Exception as error:
            print(name, type(error).__mro__, error)
        else:
            print(name, "was written")
"""


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """Each writer, where the file system takes 4 KiB: an OSError, the old file, no part of a new one."""
    import io
    import tarfile

    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for i in range(40):
            for name, content in ((f"{i}.mp4", b"v"), (f"{i}.txt", b"text" * 99)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    kept = {}
    names = ["e.safetensors", "e.npz", "e.parquet", "bank.safetensors", "bank.png", "costs.png", "bench.png",
             "report.png", "report.json", "rows.jsonl", "index.safetensors", "clip.mp4"]  # fmt: skip
    for name in names:
        kept[name] = b"" if name.startswith("index") else b"old " + name.encode()
        (tmp_path / name).write_bytes(kept[name])
    child = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], text=True, capture_output=True, timeout=300,
                           env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines() == [f"{name} OSError" for name in names for _ in range(2)], child.stdout
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name in kept} == kept
    assert not list((tmp_path / "new").iterdir())
    assert not [p.name for p in tmp_path.iterdir() if ".part" in p.name]


def encoded(path, frames=3, error=None, damaged=None):
    if error:
        return Encoded(path, error=error)
    seconds = torch.arange(frames, dtype=torch.float64) / 3
    encoding = Encoding(torch.randn(1, 5, 8), torch.randn(1, 6), seconds[None])
    return Encoded(path, encoding, seconds, damaged=damaged or Damage())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_names_of_any_bytes_and_names_given_twice(suffix, tmp_path):
    cut = Damage(cut=True, reason="its end is missing", frame=2, second=0.5)
    given = [encoded("a.mp4"), encoded(RAW, 2, damaged=cut), encoded("no.mp4", error="RuntimeError: a\nb"),
             encoded("a.mp4"), encoded("no.mp4", error="RuntimeError: a\nb"),
             encoded(RAW, error="ValueError: x")]  # fmt: skip
    path = tmp_path / (os.fsdecode(b"out \xe9.") + suffix)
    embeddings.save(path, given, {"frames": "3", "name": RAW})
    found, about = embeddings.load(path)
    assert about == {"frames": "3", "name": RAW}
    done = [r for r in given if r.error is None] + [r for r in given if r.error is not None]
    assert [r.path for r in found] == [r.path for r in done] and os.fsencode(found[1].path) == b"caf\xe9 \xff.mp4"
    assert [r.damaged for r in found] == [r.damaged for r in done] and bool(found[1].damaged)
    assert [(r.error or "")[:8] for r in found] == [(r.error or "")[:8] for r in done]
    for mine, theirs in zip(done[:3], found):
        assert torch.equal(mine.encoding.pooled, theirs.encoding.pooled)
        assert torch.equal(mine.encoding.tokens, theirs.encoding.tokens)
        assert torch.equal(mine.seconds, theirs.seconds) and torch.equal(mine.encoding.times, theirs.encoding.times)
    assert Named(r.path for r in found if r.error is None).find("a") == "a.mp4"


def test_encode_of_names_of_any_bytes(tmp_path, capsys, monkeypatch):
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    write("in/a.mp4", drawn_clip(0.2, (32, 48)), fps=10)
    os.rename(b"in/a.mp4", b"in/caf\xe9 \xff.mp4")
    Path("in", os.fsdecode(b"\xfe\n.mp4")).write_bytes(b"no video")
    for suffix in SUFFIXES:
        out = os.fsdecode(b"\xfd.") + suffix
        assert encode(["in", f"in/{RAW}", "--frames", "2", "--outputs", "pooled", "--out", out]) == 1
        said = capsys.readouterr()
        assert r"FAILED in/\udcfe\n.mp4" in said.err and rf"wrote \udcfd.{suffix}" in said.out
        found, _ = embeddings.load(out)
        assert [os.fsencode(r.path) for r in found] == [b"in/caf\xe9 \xff.mp4"] * 2 + [b"in/\xfe\n.mp4"]


def test_embeddings_that_are_not_finite_are_not_saved(tmp_path):
    bad = encoded("a.mp4")
    bad = replace(bad, encoding=replace(bad.encoding, pooled=bad.encoding.pooled * float("nan")))
    with pytest.raises(ValueError, match="must be finite, got NaN or Inf of a.mp4"):
        embeddings.save(tmp_path / "e.npz", [bad], {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_files_are_one_error(suffix, tmp_path):
    """Cut and flipped everywhere: what `load` gives is finite and of one shape, or it is a ValueError with the path."""
    path = tmp_path / f"e.{suffix}"
    embeddings.save(path, [encoded("a.mp4"), encoded("b.mp4", 2), encoded("c.mp4", error="x")], {"frames": "3"})
    whole, draws, errors = path.read_bytes(), np.random.default_rng(0), 0
    for n in range(120):
        if n < 40:
            content = whole[: len(whole) * n // 40]
        else:
            content = bytearray(whole)
            for at in draws.integers(0, len(whole), 1 + n % 4):
                content[at] = draws.integers(0, 256)
        path.write_bytes(content)
        try:
            results, about = embeddings.load(path)
        except ValueError as error:
            errors += 1
            assert str(error).startswith(f"embeddings: {path} must be written by pyvidx encode, got ")
            assert "\n" not in str(error)
        else:
            assert isinstance(about, dict)
            done = [r for r in results if r.error is None]
            assert all(r.encoding.pooled.isfinite().all() and r.seconds.isfinite().all() for r in done)
    assert errors >= 40
    with pytest.raises(FileNotFoundError, match="there is no"):
        embeddings.load(tmp_path / f"no.{suffix}")


@pytest.mark.parametrize("change", [
    {"pooled": torch.zeros(1, 6)}, {"pooled": torch.zeros(2)}, {"pooled": torch.zeros(2, 6, dtype=torch.int64)},
    {"pooled": torch.full((2, 6), float("inf"))}, {"seconds": torch.zeros(2, 3)},
    {"seconds": torch.zeros(3, 3).double()},
    {"seconds": torch.tensor([[float("nan"), 1.0]] * 2, dtype=torch.float64)},
])  # fmt: skip
def test_tensors_that_no_model_gave(change, tmp_path):
    from safetensors import safe_open

    path = tmp_path / "e.safetensors"
    embeddings.save(path, [encoded("a.mp4"), encoded("b.mp4")], {})
    with safe_open(path, "pt") as file:
        note = file.metadata()
    save_file({**load_file(path), **change}, path, note)
    with pytest.raises(ValueError, match="must be written by pyvidx encode, got"):
        embeddings.load(path)


def test_notes_that_no_one_wrote(tmp_path):
    path = tmp_path / "e.safetensors"
    embeddings.save(path, [encoded("a.mp4")], {})
    arrays = load_file(path)
    good = {"paths": ["a.mp4"], "failed": [], "errors": {}, "damaged": {}, "about": {}}
    save_file(arrays, path, {"pyvidx": json.dumps(good)})
    assert embeddings.load(path)[0][0].path == "a.mp4"
    for change in ({"paths": [3]}, {"paths": None}, {"paths": ["a", "b"]}, {"failed": ["x"]},
                   {"errors": 4, "failed": [1]}, {"about": []}, {"damaged": 3}):  # fmt: skip
        save_file(arrays, path, {"pyvidx": json.dumps(good | change)})
        with pytest.raises(ValueError, match="must be written by pyvidx encode"):
            embeddings.load(path)
    for text in ("[", "[" * 100_000, "3"):
        save_file(arrays, path, {"pyvidx": text})
        with pytest.raises(ValueError, match="must be written by pyvidx encode"):
            embeddings.load(path)
