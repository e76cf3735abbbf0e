"""A whole corpus, killed on the way: python -m bench.corpus_run --videos 20000 --folder FOLDER --out FILE.json

Small clips of pyvidx.data.motion are made once, one in a hundred of them broken. `pyvidx encode` runs over them twice:
`killed`, with kill -9 at three moments and --resume after each, and `undisturbed`. All rows of the two are compared.
Memory (resident, of the run and of its decoding processes) and open files are sampled on the way.
"""

import argparse
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from pyvidx import corpus
from pyvidx.corpus.engines import Job
from pyvidx.corpus.folder import manifest, parts
from pyvidx.corpus.rates import Rates, measure
from pyvidx.data import motion
from pyvidx.files import check_output, whole, write_json
from pyvidx.models import TextVideo
from pyvidx.video import write

ROOT = Path(__file__).parents[1]
BROKEN_EVERY = 100
FRAMES, SIZE = 4, 64
JOB = ["--frames", str(FRAMES), "--outputs", "pooled", "--batch", "8", "--workers", "2"]


def main(argv: Sequence[str] | None = None) -> dict:
    p = argparse.ArgumentParser(
        prog="python -m bench.corpus_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--videos", type=int, default=20_000)
    p.add_argument("--kills", type=int, default=3)
    p.add_argument("--part-rows", type=int, default=1000)
    p.add_argument("--every", type=float, default=5.0, help="seconds between two samples")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--folder", type=Path, help="where clips and embeddings are kept; default: nowhere")
    p.add_argument("--out", type=Path)
    options = p.parse_args(argv)
    if options.out:
        check_output(options.out)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        made = make(folder / "clips", options.videos)
        runs = {
            name: run(folder, name, options.videos, kills, options)
            for name, kills in (("killed", options.kills), ("undisturbed", 0))
        }
        compared = compare(folder / "killed", folder / "undisturbed", made)
        rates = asdict(measured(folder / "clips"))
    result = {
        "about": {
            "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__,
            "load_average": os.getloadavg(), "clips": f"{2 * FRAMES} frames of {SIZE} x {SIZE}", "job": " ".join(JOB),
            "part_rows": options.part_rows, "seed": options.seed, **made,
        },
        "compared": compared, "rates": rates,
        "runs": runs,
    }  # fmt: skip
    if options.out:
        write_json(options.out, result, indent=1)
    for name, one in runs.items():
        print(name, {k: v for k, v in one.items() if k != "samples"})
    print(compared)
    return result


