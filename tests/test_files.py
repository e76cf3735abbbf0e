"""pyvidx.files: a file is the old one or the new one, whatever happens in between."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from pyvidx.files import check_output, whole, write_json, write_text


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = write_text(tmp_path / "new folder" / "a.json", "old")
    path.chmod(0o640)
    with whole(path) as part:
        part.write_text("new")
        assert path.read_text() == "old" and part.parent == path.parent and part.suffix == ".json"
    assert path.read_text() == "new" and os.listdir(path.parent) == ["a.json"]
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_new_file_has_the_mode_of_any_other(tmp_path):
    (tmp_path / "other").touch()
    assert write_text(tmp_path / "a", "x").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write_text(tmp_path / "a.txt", "old")
    with pytest.raises(KeyError), whole(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A limit on the size of files stands for the disk: the write fails in its middle."""
    path = write_text(tmp_path / "a.txt", "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError):
            write_text(path, "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_kill_leaves_the_old_file_and_the_next_write_tidies_up(tmp_path):
    path = write_text(tmp_path / "a.bin", "old")
    code = (
        "import os, sys, signal\nfrom pyvidx.files import whole\n"
        "with whole(sys.argv[1]) as part:\n    part.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == -signal.SIGKILL
    assert path.read_text() == "old" and len(os.listdir(tmp_path)) == 2
    write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.bin"]


def test_a_kill_while_an_output_is_checked_is_tidied_up(tmp_path):
    code = """import os, pathlib, signal
from pyvidx.files import check_output
pathlib.Path.unlink = lambda *given, **more: os.kill(os.getpid(), signal.SIGKILL)
check_output("a.json")"""
    child = subprocess.run([sys.executable, "-c", code], cwd=tmp_path)
    assert child.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    write_text(tmp_path / "a.json", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_write_in_another_thread_or_process_is_not_tidied_away(tmp_path):
    with whole(tmp_path / "a") as one:
        one.write_text("one")
        write_text(tmp_path / "a", "two")
        assert one.exists()
    assert (tmp_path / "a").read_text() == "one"


def test_links_are_followed_and_devices_written_to(tmp_path):
    write_text(tmp_path / "target", "old")
    (tmp_path / "link").symlink_to("target")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"
    write_text(os.devnull, "x")
    assert not os.path.isfile(os.devnull)


def test_names_of_other_bytes(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff" + b"x" * 200 + b".json")
    write_json(path, [path])
    with open(path, encoding="utf-8") as file:
        assert os.fsencode(path) in os.fsencode(json.load(file)[0])
    assert len(os.listdir(tmp_path)) == 1


def test_outputs_are_checked_before_work(tmp_path):
    path = write_text(tmp_path / "a.txt", "old")
    check_output(path)
    check_output(tmp_path / "made" / "b.txt")
    check_output(os.devnull, overwrite=False)
    with pytest.raises(FileExistsError, match="--overwrite"):
        check_output(path, overwrite=False)
    with pytest.raises(OSError, match="must be a file"):
        check_output(tmp_path)
    with pytest.raises(OSError, match="cannot be written to"):
        check_output(path / "below a file.txt")
    assert path.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["a.txt", "made"]
