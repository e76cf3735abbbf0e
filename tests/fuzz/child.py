"""The process that tests.fuzz.video watches: reads the file of each line in the way it says, answers with a line."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch

from pyvidx.video import read, stream
from tests.peak import peak

AGAIN, GROWTH = 8, 6 << 20
BYTES = 2 << 30


def go(path: str, way: str) -> dict:
    """Read one file in one way; the frames shown, as a digest of pixels and times."""
    if way == "stream":
        shown, damage = hashlib.sha256(), None
        count = 0
        for clip in stream(path):
            shown.update(clip.frames.numpy().tobytes() + clip.seconds.numpy().tobytes())
            count, damage = count + len(clip), clip.damaged
        return {"outcome": "damaged" if damage else "read", "shown": f"{count} {shown.hexdigest()[:16]}"}
    frames, sampler = (10_000_000, "arange") if way == "all" else (8, "uniform")
    clip = read(path, frames, sampler, "decord" if way == "decord" else "auto", strict=way == "strict")
    result = {"outcome": "damaged" if clip.damaged else "read"}
    if way == "all":
        digest = hashlib.sha256()
        for i in range(0, len(clip), 16):  # in the pieces of stream
            digest.update(clip.frames[i : i + 16].numpy().tobytes() + clip.seconds[i : i + 16].numpy().tobytes())
        result["shown"] = f"{len(clip)} {digest.hexdigest()[:16]}"
    return result


def told(path: str, way: str) -> dict:
    try:
        return go(path, way)
    except BaseException as error:  # whatever comes is what is asked
        return {"outcome": "error", "error": type(error).__name__, "detail": str(error)[:300]}


def left() -> tuple[int, int]:
    """Open files and threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def grows(path: str, way: str) -> int:
    """Bytes by which memory grows over later readings of the same file."""
    for _ in range(AGAIN):
        told(path, way)
    before = resident()
    for _ in range(AGAIN):
        told(path, way)
    return resident() - before


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # decoders that print do not disturb the answers
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("ready", file=out, flush=True)
    for number, line in enumerate(sys.stdin):
        job = json.loads(line)
        before, began = left(), time.monotonic()
        result = told(**job)
        seconds = time.monotonic() - began
        if left() != before:
            gc.collect()
            time.sleep(0.05)  # a decoder's threads are gone a moment after it is
        if job["way"] != "decord" and left()[0] > before[0]:
            result |= {"bad": "leak", "detail": f"files and threads: {before} before, {left()} after"}
        # Now and then, with a file that is read fast enough not to look like one that hangs.
        if number % 97 == 96 and seconds < 0.3 and job["way"] != "decord" and (more := grows(**job)) > GROWTH:
            result |= {"bad": "leak", "detail": f"{more} bytes in {AGAIN} readings"}
        if peak() * 1024 > BYTES:
            result["bad"] = "memory"
        print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main()
