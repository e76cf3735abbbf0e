"""python -m bench.motion_study --out FOLDER: does a module beside a frozen CLIP learn to see time, and by which part?

A tiny CLIP is trained on single frames of pyvidx.data.motion and frozen; then every row of bench.motion.rows is
trained on clips with the same budget, for several seeds, and tested on clips of objects that no training had. What is
done already is kept in FOLDER/work, so that an interrupted study goes on where it was; the results are study.json,
table.md and study.png in FOLDER.
"""

import argparse
import dataclasses
import json
import multiprocessing
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.motion import clip as tiny
from bench.motion import report, temporal, world
from bench.motion.rows import OTHERS, ROWS
from bench.motion.temporal import Gallery, Row
from pyvidx.data import motion
from pyvidx.files import whole, write_json, write_text
from pyvidx.models import TextVideo, files
from pyvidx.train.recipe import Recipe
from pyvidx.train.task import trained

LAYERS = range(tiny.VISION.layers - temporal.DEPTH, tiny.VISION.layers)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a study.

    Attributes:
        clip_steps, clip_batch, stills: of the CLIP's training; stills counts scenes.
        scenes: of the modules' training; each is two clips.
        recipe: of every module, but for seed and multipliers. Its rate was the best of three for one seed of BT-Adapter
            on validation clips: 1e-3, 2e-3 and 4e-3 told 56, 78 and 71 % of the events from their opposites.
        gallery: see Gallery.of.
    """

    clip_steps: int = 2400
    clip_batch: int = 96
    stills: int = 5000
    scenes: int = 4000
    recipe: Recipe = Recipe(
        epochs=2, batch=16, schedule="steps", peak_lr=2e-3, start_lr=8e-5, warmup_epochs=0.2, cosine_epochs=1.8,
        betas=(0.9, 0.98), decay="all", amp="none",
    )  # fmt: skip
    gallery: dict = dataclasses.field(default_factory=lambda: {"singles": 52, "pairs": 28, "looks": 48})


SMALL = Plan(3, 6, 4, scenes=8, gallery={"singles": 4, "pairs": 1, "looks": 3})


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.motion_study", description=__doc__)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    p.add_argument("--rows", default="", help="only rows whose names hold this")
    p.add_argument("--small", action="store_true", help="in seconds: everything runs, nothing is learned")
    p.add_argument("--ship", type=Path, help="write the best BT-Adapter and its text tower to this .safetensors file")
    options = p.parse_args(argv)
    plan = SMALL if options.small else Plan()
    work = options.out / "work"
    (work / "runs").mkdir(parents=True, exist_ok=True)
    check_plan(work / "plan.json", plan)
    start = time.perf_counter()
    torch.set_num_threads(1)  # two threads of so small a model wait for each other where a core is busy
    clip = the_clip(work, plan)
    rows = [row for row in ROWS if options.rows in row.name]
    jobs = [(work, plan, row, seed) for seed in range(options.seeds) for row in rows if seed == 0 or has_draws(row)]
    jobs.sort(key=lambda job: job[2] in OTHERS)  # what the paper's tables have comes first
    waiting = [job for job in jobs if not run_file(work, job[2], job[3]).exists()]
    for T in sorted({row.frames for *_, row, _ in waiting}):
        cache(work, plan, clip, T)
    if options.workers > 1 and len(waiting) > 1:
        with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
            for i, line in enumerate(pool.imap_unordered(run, waiting), 1):
                print(f"{i}/{len(waiting)} {time.perf_counter() - start:.0f} s: {line}", flush=True)
    else:
        for job in waiting:
            print(run(job), flush=True)
    print(f"study: {time.perf_counter() - start:.0f} s in this call")
    runs = [json.loads(run_file(work, row, seed).read_text()) for *_, row, seed in jobs]
    if options.ship is not None:
        print(f"wrote {ship(options.ship, work, clip, runs)}")
    report.write(options.out, dataclasses.asdict(plan), json.loads((work / "clip.json").read_text()), runs)
    print((options.out / "table.md").read_text())
    return 0


def check_plan(path: Path, plan: Plan) -> None:
    """Refuse a folder whose runs were made with other sizes; they would stand in one table."""
    text = json.dumps(dataclasses.asdict(plan), indent=1)
    if path.exists() and path.read_text() != text:
        raise SystemExit(
            f"motion_study: {path.parent} must hold runs of the same plan, got another; choose a new --out"
        )
    write_text(path, text)


def ship(path: Path, work: Path, clip: tiny.TinyCLIP, runs: list[dict]) -> Path:
    """The BT-Adapter of 8 frames that tells most validation events from their opposites, of all its rows and seeds."""
    own = [r for r in runs if r["row"]["pretraining"] is not None and r["row"]["frames"] == 8]
    best = max(own, key=lambda r: r["validation"]["pair"])
    model = temporal.encoder_of(clip, Row(**best["row"]))
    stored = run_file(work, Row(**best["row"]), best["seed"]).with_suffix(".safetensors")
    model.load_state_dict(files.read(stored, "motion_study")[1])
    about = {
        "command": "python -m bench.motion_study --out FOLDER --ship pyvidx/models/motion.safetensors",
        "knows": "the moving shapes of pyvidx.data.motion",
        "row": best["row"]["name"],
        "frames": best["row"]["frames"],
        "seed": best["seed"],
        "validation": best["validation"],
        "test": best["test"],
    }
    return TextVideo(model, clip.text, tiny.words(), about).save(path)


def has_draws(row: Row) -> bool:
    """Whether a seed changes anything: the baselines have nothing to train."""
    return row.module not in ("mean", "last")


def run_file(work: Path, row: Row, seed: int) -> Path:
    return work / "runs" / f"{re.sub(r'[^a-z0-9]+', '-', row.name.lower()).strip('-')}-{seed}.json"


def the_clip(work: Path, plan: Plan) -> tiny.TinyCLIP:
    """Trained, or as it was left in the folder."""
    path, notes = work / "clip.safetensors", work / "clip.json"
    if not path.exists():
        start = time.perf_counter()
        model = tiny.train(plan.clip_steps, count=plan.stills, batch=plan.clip_batch)
        seconds, scale = time.perf_counter() - start, model.scale
        write_json(notes, {"seconds": seconds, "scale": scale, "sha256": files.digest(model.state_dict())})
        files.write(path, "tiny_clip", model, {})
    model = tiny.TinyCLIP()
    model.load_state_dict(files.read(path, "tiny_clip")[1])
    return model.eval().requires_grad_(False)


def cache(work: Path, plan: Plan, clip: tiny.TinyCLIP, T: int) -> None:
    """What the frozen CLIP makes of all clips at T frames, once for all runs; processes map the file."""
    path = work / f"clips-{T}.pt"
    if path.exists():
        return
    found = {
        "train": world.seen_by(clip, motion.random_scenes(plan.scenes, seed=1), T, LAYERS),
        "validation": Gallery.of(clip, motion.SEEN, 2, T, LAYERS, plan.gallery),
        "test": Gallery.of(clip, motion.HELD_OUT, 4, T, LAYERS, plan.gallery),
    }
    with whole(path) as part:
        torch.save({name: plain(x) for name, x in found.items()}, part)


def plain(x):
    """Named tuples as tuples, for a file that is read without running code of its own."""
    return tuple(map(plain, x)) if isinstance(x, tuple) else x


def run(job: tuple[Path, Plan, Row, int]) -> str:
    """One row, one seed: train, test, write the result."""
    work, plan, row, seed = job
    torch.set_num_threads(1)
    clip = the_clip(work, plan)
    stored = torch.load(work / f"clips-{row.frames}.pt", mmap=True)
    start, cpu = time.perf_counter(), time.process_time()
    model, encode = temporal.train(clip, world.Clips(*stored["train"]), row, plan.recipe, seed)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    weights = trained(model)
    scores = {part: Gallery(*stored[part]).scores(encode) for part in ("validation", "test")}
    path = run_file(work, row, seed)
    if row.pretraining is not None:
        files.write(path.with_suffix(".safetensors"), "motion_study", model.model, {})
    result = {
        "row": dataclasses.asdict(row),
        "seed": seed,
        "parameters": sum(p.numel() for name, p in weights.items() if not name.startswith("head.")),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "sha256": files.digest(weights),
        **scores,
    }
    write_json(path, result, indent=1)
    shown = ", ".join(f"{key} {result['test'][key]:.1f}" for key in ("appearance", "time", "pair"))
    return f"{row.name}, seed {seed}: {shown}; {seconds:.0f} s"


if __name__ == "__main__":
    raise SystemExit(main())
