"""Damaged videos against every reader: python -m tests.fuzz.video --files 2000 --seed 0 --out results.json

Each file is read in five ways by a child process that lives for many files. What counts as bad: the child dies; one way
takes over 20 s of processor time, or 120 s on the clock; its resident memory passes 2 GiB (not its address space, of
which torch and FFmpeg reserve more than they use); an error of a type that the documentation does not name; files or
threads left behind; memory that grows when one file is read again and again; `read` and `stream` of one file that
disagree; and, where the ffmpeg command is installed, a file in which it finds an error and which neither fails nor is
called damaged.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pyvidx.files import write_json
from tests.fuzz.clips import DAMAGES, clips, damaged

SECONDS, WALL, BYTES = 20, 120, 2 << 30
WAYS = ("auto", "all", "decord", "strict", "stream")
DOCUMENTED = ("ValueError", "RuntimeError", "FileNotFoundError")
BAD = ("abort", "hang", "memory", "undocumented error", "leak", "disagreement", "damage not told")


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
        self.process.stdout.readline()  # it says so when all is imported

    def ask(self, path: Path, way: str) -> dict:
        """What became of it."""
        self.process.stdin.write(json.dumps({"path": str(path), "way": way}) + "\n")
        self.process.stdin.flush()
        began, spent, reply = time.monotonic(), self._cpu(), []
        thread = threading.Thread(target=lambda: reply.append(self.process.stdout.readline()), daemon=True)
        thread.start()
        while thread.is_alive() and self._cpu() - spent < SECONDS and time.monotonic() - began < WALL:
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

    def _cpu(self) -> float:
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _end(self, result: dict) -> dict:
        self.process.kill()
        self.process.wait()
        return result


def run(
    files: int, seed: int, folder: Path, names: list[str] | None = None, keep: Path | None = None, workers: int = 1
) -> dict:
    """Damage and read `files` files; the counts, and what was bad.

    Args:
        folder: for the clips and the damaged files of the moment.
        names: of clips to take; None: all.
        keep: a folder for copies of the files that were bad.
        workers: children at work at the same time.
    """
    whole = clips(folder, names)
    ffmpeg = shutil.which("ffmpeg")
    children: queue.SimpleQueue[Child] = queue.SimpleQueue()
    for _ in range(workers):
        children.put(Child())

    def one(number: int) -> dict:
        dice = random.Random(f"{seed} {number}")
        name, damage = dice.choice(list(whole)), dice.choice(DAMAGES)
        path = folder / f"{number}-{damage}-{name}"
        path.write_bytes(damaged(whole[name], damage, dice, list(whole.values())))
        child, results = children.get(), {}
        for way in WAYS:
            child = child if child.process.poll() is None else Child()
            results[way] = child.ask(path, way)
        children.put(child)
        complaint = complained(ffmpeg, path) if ffmpeg else ""
        found = judged(results, complaint)
        if found and keep:
            keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, keep / path.name)
        path.unlink()
        return {"clip": name, "damage": damage, "results": results, "complaint": complaint, "bad": found}

    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(one, range(files)))
    for _ in range(workers):
        children.get().close()
    outcomes = Counter(
        f"{way}: {r.get('error') or r.get('outcome') or r['bad']}" for d in done for way, r in d["results"].items()
    )
    damaged_files = [d for d in done if d["complaint"]]
    return {
        "files": files,
        "seed": seed,
        "clips": dict(sorted(Counter(d["clip"] for d in done).items())),
        "damages": dict(sorted(Counter(d["damage"] for d in done).items())),
        "outcomes": dict(sorted(outcomes.items())),
        "ffmpeg finds damaged": len(damaged_files) if ffmpeg else "ffmpeg is not installed",
        "of those, a read of 8 frames tells": sum(d["results"]["auto"].get("outcome") != "read" for d in damaged_files),
        "bad": {kind: sum(kind in b for d in done for b, _ in d["bad"]) for kind in BAD},
        "bad files": [
            {"file": f"{number}-{d['damage']}-{d['clip']}", "what": kind, "detail": detail}
            for number, d in enumerate(done)
            for kind, detail in d["bad"]
        ],
    }


def judged(results: dict[str, dict], complaint: str) -> list[tuple[str, str]]:
    """What is bad about one file: (kind, detail)."""
    found = []
    for way, result in results.items():
        if result.get("bad"):
            found.append((result["bad"], f"{way}: {result.get('detail', '')}"))
        if result.get("error", DOCUMENTED[0]) not in DOCUMENTED:
            found.append(("undocumented error", f"{way}: {result['error']}: {result['detail']}"))
    every, streamed = results["all"].get("shown"), results["stream"].get("shown")
    if every and streamed and every != streamed:
        found.append(("disagreement", f"read shows {every}, stream {streamed}"))
    if complaint and all(results[way].get("outcome") == "read" for way in ("all", "strict", "stream")):
        found.append(("damage not told", complaint))
    return found


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
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, help="a folder for the files that were bad")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = run(options.files, options.seed, Path(folder), keep=options.keep, workers=options.workers)
    result["minutes"] = round((time.monotonic() - began) / 60, 1)
    if options.out:
        write_json(options.out, result, indent=1)
    print(json.dumps({key: value for key, value in result.items() if key != "bad files"}, indent=1))
    return 1 if result["bad files"] else 0


if __name__ == "__main__":
    sys.exit(main())
