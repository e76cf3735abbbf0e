"""The engine that runs on Ray Data: the rows of the local one, whatever breaks or is killed on the way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pyvidx import corpus
from pyvidx.cli.encode import main as encode
from pyvidx.corpus import engines
from pyvidx.corpus.engines import Job
from pyvidx.corpus.engines import ray as engine
from pyvidx.corpus.folder import parts
from pyvidx.video import read, write
from tests.drawn import drawn_clip

pytest.importorskip("av", reason="reading video needs PyAV: pip install 'pyvidx[video]'")
pytest.importorskip("pyarrow")
ROOT = Path(__file__).parents[1]
COMMAND = "import sys; from pyvidx.__main__ import main; sys.exit(main())"


@pytest.mark.parametrize("name", [b"a.mp4", b"caf\xe9 \xff.mp4", b"none.mp4"])
def test_what_its_tasks_hand_on(name, tmp_path):
    """Without Ray: frames and errors as bytes, in any shape and under any name."""
    if name != b"none.mp4":
        write(tmp_path / "a.mp4", drawn_clip(0.2, (48, 64)), fps=25)
        os.rename(tmp_path / "a.mp4", os.fsencode(tmp_path) + b"/" + name)
    path = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
    row = engine._decode({"path": name}, Job(frames=3), str(tmp_path))
    found = engine._decoded(row["frames"], row["rest"])
    assert found.source == os.fsdecode(name) and (found.error is None) == (name != b"none.mp4")
    if found.clip is not None:
        want = read(path, frames=3)
        assert torch.equal(found.clip.frames, want.frames) and torch.equal(found.clip.seconds, want.seconds)


def test_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(RuntimeError, match=r"pip install 'pyvidx\[ray\]'"):
        engines.named("ray")


@pytest.mark.slow
def test_one_broken_file_and_one_kill_in_the_middle(tmp_path):
    pytest.importorskip("ray.data", reason="needs Ray Data: pip install 'pyvidx[ray]'")
    videos, out = tmp_path / "videos", tmp_path / "ray"
    videos.mkdir()
    write(videos / "000.mp4", drawn_clip(0.3, (48, 64)), fps=25)
    for i in range(1, 200):
        os.link(videos / "000.mp4", videos / f"{i:03d}.mp4")
    (videos / "007.mp4").unlink()
    (videos / "007.mp4").write_bytes(b"no video" * 100)
    os.rename(videos / "008.mp4", os.fsencode(videos) + b"/caf\xe9.mp4")
    words = [str(videos), "--frames", "2", "--batch", "4", "--part-rows", "8"]
    command = [sys.executable, "-c", COMMAND, "encode", *words, "--out", str(out), "--engine", "ray", "--resume"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    while child.poll() is None and not (out.is_dir() and len(parts(out)) > 1):
        time.sleep(0.01)
    child.kill()
    assert child.wait() == -signal.SIGKILL, "it was still at work"
    have = sum(1 for _ in corpus.iterate(out))
    assert 0 < have < 200
    assert subprocess.run(command, env=environment, timeout=300).returncode in (0, 1)
    assert encode([*words, "--out", str(tmp_path / "local")]) == 1
    found, want = corpus.read(out), corpus.read(tmp_path / "local")
    assert sorted(found.paths) == sorted(want.paths) and len(found.paths) == 199
    assert found.errors == want.errors and list(found.errors) == [str(videos / "007.mp4")]
    torch.testing.assert_close(found.pooled, want.pooled[[want.paths.index(p) for p in found.paths]])
    assert sum(1 for _ in corpus.iterate(out)) == 200
