"""Decoding in processes against decoding in threads: python -m bench.encode_workers --before FOLDER [--out FILE.json]

before     encode of the commit checked out and built in FOLDER, which read in threads
threads    encode of this commit, reading in threads of its own process
processes  encode of this commit
command    pyvidx encode --workers 2 of either, from its start to its end

The rounds of all are interleaved, with the reader that each takes by itself (before 34145d3: decord; since: PyAV). They
are warm: the first clip of each, for which its processes start, is timed on its own. cpu is the time of all processes
and threads together, which says more than the wall time where the machine has other work.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from pyvidx.files import write_json

ROOT = Path(__file__).parents[1]


class Threads:
    """What Decoders does, here."""

    def start(self, workers: int) -> None:
        pass

    def map(self, sources, *arguments, workers, ahead, ordered, **options):
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
    for height in (360, 720):
        (folder / f"{height}.mp4").unlink()
    return [str(path) for path in paths]


def cpu() -> float:
    """Seconds of this process and its children."""
    ticks, me = 0, str(os.getpid())
    for process in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{process}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12]) if me in (process, fields[1]) else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def serve(name: str, workers: int, paths: list[str]) -> None:
    """Encode them once per line of input, and print the seconds."""
    from pyvidx.corpus.encode import encode_videos
    from pyvidx.models import TextVideo

    torch.set_num_threads(1)
    model = TextVideo.default().model.fold()
    options = {"workers": workers} | ({"decoders": Threads()} if name == "threads" else {})

    def encode(some: list[str]) -> None:
        began, used = time.perf_counter(), cpu()
        results = list(encode_videos(some, model, **options))
        assert all(r.error is None for r in results), results
        print(json.dumps([time.perf_counter() - began, cpu() - used]), flush=True)

    encode(paths[:1])
    for _ in sys.stdin:
        encode(paths)


def command(environment: dict[str, str], folder: str) -> list[float]:
    began, used = time.perf_counter(), os.times()
    arguments = ["encode", folder, "--workers", "2", "--out", f"{folder}/{time.monotonic_ns()}.npz"]
    done = subprocess.run(
        [sys.executable, "-m", "pyvidx", *arguments], env=environment, capture_output=True, text=True, check=True
    )
    assert "FAILED" not in done.stdout, done.stdout
    now = os.times()
    return [
        time.perf_counter() - began,
        now.children_user + now.children_system - used.children_user - used.children_system,
    ]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--before", type=Path, help="a checkout to compare with")
    p.add_argument("--clips", type=int, default=40)
    p.add_argument("--seconds", type=float, default=3.0, help="of a clip")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", type=Path)
    options = p.parse_args()
    homes = ({"before": options.before} if options.before else {}) | {"threads": ROOT, "processes": ROOT}
    homes = {n: os.environ | {"PYTHONPATH": str(home), "OMP_NUM_THREADS": "1"} for n, home in homes.items()}
    cases, seconds, first = [(name, workers) for workers in (1, 2) for name in homes], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        paths = clips(Path(folder), options.clips, options.seconds)
        running = {}
        for name, workers in cases:
            code = f"from runpy import run_path; run_path({__file__!r})['serve']{(name, workers, paths)!r}"
            running[name, workers] = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=homes[name]
            )
            first[name, workers] = json.loads(running[name, workers].stdout.readline())[0]
        for _ in range(options.rounds):
            for case, process in running.items():
                print("", file=process.stdin, flush=True)
                seconds.setdefault(case, []).append(json.loads(process.stdout.readline()))
            for name in homes.keys() - {"threads"}:
                seconds.setdefault((f"{name}, command", 2), []).append(command(homes[name], folder))
        for process in running.values():
            process.stdin.close()
            process.wait()
    found = []
    for case in seconds:
        wall, used = zip(*seconds[case])
        row = dict(zip(("encode", "workers"), case)) | {"wall_s": wall, "cpu_s": used}
        row |= {"first_clip_s": first[case]} if case in first else {}
        row |= {"median_wall_s": statistics.median(wall), "median_cpu_s": statistics.median(used)}
        found.append(row)
        print({name: value for name, value in row.items() if not isinstance(value, tuple)})
    if options.out:
        about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        about |= {"torch": torch.__version__, "load": os.getloadavg(), "clips": options.clips, "of_s": options.seconds}
        write_json(options.out, {"about": about, "results": found}, indent=1)


if __name__ == "__main__":
    main()
