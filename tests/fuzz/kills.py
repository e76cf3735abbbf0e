"""kill -9 at random moments of training runs that are then resumed: the same bits as runs that nobody disturbed.

    python -m tests.fuzz.kills --kills 50 --seed 0 --out tests/fuzz/results/kills-DATE.json

Every run is the command on clips of pyvidx.data.motion, in a session of its own: forked from here, where torch is
imported already, or, one of ten, as a new interpreter. A moment is the n-th sign in the run's files (a row, a
checkpoint that is being written, ...) and some milliseconds more. After a kill nothing of the session may live on, and
at the end weights, checkpoint, losses, exported weights and the list of broken videos are compared.
"""

import argparse
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pyvidx.__main__ import main as pyvidx_main
from pyvidx.data import motion
from pyvidx.files import write_json
from pyvidx.models import MALMM
from pyvidx.video import write
from pyvidx.weights.mma_export import export_mma
from tests.torchvision_shim import mend_torchvision

VIDEOS = 8
PATIENCE = 300  # seconds that a run may take on a machine that does other things too
ORPHANS = 30  # seconds that the children of a killed run may live; torch's workers look for their parent every 5

# python -m pyvidx, where the torchvision of PyPI may be beside a torch for CPUs.
COMMAND = """
import sys
from pyvidx.__main__ import main
from tests.torchvision_shim import mend_torchvision
mend_torchvision()
sys.exit(main())
"""

# What a run is seen doing: a folder of it and a pattern of files; of loss.jsonl every size is a sign.
SIGNS = {
    "step": ("out", "loss.jsonl"),
    "checkpoint": ("out", ".checkpoint.*.part.pt"),
    "best weights": ("out", ".best.*.part.safetensors"),
    "end of an epoch": ("out", ".loss.*.part.png"),
    "last weights": ("out", ".last.*.part.safetensors"),
    "export": ("out", ".tuned.*.part.*"),
    "features": ("stored", ".0*.part.safetensors"),
    "index of features": ("stored", ".index.*.part.json"),
}
# name -> kind of training, changes of its configuration and of its recipe, and suffix of --export.
RUNS = {
    "pretraining": ("pretrain", {}, {}, ".pth"),
    "malmm": ("malmm", {}, {"save_every": 2}, ".pth"),
    "pretraining from stored features": ("pretrain", {"features": True}, {"save_every": 2}, ".safetensors"),
    "malmm, float16": ("malmm", {}, {"amp": "float16"}, ".safetensors"),
    "pretraining with a worker": ("pretrain", {}, {"workers": 1, "save_every": 2}, ".safetensors"),
}


def main(argv: list[str] | None = None) -> dict:
    p = argparse.ArgumentParser(prog="python -m tests.fuzz.kills", description=__doc__.splitlines()[0])
    p.add_argument("--kills", type=int, default=50)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    p.add_argument("--folder", type=Path, help="where to run, an empty one that is kept; default: one that is not")
    p.add_argument("--out", type=Path)
    options = p.parse_args(argv)
    draws, kills, completed = random.Random(options.seed), [], 0
    with tempfile.TemporaryDirectory() as temporary:
        world = World(options.folder or Path(temporary))
        wanted = {name: world.run(name, f"undisturbed {name}", lambda: None)[0] for name in options.runs}
        while len(kills) < options.kills:
            name = options.runs[completed % len(options.runs)]
            left = min(options.kills - len(kills), draws.randint(3, 8))
            out, done = world.run(name, f"killed-{completed}", lambda: Moment.drawn(draws), left)
            kills += done
            same(wanted[name], out)
            completed += 1
    result = {
        "kills": len(kills), "runs that gave the same": completed, "seed": options.seed, "torch": torch.__version__,
        "moments": {m: sum(k["moment"] == m for k in kills) for m in ("start", *SIGNS)},
        "longest life of a child, seconds": max((k["orphans"] for k in kills), default=0.0),
        "list": kills,
    }  # fmt: skip
    if options.out:
        write_json(options.out, result, indent=1)
    print({k: v for k, v in result.items() if k != "list"})
    return result


