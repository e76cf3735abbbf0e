"""Weight files of every kind, mutated: each loads or is refused with a documented error, in bounded memory and time.

python -m tests.fuzz.weights --count 300 --out tests/fuzz/results/weights.json
"""

import argparse
import collections
import io
import json
import random
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import torch

from pyvidx import memory
from pyvidx.models import MALMM, BTAdapter, TextVideo, VideoEncoder
from pyvidx.models.umt import UMTConfig, UMTStudent
from pyvidx.weights.bt_adapter import load_official
from tests.peak import peak
from tests.test_checkpoints import CONFIG, mma_file, state, tower
from tests.test_weight_files import scripted

DOCUMENTED = (ValueError, FileNotFoundError)
MEMORY, SECONDS = 2 << 30, 20  # a case may take
NUMBERS = (b"0", b"-1", b"1", b"7", b"255", b"65536", b"1000000000", b"9223372036854775807", b"1e999", b'"4"', b"null")


def corpus(folder: Path) -> dict:
    """A small file of each kind, and what loads it."""
    policy = memory.create("merge", capacity=4, anchors=1)
    bank = policy.extend(policy.new(2, 3, 4), torch.randn(2, 20, 3, 4))
    torch.save(mma_file(), folder / "official.pth")
    scripted(state(*tower(6, 4))).save(str(folder / "torchscript.pt"))
    return {
        BTAdapter(CONFIG).save(folder / "bt_adapter.safetensors"): BTAdapter.from_pretrained,
        VideoEncoder.default("st_adapter").save(folder / "st_adapter.safetensors"): VideoEncoder.from_pretrained,
        VideoEncoder.default("grid_pool").save(folder / "grid_pool.safetensors"): VideoEncoder.from_pretrained,
        MALMM.default().save(folder / "malmm.safetensors"): MALMM.from_pretrained,
        TextVideo.default().save(folder / "text_video.safetensors"): TextVideo.load,
        UMTStudent(UMTConfig(8, 4, 16, 2, 2, 32)).save(folder / "umt.safetensors"): UMTStudent.from_pretrained,
        memory.save(folder / "memory.safetensors", policy, bank): memory.load,
        folder / "official.pth": load_official,
        folder / "torchscript.pt": load_official,
    }


def flip(data: bytes, rng: random.Random, start: int, end: int) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 32))):
        out[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def splice(data: bytes, rng: random.Random) -> bytes:
    """A piece of the file over another place, or inserted there."""
    a, b, size = rng.randrange(len(data)), rng.randrange(len(data)), rng.choice((1, 8, 64, 4096))
    return data[:a] + data[b : b + size] + data[a + rng.choice((0, size)) :]


def edit(text: bytes, rng: random.Random) -> bytes:
    """A number of a JSON text becomes another, or what is no number."""
    found = list(re.finditer(rb"(?<![\w.\"-])-?\d+(\.\d+)?(e-?\d+)?", text))
    number = rng.choice(found)
    return text[: number.start()] + rng.choice(NUMBERS) + text[number.end() :]


def mutated(data: bytes, rng: random.Random, zipped: bool) -> tuple[str, bytes]:
    if zipped:
        how = rng.choice(("record", "record", "flip", "cut", "splice"))
        if how == "record":
            return how, rezipped(data, rng)
        end = len(data)
    else:
        end = 8 + int.from_bytes(data[:8], "little")
        how = rng.choice(("number", "number", "header", "flip", "cut", "splice"))
        if how == "number":
            text = edit(data[8:end], rng)
            return how, len(text).to_bytes(8, "little") + text + data[end:]
    if how == "header":
        return how, flip(data, rng, 0, end)
    return how, flip(data, rng, 0, len(data)) if how == "flip" else cut(data, rng) if how == "cut" else splice(
        data, rng
    )


def rezipped(data: bytes, rng: random.Random) -> bytes:
    """Its pickle or another record mutated, with checksums that fit, so that readers get to see it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as theirs, zipfile.ZipFile(out, "w") as ours:
        names = theirs.namelist()
        chosen = next(n for n in names if n.endswith("data.pkl")) if rng.random() < 0.8 else rng.choice(names)
        for name in names:
            record = theirs.read(name)
            if name == chosen and record:
                record = rng.choice((cut, splice, lambda d, r: flip(d, r, 0, len(d))))(record, rng)
            ours.writestr(name, record)
    return out.getvalue()


def run(count: int, seed: int) -> dict:
    """Counts of what became of `count` mutated files, and the cases that went wrong."""
    rng, outcomes, wrong = random.Random(seed), collections.Counter(), []
    signal.signal(signal.SIGALRM, _too_slow)
    with tempfile.TemporaryDirectory() as name:
        files = {path: (load, path.read_bytes()) for path, load in corpus(Path(name)).items()}
        for path, (load, _) in files.items():
            load(path)  # what nobody mutated, and the imports of it
        _bound_memory()
        for i in range(count):
            path = list(files)[i % len(files)]
            load, data = files[path]
            how, changed = mutated(data, rng, data.startswith(b"PK"))
            path.write_bytes(changed)
            before, began = peak(), time.perf_counter()
            signal.alarm(SECONDS)
            try:
                load(path)
                outcome = "loaded"
            except DOCUMENTED as error:
                outcome = "refused"
                if path.name not in str(error):
                    wrong.append({"case": i, "file": path.name, "how": how, "what": f"no path: {error!r:.200}"})
            except BaseException as error:
                outcome = "wrong"
                wrong.append({"case": i, "file": path.name, "how": how, "what": f"{error!r:.300}"})
            finally:
                signal.alarm(0)
            grown = (peak() - before) >> 10
            if grown > 512:
                wrong.append({"case": i, "file": path.name, "how": how, "what": f"{grown} MiB"})
            outcomes[f"{path.name} {how} {outcome}"] += 1
            outcomes[outcome] += 1
            if time.perf_counter() - began > SECONDS / 4:
                wrong.append({"case": i, "file": path.name, "how": how, "what": "slow"})
    return {"count": count, "seed": seed, "torch": torch.__version__, "outcomes": dict(sorted(outcomes.items())),
            "wrong": wrong}  # fmt: skip


def _too_slow(*_) -> None:
    raise TimeoutError(f"longer than {SECONDS} s")


def _bound_memory() -> None:
    """The address space of now and 2 GiB more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main() -> int:
    p = argparse.ArgumentParser()
    p.add_argument("--count", type=int, default=300)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path)
    options = p.parse_args()
    torch.manual_seed(options.seed)
    warnings.simplefilter("ignore")
    found = run(options.count, options.seed)
    counts = {name: found["outcomes"].get(name, 0) for name in ("loaded", "refused", "wrong")}
    print(json.dumps({"counts": counts, "wrong": found["wrong"]}, indent=1))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
