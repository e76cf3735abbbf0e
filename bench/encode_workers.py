"""Decoding in processes against decoding in threads: python -m bench.encode_workers --before FOLDER [--out FILE.json]

before     encode of the commit checked out and built in FOLDER, which read in threads
threads    encode of this commit, reading in threads of its own process
processes  encode of this commit

The rounds of all are interleaved. Each is warm: its first clip, for which its processes start, is timed on its own.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from pyvidx.files import write_json

ROOT = Path(__file__).parents[1]


class Threads:
    """What Decoders does, here."""

    def start(self, workers: int) -> None:
        pass

    def map(self, sources, *arguments, workers, ahead, **options):
        from pyvidx.video import read
        from pyvidx.video.pool import Decoded

        def load(path):
            began = time.perf_counter()
            return Decoded(path, read(path, *arguments, **options), None, time.perf_counter() - began)

        with ThreadPoolExecutor(workers) as threads:
            queue = []
            for path in sources:
                queue.append(threads.submit(load, path))
                if len(queue) >= ahead:
                    yield queue.pop(0).result()
            yield from (future.result() for future in queue)


def clips(folder: Path, count: int, seconds: float) -> list[str]:
    """Moving noise, half of it of 360p and half of 720p, in turn."""
    from pyvidx.video import write

    draws = torch.Generator().manual_seed(0)
    for height in (360, 720):
        coarse = torch.randint(256, (1, 3, 24, 48), generator=draws).float()
        still = torch.nn.functional.interpolate(coarse, (height, height * 16 // 9), mode="bilinear")[0].movedim(0, 2)
        frames = (still.roll(4 * i, 1).to(torch.uint8) for i in range(round(25 * seconds)))
        write(folder / f"{height}.mp4", frames, fps=25)
    paths = [folder / f"{i:03d}.mp4" for i in range(count)]
    for i, path in enumerate(paths):
        os.link(folder / f"{(360, 720)[i % 2]}.mp4", path)
    return [str(path) for path in paths]


def serve(name: str, reader: str, workers: int, paths: list[str]) -> None:
    """Encode them once per line of input, and print the seconds."""
    from pyvidx.encode import encode_videos
    from pyvidx.models import BTAdapter

    torch.set_num_threads(1)
    model = BTAdapter.default().fold()
    options = {"reader": reader, "workers": workers} | ({"decoders": Threads()} if name == "threads" else {})

    def encode(some: list[str]) -> None:
        began = time.perf_counter()
        results = list(encode_videos(some, model, **options))
        assert all(r.error is None for r in results), results
        print(time.perf_counter() - began, flush=True)

    encode(paths[:1])
    for _ in sys.stdin:
        encode(paths)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--before", type=Path, help="a checkout to compare with")
    p.add_argument("--clips", type=int, default=40)
    p.add_argument("--seconds", type=float, default=3.0, help="of a clip")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", type=Path)
    options = p.parse_args()
    homes = ({"before": options.before} if options.before else {}) | {"threads": ROOT, "processes": ROOT}
    cases, seconds, first = [(n, r, w) for r in ("pyav", "decord") for w in (1, 2) for n in homes], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        paths = clips(Path(folder), options.clips, options.seconds)
        running = {}
        for name, reader, workers in cases:
            code = f"from runpy import run_path; run_path({__file__!r})['serve']{(name, reader, workers, paths)!r}"
            environment = os.environ | {"PYTHONPATH": str(homes[name]), "OMP_NUM_THREADS": "1"}
            running[name, reader, workers] = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            first[name, reader, workers] = float(running[name, reader, workers].stdout.readline())
        for _ in range(options.rounds):
            for case, process in running.items():
                print("", file=process.stdin, flush=True)
                seconds.setdefault(case, []).append(float(process.stdout.readline()))
        for process in running.values():
            process.stdin.close()
            process.wait()
    found = []
    for case in cases:
        row = dict(zip(("encode", "reader", "workers"), case))
        row |= {"median_s": statistics.median(seconds[case]), "all_s": seconds[case], "first_clip_s": first[case]}
        found.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k != "all_s"})
    if options.out:
        about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        about |= {"torch": torch.__version__, "load": os.getloadavg(), "clips": options.clips, "of_s": options.seconds}
        write_json(options.out, {"about": about, "results": found}, indent=1)


if __name__ == "__main__":
    main()