def make(folder: Path, count: int) -> dict[str, int]:
    """The clips, which stay when they are there; how many, and how many of them are broken."""
    scenes, broken = motion.random_scenes(count, seed=11), 0
    folder.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(scenes):
        path = folder / f"{i // 1000:03d}" / f"{i:06d}.mp4"
        spoiled = i % BROKEN_EVERY == BROKEN_EVERY // 2
        broken += spoiled
        if path.exists():
            continue
        path.parent.mkdir(exist_ok=True)
        write(path, motion.render(scene, 2 * FRAMES, SIZE))
        if spoiled:  # in turn empty, no video, and cut before any frame
            content = path.read_bytes()
            content = (b"", b"this is not a video" * 20, content[: len(content) // 8])[i // BROKEN_EVERY % 3]
            with whole(path) as part:
                part.write_bytes(content)
    return {"videos": count, "broken": broken}


def run(folder: Path, name: str, videos: int, kills: int, options: argparse.Namespace) -> dict:
    """`pyvidx encode`, started again until it ends by itself."""
    out, draws = folder / name, random.Random(options.seed)
    words = ["encode", str(folder / "clips"), "--out", str(out), *JOB, "--part-rows", str(options.part_rows)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    at = [(i + draws.uniform(0.3, 0.9)) / (kills + 1) for i in range(kills)]
    samples, killed, began, counted = [], [], time.monotonic(), {}
    if out.exists():
        raise FileExistsError(f"corpus_run: {out} is there; give another --folder, or take it away")
    while True:
        with tempfile.TemporaryFile("w+") as said:
            child = subprocess.Popen(
                [sys.executable, "-m", "pyvidx", *words, "--resume"], stdout=said, stderr=subprocess.DEVNULL,
                env=environment, start_new_session=True,
            )  # fmt: skip
            while child.poll() is None:
                rows = _rows(out, counted)
                now = _tree(child.pid)
                samples.append(
                    {"seconds": round(time.monotonic() - began, 1), "start": len(killed), "rows": rows, **now}
                )
                if len(killed) < kills and rows >= at[len(killed)] * videos:
                    time.sleep(draws.uniform(0, options.every))
                    child.send_signal(signal.SIGKILL)
                    break
                with suppress(subprocess.TimeoutExpired):
                    child.wait(options.every)
            code = child.wait()
            said.seek(0)
            last = said.read().strip().split("\n")[-1]
        if code != -signal.SIGKILL:
            break
        counted.clear()
        killed.append({"seconds": round(time.monotonic() - began, 1), "rows kept": _rows(out, counted)})
    if code not in (0, 1):
        raise RuntimeError(f"corpus_run: {name} ended with {code}")
    wall = time.monotonic() - began
    bytes_kept = sum(p.stat().st_size for p in parts(out))
    return {
        "wall_s": round(wall, 1), "videos_per_s": round(videos / wall, 1), "exit": code, "kills": killed,
        "last summary": last, "parts": len(parts(out)), "bytes_per_row": round(bytes_kept / videos, 1),
        "flat": flat(samples), "samples": samples[:: max(1, len(samples) // 200)],
    }  # fmt: skip


def measured(clips: Path) -> Rates:
    """On 200 of the clips, one core, for `pyvidx plan encode --rates`."""
    paths = sorted(map(str, clips.rglob("*.mp4")))
    job = Job(frames=FRAMES, outputs=("pooled",), batch=8)
    return measure(paths[:: max(1, len(paths) // 200)], TextVideo.default().model.fold(), job)


def flat(samples: list[dict]) -> dict:
    """Medians over the second and the last quarter of the longest stretch without a kill."""
    longest = max((([s for s in samples if s["start"] == n]) for n in {s["start"] for s in samples}), key=len)
    settled = [s for s in longest if s["processes"] > 1] or longest
    n = max(1, len(settled) // 4)
    early, late = settled[n : 2 * n] or settled, settled[-n:]
    found = {"rows": {"second quarter": early[0]["rows"], "last quarter": late[-1]["rows"]}}
    for name in ("run_mib", "decoders_mib", "open_files", "processes"):
        before, after = (statistics.median(s[name] for s in part) for part in (early, late))
        found[name] = {"second quarter": before, "last quarter": after, "most": max(s[name] for s in settled)}
    return found


def compare(one: Path, other: Path, made: dict[str, int]) -> dict:
    """Raise RuntimeError unless both have every video once, with the same errors, and embeddings but for rounding."""
    a, b = corpus.read(one), corpus.read(other)
    for found in (a, b):
        names = [*found.paths, *found.errors]
        if len(names) != made["videos"] or len(set(names)) != len(names) or len(found.errors) != made["broken"]:
            raise RuntimeError(f"corpus_run: {len(names)} rows, {len(found.errors)} errors of {made}")
    if len(list(corpus.iterate(one))) != made["videos"] or a.errors != b.errors or manifest(one) != manifest(other):
        raise RuntimeError("corpus_run: the rows differ")
    places = {path: i for i, path in enumerate(b.paths)}
    theirs = b.pooled[[places[path] for path in a.paths]]
    largest = float((a.pooled - theirs).abs().max())
    if largest > 1e-4:
        raise RuntimeError(f"corpus_run: embeddings differ by {largest}")
    return {
        "rows": made["videos"], "errors": len(a.errors), "largest difference": largest,
        "equal to the bit": int((a.pooled == theirs).all(1).sum()),
    }  # fmt: skip


def _rows(out: Path, counted: dict[Path, int]) -> int:
    """Rows of the parts that are there."""
    if (out / "_pyvidx.json").exists():
        for path in parts(out):
            if path not in counted:
                counted[path] = len(manifest(out).store.names(path))
    return sum(counted.values())


def _tree(pid: int) -> dict[str, float]:
    """Resident memory of a run and of its children, and their open files."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                children.append(int(stat.parent.name))
    memory, files = {}, 0
    for process in (pid, *children):
        with suppress(OSError):
            pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
            memory[process] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            files += len(os.listdir(f"/proc/{process}/fd"))
    return {
        "run_mib": round(memory.pop(pid, 0.0), 1), "decoders_mib": round(sum(memory.values()), 1),
        "processes": 1 + len(memory), "open_files": files,
    }  # fmt: skip


if __name__ == "__main__":
    main()
