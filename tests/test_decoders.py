"""Decoding in other processes: what dies there is one file's error, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from pyvidx.preprocess import PRESETS
from pyvidx.train.data import Take, generator
from pyvidx.video import Clip, Decoders, read, write
from pyvidx.video.pool import shared
from tests import decoding
from tests.drawn import drawn_clip

pytest.importorskip("av", reason="reading video needs PyAV: pip install 'pyvidx[video]'")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes in /proc")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """v.mp4 of 45 frames and long.mp4 of 60."""
    folder = tmp_path_factory.mktemp("videos")
    write(folder / "v.mp4", drawn_clip(0.6, (64, 96)), fps=25)
    write(folder / "long.mp4", drawn_clip(0.8, (64, 96)), fps=25)
    return folder


@pytest.fixture(scope="module")
def decoders():
    with Decoders(2, timeout=60) as found:
        yield found


def same(a: Clip, b: Clip) -> bool:
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("frames", "seconds", "indices"))
    return tensors and (a.fps, a.path, a.damaged) == (b.fps, b.path, b.damaged)


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone(process: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while alive(process) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(process)


def worker_of(decoders: Decoders, path: Path) -> int:
    """Process id of the worker that reads next."""
    with pytest.raises(ValueError) as error:
        decoders.read(path, sampler=decoding.process_id)
    return int(str(error.value))


def test_the_clip_is_that_of_read(folder, decoders):
    path = folder / "v.mp4"
    for source in (path, str(path), path.read_bytes()):
        assert same(decoders.read(source, 5, "linspace", start=0.1), read(source, 5, "linspace", start=0.1))
    frames = decoders.read(path).frames
    frames += 1  # it is an ordinary tensor
    assert torch.equal(frames, read(path).frames + 1)


def test_a_relative_path_is_the_callers(folder, decoders, monkeypatch):
    for where in (folder, folder.parent):
        monkeypatch.chdir(where)
        name = os.path.relpath(folder / "v.mp4")
        assert same(decoders.read(name), read(name))


def test_a_generator_goes_on_as_in_read(folder, decoders):
    one, other = generator(1), generator(1)
    for _ in range(2):
        a = decoders.read(folder / "v.mp4", 4, "random_segment", generator=one)
        assert same(a, read(folder / "v.mp4", 4, "random_segment", generator=other))
        assert torch.equal(one.get_state(), other.get_state())


def test_warnings_come_each_time(folder, decoders):
    for _ in range(2):
        with pytest.warns(UserWarning, match="the file is odd"):
            decoders.read(folder / "v.mp4", sampler=decoding.warn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = decoders.map([folder / "v.mp4"], sampler=decoding.warn)
    assert isinstance(found.error, UserWarning), "as where read itself warns"


def test_errors_keep_their_type_and_text(folder, decoders):
    for path, options in (
        (folder / "none.mp4", {}),
        (folder / "v.mp4", {"start": 99}),
        (folder / "v.mp4", {"sampler": "nearest"}),
        (__file__, {}),
    ):
        with pytest.raises(Exception) as here:
            read(path, **options)
        with pytest.raises(here.type) as there:
            decoders.read(path, **options)
        assert str(there.value) == str(here.value) and there.type is here.type
    with pytest.raises(RuntimeError, match="Unpicklable: this and that"):
        decoders.read(folder / "v.mp4", sampler=decoding.unpicklable)


def test_arguments_that_cannot_be_sent(folder, decoders):
    path = folder / "v.mp4"
    with pytest.raises(ValueError, match="a sampler must be a name, or a function of a module"):
        decoders.read(path, sampler=lambda *_: torch.tensor([0]))
    with pytest.raises(ValueError, match="path or bytes, got BufferedReader"), path.open("rb") as file:
        decoders.read(file)
    with pytest.raises(ValueError, match="without a generator"):
        decoders.map([path], generator=torch.Generator())
    for wrong in ({"workers": 0}, {"timeout": 0}, {"memory": 0}):
        with pytest.raises(ValueError, match="workers must be at least 1, timeout and memory above 0"):
            Decoders(**wrong)
    for wrong in ({"workers": 0}, {"ahead": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            decoders.map([path], **wrong)


def test_a_function_of_the_script_is_an_error_that_says_so(folder, decoders, monkeypatch):
    """What pickle finds here and not there."""
    monkeypatch.setattr(decoding, "only_here", lambda *_: None, raising=False)
    decoding.only_here.__module__, decoding.only_here.__qualname__ = decoding.__name__, "only_here"
    with pytest.raises(ValueError, match="one of the script that is run is not"):
        decoders.read(folder / "v.mp4", sampler=decoding.only_here)


@pytest.mark.parametrize("sampler, said", [
    (decoding.abort, "SIGABRT; its last words: terminate called .*; what.*std::bad_alloc"),
    (decoding.killed, "SIGKILL, most likely because memory ran out"),
    (decoding.leave, "exit code 3"),
])  # fmt: skip
def test_a_death_is_that_files_error(folder, decoders, sampler, said, capfd):
    path = folder / "v.mp4"
    with pytest.raises(RuntimeError, match=f"read: {path}: its decoding process ended .*{said}"):
        decoders.read(path, sampler=sampler)
    assert same(decoders.read(path), read(path))
    assert capfd.readouterr() == ("", "")


def test_a_hang_is_that_files_error(folder):
    with Decoders(timeout=1) as decoders:
        process = worker_of(decoders, folder / "v.mp4")
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="v.mp4: it takes longer than 1 s"):
            decoders.read(folder / "v.mp4", sampler=decoding.hang)
        assert time.monotonic() - began < 10 and gone(process)
        assert len(decoders.read(folder / "v.mp4")) == 8


def test_memory_is_bounded(folder):
    with Decoders(memory=1 << 30) as decoders:
        for sampler in (decoding.greedy, decoding.hoard):
            with pytest.raises(RuntimeError, match="needs more memory than there is|can't allocate memory"):
                decoders.read(folder / "v.mp4", sampler=sampler)
        assert len(decoders.read(folder / "v.mp4")) == 8


def test_killers_among_many_files_cost_no_other(folder, decoders):
    names = ["long.mp4" if i in (0, 7, 8, 19) else "none.mp4" if i == 4 else "v.mp4" for i in range(20)]
    paths, want = [folder / name for name in names], read(folder / "v.mp4")
    found = list(decoders.map(paths, sampler=decoding.abort_if_long, ahead=5))
    assert [source for source, *_ in found] == paths
    for source, clip, error, _ in found:
        if source.name == "v.mp4":
            assert error is None and same(clip, want)
        else:
            assert clip is None and str(source) in str(error)
            assert type(error) is (RuntimeError if source.name == "long.mp4" else FileNotFoundError)


def test_reading_ahead_is_bounded(folder, decoders):
    taken = []
    clips = decoders.map((taken.append(1) or folder / "v.mp4" for _ in range(9)), ahead=3)
    next(clips)
    assert len(taken) == 3
    clips.close()


def test_without_an_order_no_file_waits_for_a_slow_one(folder):
    with Decoders(2) as decoders:
        paths = [folder / "long.mp4", folder / "v.mp4", folder / "v.mp4"]
        clips = decoders.map(paths, sampler=decoding.hang_if_long, ahead=2, ordered=False)
        assert [next(clips).source.name for _ in range(2)] == ["v.mp4", "v.mp4"]
        clips.close()


def test_an_end_waits_for_no_file(folder):
    with Decoders(2) as decoders:
        processes = [worker.process.pid for worker in decoders._idle]
        clips = decoders.map([folder / "v.mp4", folder / "long.mp4"], sampler=decoding.hang_if_long, ahead=2)
        assert len(next(clips).clip) == 8 and all(map(alive, processes))
        clips.close()
    assert all(map(gone, processes))


def test_one_that_was_killed_while_idle_is_no_files_error(folder):
    with Decoders() as decoders:
        os.kill(worker_of(decoders, folder / "v.mp4"), signal.SIGKILL)
        assert len(decoders.read(folder / "v.mp4")) == 8
    with pytest.raises(RuntimeError, match="it is closed"):
        decoders.read(folder / "v.mp4")


def test_a_process_that_cannot_start_says_why(folder, monkeypatch):
    monkeypatch.setattr("pyvidx.video.process._CODE", "import no_such_module")
    with Decoders() as decoders, pytest.raises(RuntimeError, match="no decoding process starts.*no_such_module"):
        decoders.read(folder / "v.mp4")
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with Decoders() as decoders, pytest.raises(RuntimeError, match="no decoding process can be started: .*python"):
        decoders.read(folder / "v.mp4")


def test_threads_read_at_once(folder, decoders):
    want, found = read(folder / "v.mp4"), []
    threads = [threading.Thread(target=lambda: found.append(decoders.read(folder / "v.mp4"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(same(clip, want) for clip in found)


def test_nothing_is_left_after_many_files(folder, decoders):
    def state():
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return len(os.listdir("/proc/self/fd")), resident / 2**20

    sources = [folder / name for name in ("v.mp4", "none.mp4")] * 100  # 270 KB of frames each
    for _ in decoders.map(sources, 15):
        pass
    before = state()
    for _ in decoders.map(sources, 15):
        pass
    after = state()
    assert after[0] < before[0] + 10 and after[1] - before[1] < 10, f"{before} and then {after} descriptors and MiB"


SCRIPT = """
import sys, time
from pyvidx.video import Decoders
from tests import decoding
from tests.test_decoders import worker_of
decoders = Decoders()
print(worker_of(decoders, sys.argv[1]), flush=True)
decoders.read(sys.argv[1], sampler=decoding.hang)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_parent(folder, number):
    """While it decodes, and whatever ends the parent. The script is not guarded by __name__."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(folder / "v.mp4")]
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a job in the background ignores it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=environment, **heard) as run:
        worker = int(run.stdout.readline())
        assert alive(worker)
        run.send_signal(number)
        run.wait(20)
        assert gone(worker)


def test_a_fork_gets_workers_of_its_own(folder):
    decoders, path = shared(), folder / "v.mp4"
    ours = worker_of(decoders, path)
    if (child := os.fork()) == 0:
        try:
            theirs = worker_of(decoders, path)
            fine = theirs != ours and shared() is not decoders
            decoders.close()
        finally:
            os._exit(0 if fine else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert worker_of(decoders, path) == ours


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_the_workers_of_a_loader(folder, method):
    """They are daemons, which multiprocessing forbids children. A killer costs its row."""
    take = Take(4, decoding.abort_if_long, PRESETS["clip"])
    want = take(folder / "v.mp4")
    loader = DataLoader(Rows(folder, take), batch_size=None, num_workers=1, multiprocessing_context=method)
    found = list(loader)
    assert torch.equal(found[0], want) and torch.equal(found[2], want)
    assert "SIGABRT" in found[1]


class Rows(torch.utils.data.Dataset):
    def __init__(self, folder, take):
        self.folder, self.take = folder, take

    def __len__(self):
        return 3

    def __getitem__(self, row):
        try:
            return self.take(self.folder / ("long.mp4" if row == 1 else "v.mp4"))
        except RuntimeError as error:
            return str(error)
