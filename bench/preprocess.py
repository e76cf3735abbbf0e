"""Frames to pixels against the processors of transformers: python -m bench.preprocess [--out FILE.json]

pyvidx       clip_preprocess, equal to the next one's pixels to 2e-6
pil          CLIPImageProcessorPil, which resizes with Pillow
torchvision  CLIPImageProcessor on torchvision, where that imports; up to a level off

All take 8 frames of noise of one size, decoded, as uint8 [T, H, W, 3], and return float32 [T, 3, 224, 224]. The rounds
of all are interleaved. The ratios are of the least times, which other processes of the machine disturb least. cpu is
the time of all threads together; that of the second one is known to Linux by the tick only, so calls below 4 ms may
show half of it.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch

from bench.bench_resize_normalize import SIZES
from bench.towers import about
from pyvidx.files import check_output, write_json
from pyvidx.preprocess import clip_preprocess
from tests.torchvision_shim import mend_torchvision

FRAMES = 8


def contenders(frames: torch.Tensor) -> dict:
    """What turns these frames into pixels, by name."""
    mend_torchvision()
    from transformers import CLIPImageProcessorPil

    arrays, planes = list(frames.numpy()), list(frames.permute(0, 3, 1, 2))
    slow = CLIPImageProcessorPil()
    found = {
        "pyvidx": lambda: clip_preprocess(frames),
        "pil": lambda: slow(arrays, return_tensors="pt", input_data_format="channels_last")["pixel_values"],
    }
    try:
        from transformers import CLIPImageProcessor

        fast = CLIPImageProcessor()
    except (ImportError, RuntimeError) as error:  # no torchvision, or one that does not fit this torch
        print(f"torchvision: left out: {error}")
        return found
    return found | {"torchvision": lambda: fast(planes, return_tensors="pt")["pixel_values"]}


def measure(name: str, threads: int, seconds: float) -> dict:
    """One line of the result."""
    torch.set_num_threads(threads)
    frames = torch.randint(0, 256, (FRAMES, *SIZES[name], 3), dtype=torch.uint8)
    run = contenders(frames)
    pixels = run["pyvidx"]()
    step = 1 / 255 / 0.26
    off = {other: float((torch.as_tensor(run[other]()) - pixels).abs().max() / step) for other in run}
    wall, cpu = ({other: [] for other in run} for _ in range(2))
    stop = time.perf_counter() + seconds
    while len(wall["pyvidx"]) < 5 or time.perf_counter() < stop:
        for other, call in run.items():
            began = time.perf_counter(), time.process_time()
            call()
            wall[other].append((time.perf_counter() - began[0]) * 1e3)
            cpu[other].append((time.process_time() - began[1]) * 1e3)
    row = {"size": name, "threads": threads, "frames": FRAMES, "rounds": len(wall["pyvidx"]), "levels_off": off}
    for kind, times in (("wall", wall), ("cpu", cpu)):
        least = {other: min(t) for other, t in times.items()}
        row[f"{kind}_least_ms"] = least
        row[f"{kind}_median_ms"] = {other: statistics.median(t) for other, t in times.items()}
        row[f"{kind}_ratio"] = {other: least[other] / least["pyvidx"] for other in run if other != "pyvidx"}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.preprocess", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each size and number of threads")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.out:
        check_output(options.out)
    rows = []
    for threads in (1, 2):
        for name in SIZES:
            rows.append(row := measure(name, threads, options.seconds))
            for kind in ("wall", "cpu"):
                times = "  ".join(f"{k} {v:.2f}" for k, v in row[f"{kind}_least_ms"].items())
                print(f"{name:6} {threads} threads, {kind} ms: {times}", flush=True)
    if options.out:
        write_json(options.out, {"about": about() | {"load": os.getloadavg()}, "rows": rows}, indent=1)


if __name__ == "__main__":
    main()
