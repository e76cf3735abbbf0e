"""Video files to embeddings against a plain script: python -m bench.files_to_embeddings --out FILE.json

    pyvidx        encode_videos with a folded encoder: a process reads ahead, its frames are resized and encoded
    pyvidx, int8  the same with the encoder in 8 bits
    script        what one writes by hand: decord, CLIPImageProcessor, CLIPVisionModelWithProjection, mean over frames

The same CLIP tower, the same frames of the same clips, the same cores. Each contender is a process of its own, and they
take turns, all clips of one resolution a turn; the first turn of each is not counted. wall is what decides on a machine
without other work; cpu, of the process and its children, is what other work disturbs least.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.encode_workers import clips, cpu
from bench.towers import about, frames_of, transformers_tower
from pyvidx.corpus.encode import encode_videos
from pyvidx.files import check_output, write_json
from pyvidx.hosts.huggingface import vision_tower
from pyvidx.models.config import BTAdapterConfig
from pyvidx.video import sampling
from tests.torchvision_shim import mend_torchvision

ROOT = Path(__file__).parents[1]
FRAMES = 8
HEIGHTS = (360, 720)  # those of encode_workers.clips


Encode = Callable[[list[str]], Iterator[Tensor]]


def pyvidx(tower: nn.Module, precision: str = "float") -> Encode:
    model = frames_of(vision_tower(tower)).fold(precision=precision)

    def encode(paths: list[str]) -> Iterator[Tensor]:
        for result in encode_videos(paths, model, frames=FRAMES, outputs=("pooled",)):
            if result.error is not None:
                raise RuntimeError(f"files_to_embeddings: {result.path}: {result.error}")
            yield result.encoding.pooled[0]

    return encode


def script(tower: nn.Module) -> Encode:
    import decord
    from transformers import CLIPImageProcessor

    side = tower.config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    @torch.inference_mode()
    def encode(paths: list[str]) -> Iterator[Tensor]:
        for path in paths:
            reader = decord.VideoReader(path)
            frames = reader.get_batch(sampling.uniform(len(reader), FRAMES).numpy()).asnumpy()
            pixels = processor(images=list(frames), return_tensors="pt")["pixel_values"]
            yield tower(pixel_values=pixels).image_embeds.mean(dim=0)

    return encode


CONTENDERS = {"pyvidx": pyvidx, "pyvidx, int8": functools.partial(pyvidx, precision="int8"), "script": script}


def serve(name: str, size: str, threads: int) -> None:
    """Encode the paths of each line of input; print seconds of wall and CPU, and the embeddings of the first clip."""
    mend_torchvision()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    encode = CONTENDERS[name](transformers_tower(BTAdapterConfig.named(size)))
    print("ready", flush=True)
    for line in sys.stdin:
        began, used = time.perf_counter(), cpu()
        found = list(encode(json.loads(line)))
        seconds = [time.perf_counter() - began, cpu() - used]
        print(json.dumps([*seconds, found[0].tolist()]), flush=True)


class Contender:
    def __init__(self, name: str, size: str, cores: int):
        code = f"from bench.files_to_embeddings import serve; serve({name!r}, {size!r}, {cores})"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(cores)}
        chosen = sorted(os.sched_getaffinity(0))[:cores]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, chosen),
        )  # fmt: skip
        self.answer()

    def answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("files_to_embeddings: a contender ended; its error stands above")
        return line

    def encode(self, paths: list[str]) -> tuple[float, float, Tensor]:
        print(json.dumps(paths), file=self.process.stdin, flush=True)
        wall, used, first = json.loads(self.answer())
        return wall, used, torch.tensor(first)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(size: str, cores: int, paths: dict[int, list[str]], rounds: int) -> list[dict]:
    running = {name: Contender(name, size, cores) for name in CONTENDERS}
    times = {(height, name): [] for height in paths for name in CONTENDERS}
    rows = []
    try:
        first = {(height, name): running[name].encode(paths[height][:1])[2] for height, name in times}
        before = os.getloadavg()[0]
        for turn in range(rounds):
            for height, name in list(times)[:: 1 if turn % 2 else -1]:
                times[height, name].append(running[name].encode(paths[height])[:2])
    finally:
        for contender in running.values():
            contender.close()
    for height, name in times:
        cosine = torch.cosine_similarity(first[height, name], first[height, "script"], dim=0).item()
        if cosine < 0.995:
            raise RuntimeError(f"files_to_embeddings: {name} must give the script's embedding, got cosine {cosine}")
        row = {"size": size, "cores": cores, "height": height, "name": name, "cosine": cosine}
        row |= {"clips": len(paths[height]), "rounds": rounds, "load_before": before, "load_after": os.getloadavg()[0]}
        for i, what in enumerate(("wall", "cpu")):
            ours, theirs = ([t[i] / len(paths[height]) for t in times[height, n]] for n in (name, "script"))
            row |= {f"{what}_s_per_clip": statistics.median(ours), f"{what}_range": [min(ours), max(ours)]}
            row |= {f"{what}_gain": statistics.median(theirs) / statistics.median(ours)}
            row |= {f"{what}_gain_of_least": min(theirs) / min(ours)}
        rows.append(row)
        print(
            f"{size} cores={cores} {height}p {name}: {row['wall_s_per_clip']:.2f} s a clip, {row['wall_gain']:.2f}x as "
            f"fast as the script, by CPU time {row['cpu_gain']:.2f}x",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.files_to_embeddings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=["clip-b-16"], help="as BTAdapterConfig.named takes them")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--clips", type=int, default=4, help="of each resolution")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a clip")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    check_output(options.out)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        made = clips(Path(folder), options.clips * len(HEIGHTS), options.seconds)
        paths = {height: made[i :: len(HEIGHTS)] for i, height in enumerate(HEIGHTS)}
        for cores in options.cores:
            for size in options.sizes:
                found += measure(size, cores, paths, options.rounds)
                write_json(options.out, {"about": about() | {"of_s": options.seconds}, "results": found}, indent=1)


if __name__ == "__main__":
    main()
