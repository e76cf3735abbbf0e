"""Damaged videos against every reader: python -m tests.fuzz.video --files 2000 --seed 0 --out results.json

Each file is read in five ways by a child process that lives for many files. What counts as bad: the child dies; one way
takes over 20 s; its resident memory passes 2 GiB (not its address space, of which torch and FFmpeg reserve more than
they use); an error of a type that the documentation does not name; files or threads left behind; memory that grows when
one file is read again and again; `read` and `stream` of one file that disagree; and, where the ffmpeg command is
installed, a file in which it finds an error and which neither fails nor is called damaged.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from pyvidx.files import write_json
from tests.fuzz.clips import DAMAGES, clips, damaged

SECONDS, BYTES = 20, 2 << 30
WAYS = ("auto", "all", "decord", "strict", "stream")
DOCUMENTED = ("ValueError", "RuntimeError", "FileNotFoundError")


class Child:
    """A process that reads one file in one way for each line it is sent."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, path: Path, way: str) -> dict:
        """What became of it."""
        self.process.stdin.write(json.dumps({"path": str(path), "way": way}) + "\n")
        self.process.stdin.flush()
        began, reply = time.monotonic(), []
        thread = _reader(self.process.stdout, reply)
        while thread.is_alive() and time.monotonic() - began < SECONDS:
            thread.join(0.5)
            if self._resident() > BYTES:
                return self._end({"bad": "memory"})
        if thread.is_alive():
            return self._end({"bad": "hang"})
        if not reply or not reply[0]:
            return self._end({"bad": "abort", "detail": f"exit status {self.process.wait()}"})
        result = json.loads(reply[0])
        return self._end(result) if result.get("bad") == "memory" else result

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _resident(self) -> int:
        try:
            return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096
        except (OSError, IndexError):
            return 0

    def _end(self, result: dict) -> dict:
        self.process.kill()
        self.process.wait()
        return result


def _reader(stream, reply: list):
    import threading

    thread = threading.Thread(target=lambda: reply.append(stream.readline()), daemon=True)
    thread.start()
    return thread


def run(files: int, seed: int, folder: Path, names: list[str] | None = None, keep: Path | None = None) -> dict:
    """Damage and read `files` files; the counts, and what was bad.

    Args:
        folder: for the clips and the damaged file of the moment.
        names: of clips to take; None: all.
        keep: a folder for copies of the files that were bad.
    """
    whole = clips(folder, names)
    dice = random.Random(seed)
    ffmpeg = shutil.which("ffmpeg")
    counts = {key: Counter() for key in ("clip", "damage", "outcome", "error", "bad")}
    bad, child = [], Child()
    by_sampling = Counter()
    for number in range(files):
        name = dice.choice(list(whole))
        damage = dice.choice(DAMAGES)
        data = damaged(whole[name], damage, dice, list(whole.values()))
        path = folder / f"{number}-{damage}-{name}"
        path.write_bytes(data)
        counts["clip"][name] += 1
        counts["damage"][damage] += 1
        results, found = {}, []
        for way in WAYS:
            if child.process.poll() is not None:
                child = Child()
            results[way] = result = child.ask(path, way)
            counts["outcome"][f"{way}: {result.get('outcome', result.get('bad'))}"] += 1
            if "error" in result:
                counts["error"][f"{way}: {result['error']}"] += 1
                if result["error"] not in DOCUMENTED:
                    found.append(f"{way}: undocumented error {result['error']}: {result['detail']}")
            if result.get("bad"):
                found.append(f"{way}: {result['bad']} {result.get('detail', '')}")
        found += disagreements(results)
        if ffmpeg and (complaint := complained(ffmpeg, path)):
            counts["outcome"]["ffmpeg complains"] += 1
            told = {way: r.get("outcome") != "read" for way, r in results.items()}
            by_sampling["told by a sampled read"] += told["auto"]
            if not (told["all"] or told["strict"] or told["stream"]):
                found.append(f"ffmpeg complains, nothing else does: {complaint}")
        for what in found:
            counts["bad"][what.split(":")[0] if what.startswith("ffmpeg") else what.split(": ", 1)[1].split()[0]] += 1
            bad.append({"file": path.name, "what": what})
        if found and keep:
            keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, keep / path.name)
        path.unlink()
    child.close()
    return {
        "files": files,
        "seed": seed,
        "ffmpeg": bool(ffmpeg),
        **{key: dict(sorted(value.items())) for key, value in counts.items()},
        "of those ffmpeg complains about": dict(by_sampling),
        "bad files": bad,
    }


def disagreements(results: dict[str, dict]) -> list[str]:
    """`read` of all frames and `stream` must show the same, pixel for pixel and second for second."""
    a, b = results["all"].get("shown"), results["stream"].get("shown")
    if a is not None and b is not None and a != b:
        return [f"all: disagrees with stream: {a} and {b}"]
    return []


def complained(ffmpeg: str, path: Path) -> str:
    """The first line of what the ffmpeg command finds wrong."""
    command = [ffmpeg, "-nostdin", "-v", "error", "-i", str(path), "-f", "null", "-"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return ""
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    # "null" is about the clock of ffmpeg's own output.
    return next((line for line in lines if "Last message repeated" not in line and not line.startswith("[null @")), "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, help="a folder for the files that were bad")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = run(options.files, options.seed, Path(folder), keep=options.keep)
    result["minutes"] = round((time.monotonic() - began) / 60, 1)
    if options.out:
        write_json(options.out, result, indent=1)
    print(json.dumps({key: result[key] for key in ("files", "outcome", "error", "bad", "minutes")}, indent=1))
    return 1 if result["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