class Moment(NamedTuple):
    """When to kill: `delay` seconds after the `sign`-th sign; cold: of a new interpreter."""

    sign: int
    delay: float
    cold: bool

    @classmethod
    def drawn(cls, draws: random.Random) -> "Moment":
        cold, sign = draws.random() < 0.1, draws.choice([0, 1, 2, 3, 5, 8, 12])
        if sign == 0:
            return cls(0, draws.uniform(0, 8 if cold else 1), cold)
        return cls(sign, draws.choice([0, draws.uniform(0, 0.003), draws.uniform(0, 0.05)]), cold)


class World:
    """Videos, weights and configurations in a folder, and runs of them."""

    def __init__(self, folder: Path):
        mend_torchvision()
        torch.set_num_threads(1)  # a fork has no other threads
        from tests.test_language import causal_lm, tokenizer
        from tests.test_train_pretrain import step

        for module in ("matplotlib.figure", "torch.utils.tensorboard", "pyvidx.train.pretrain", "pyvidx.train.malmm"):
            importlib.import_module(module)  # once for all forks

        self.folder = folder
        scenes = motion.random_scenes(VIDEOS, seed=5)
        (folder / "videos").mkdir()
        for i, scene in enumerate(scenes):
            path = folder / f"videos/{i}.mp4"
            write(path, motion.render(scene, 8, 32))
            path.with_suffix(".txt").write_text(motion.caption(scene))
        (folder / "videos/3.mp4").write_bytes(b"this is not a video" * 100)
        first = step()
        first.model.save(folder / "bt.safetensors")
        save_file({n: v for n, v in export_mma(first).items() if n.startswith("text_")}, folder / "text.safetensors")
        causal_lm().save_pretrained(folder / "lm")
        tokenizer().save_pretrained(folder / "lm")
        tokenizer(bos=False).save_pretrained(folder / "words")
        padded = tokenizer()
        padded.pad_token = "</s>"
        padded.save_pretrained(folder / "captions")
        MALMM.default().save(folder / "ma.safetensors")
        answers = ["red", "blue", "running", "eggs"] * 2
        rows = [{"video": f"{i}.mp4", "prompt": "what is the color ?", "answer": a} for i, a in enumerate(answers)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(self, name: str, out: Path) -> tuple[str, Path, Path]:
        """The kind of a run, its configuration's file, and that of --export."""
        kind, changes, recipe, suffix = RUNS[name]
        own = {"epochs": 3, "batch": 4, "peak_lr": 1e-3, "start_lr": 1e-4, "amp": "bfloat16", "save_every": 1}
        values = {"out": str(out / "out"), "frames": 4, "recipe": own | recipe} | changes
        if kind == "pretrain":
            videos = {"kind": "folder", "root": str(self.folder / "videos")}
            values |= {"train": videos, "held_out": videos, "weights": str(self.folder / "bt.safetensors"),
                       "text": str(self.folder / "text.safetensors"), "heads": [2, 2], "drop_path": 0.5,
                       "tokenizer": str(self.folder / "captions")}  # fmt: skip
        else:
            rows = str(self.folder / "rows.jsonl")
            values |= {"train": rows, "held_out": rows, "root": str(self.folder / "videos"), "memory": {"length": 2},
                       "weights": str(self.folder / "ma.safetensors"), "language": str(self.folder / "lm"),
                       "text_tokenizer": str(self.folder / "words"), "language_dtype": "float32"}  # fmt: skip
        if "features" in values:
            values["features"] = {"folder": str(out / "stored"), "shard": 2, "variants": 2}
        out.mkdir(exist_ok=True)
        path = out / "run.json"
        path.write_text(json.dumps(values))
        return kind, path, out / f"out/tuned{suffix}"

    def run(self, name: str, out: str, when: Callable[[], Moment | None], kills: int = 0) -> tuple[Path, list[dict]]:
        """Start a run again until it ends by itself, killing it `kills` times at most."""
        out = self.folder / out
        kind, config, export = self.config(name, out)
        words = ["train", kind, "--config", str(config), "--device", "cpu", "--export", str(export)]
        done = []
        while True:
            at = when() if len(done) < kills else None
            before = _signs(out)
            with (out / "log.txt").open("a") as log:
                child = Child(words, log, at is not None and at.cold)
            moment = at and _kill(child, at, out, before)
            child.wait()
            if moment is None or child.code != -signal.SIGKILL:
                if child.code:
                    raise AssertionError(f"{name} ended with {child.code}: {(out / 'log.txt').read_text()[-3000:]}")
                return out, done
            parts = [path.name.split(".")[1] for path in out.rglob(".*.part.*")]
            done.append({"run": name, "moment": moment, "sign": at.sign, "after": round(at.delay, 4), "cold": at.cold,
                         "steps": _steps(out), "parts": parts, "orphans": _wait_for_orphans(child.pid)})  # fmt: skip


class Child:
    """A command in a session of its own. code: as of subprocess, None while it runs."""

    def __init__(self, words: list[str], log: TextIO, cold: bool):
        self.code = None
        if cold:
            command = [sys.executable, "-c", COMMAND, *words]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            self.pid = self.process.pid
            return
        self.process, self.pid = None, os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.setsid()
                os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
                sys.argv = ["pyvidx", *words]
                code = pyvidx_main()
            except SystemExit as ended:
                code = ended.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code or 0)

    def ended(self, block: bool = False) -> bool:
        if self.code is None and self.process is not None:
            self.code = self.process.wait(PATIENCE) if block else self.process.poll()
        elif self.code is None:
            pid, status = os.waitpid(self.pid, 0 if block else os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait(self) -> None:
        self.ended(block=True)


def same(wanted: Path, out: Path) -> None:
    """Raise AssertionError unless what two runs wrote is the same to the bit, but for times and places."""
    names, found = ({p.name for p in (folder / "out").iterdir()} for folder in (wanted, out))
    assert names == found, f"missing: {sorted(names - found)}, left: {sorted(found - names)}"
    for path in (wanted / "out").iterdir():
        if path.suffix not in (".png", ""):  # pictures and TensorBoard's folder
            assert _content(path) == _content(out / "out" / path.name), path.name
    left = [path.name for path in out.rglob("*.part*")]
    assert not left, f"parts of files are left: {left}"


def _content(path: Path):
    """What is the same whenever a run is."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:  # which writes its metadata in any order
            return file.metadata(), _bits({name: file.get_tensor(name) for name in file.keys()})
    if path.suffix in (".pt", ".pth"):
        return _bits(torch.load(path, weights_only=True))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def _bits(value):
    """Tensors as their dtypes and bytes."""
    if isinstance(value, dict):
        return {name: _bits(part) for name, part in value.items()}
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return [_bits(part) for part in value] if isinstance(value, (list, tuple)) else value


def _kill(child: Child, at: Moment, out: Path, before: set) -> str | None:
    """Kill at the moment; the name of its sign, or None if the run had ended by itself."""
    start, count, name = time.perf_counter(), 0, "start"
    while count < at.sign and not child.ended() and time.perf_counter() - start < PATIENCE:
        now = _signs(out)
        new = sorted(now - before)
        count, name = count + len(new), new[-1][0] if new else name
        before |= now
        time.sleep(0.0005)  # a part of a file is there for some milliseconds
    time.sleep(at.delay)
    if child.ended():
        return None
    os.kill(child.pid, signal.SIGKILL)
    return name


def _signs(out: Path) -> set[tuple[str, str]]:
    """(name, what is new of it) of the signs there are now."""
    found = set()
    for name, (folder, pattern) in SIGNS.items():
        try:
            for path in (out / folder).glob(pattern):
                found.add((name, str(path.stat().st_size) if name == "step" else path.name))
        except FileNotFoundError:  # gone meanwhile
            pass
    return found


def _wait_for_orphans(session: int) -> float:
    """Seconds until no process of a session is left."""
    start = time.perf_counter()
    while living := _session(session):
        if time.perf_counter() - start > ORPHANS:
            for pid in living:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"children outlive a killed run by {ORPHANS} s: {living}")
        time.sleep(0.05)
    return round(time.perf_counter() - start, 2)


def _session(number: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) == number and state != "Z":
            found.append(int(stat.parent.name))
    return found


def _steps(out: Path) -> int:
    path = out / "out/loss.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


if __name__ == "__main__":
    main()
