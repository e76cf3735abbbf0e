"""What only long streams show: python -m bench.long_run COMMAND --frames N [--out FILE.json]

memory  peak memory and time per frame of MA-LMM's stream at its real sizes, over thousands of frames of features
drift   how far 16-bit weights and banks come from float32 along a stream
video   a synthetic video from the file to the answer: memory while it streams
clip    whole clips of T = 100 frames at the real sizes, M = 10, 20, 40: the official algorithm, stream, clip
"""

import argparse
import json
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pyvidx.backbones.vit import EVA_G
from pyvidx.files import write_json
from pyvidx.memory.qformer import QFormerConfig
from pyvidx.models import MALMM, MALMMConfig
from pyvidx.ops.memory_merge import in_order, memory_merge_, new_state

TEXT, CHECKPOINTS = 12, 10


def main(argv: Sequence[str] | None = None) -> dict:
    p = argparse.ArgumentParser(prog="python -m bench.long_run", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    p.add_argument("command", choices=["memory", "drift", "video", "clip"])
    p.add_argument("--frames", type=int, help="default: 5000, 10000, 20 minutes at 10 frames per second, 100")
    p.add_argument("--small", action="store_true", help="tiny sizes: does it still run?")
    p.add_argument("--rounds", type=int, default=3, help="of clip")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--out", type=Path)
    options = p.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    result = {"command": options.command, "machine": platform.processor() or platform.machine()}
    result |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    runs = {
        "memory": (memory, 5000),
        "drift": (drift, 10_000),
        "video": (video, 12_000),
        "clip": (partial(clip, rounds=options.rounds), 100),
    }
    run, frames = runs[options.command]
    with torch.inference_mode():
        result |= run(options.frames or frames, options.small)
    if options.out:
        write_json(options.out, result, indent=1)
    print(json.dumps(result, indent=1))
    return result


def resident_mib() -> float:
    """Memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def check_finite(tokens: Tensor, frames: int) -> None:
    if not tokens.isfinite().all():
        raise RuntimeError(f"long_run: the tokens after {frames} frames are not finite")


def checkpoints(frames: int) -> list[int]:
    """Ten numbers of frames, the last of them all."""
    return [max(1, frames * (i + 1) // CHECKPOINTS) for i in range(CHECKPOINTS)]


def memory(frames: int, small: bool) -> dict:
    """One frame after the other, M = 20, an answer at every tenth of the stream."""
    # No image encoder, which is not looked at here, and no temporal table, which has an end.
    config = MALMMConfig(replace(EVA_G, layers=0), QFormerConfig(vocab=100), llm_width=8, time_length=0)
    model = MALMM(MALMMConfig.tiny(time_length=0) if small else config).eval()
    P, C, M = 1 + model.config.vision.patches, model.config.vision.width, 4 if small else 20
    memories = model.start(model.prompt(torch.randint(0, 50, (1, TEXT))), length=M)
    base, times, rows = torch.randn(1, P, C), [], []
    marks = set(checkpoints(frames)) | {2 * M}
    for t in range(frames):
        frame = base + 0.5 * torch.randn(1, P, C)
        begin = time.perf_counter()
        memories = model.push(memories, frame)
        times.append(time.perf_counter() - begin)
        if t + 1 in marks:
            answer = model.ask(memories)
            recent = times[-max(1, frames // CHECKPOINTS) :]
            rows.append({"frames": t + 1, "resident_mib": round(resident_mib(), 1),
                         "ms_per_frame": round(1000 * statistics.median(recent), 3)})  # fmt: skip
            check_finite(answer, t + 1)
    sizes = memories.visual.sizes.sum(-1)
    if not (sizes == frames).all():
        raise RuntimeError(f"long_run: the visual bank counts {sizes.unique().tolist()} frames of {frames}")
    return {"M": M, "P": P, "C": C, "rows": rows}


def streams(kind: str, frames: int, N: int, C: int) -> Iterator[Tensor]:
    """[1, N, C] frames: "iid" noise, "scenes" that change every 50 frames, or a "static" picture with faint noise."""
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(1, N, C, generator=generator)
    for t in range(frames):
        if kind == "scenes" and t % 50 == 0 or kind == "iid":
            base = torch.randn(1, N, C, generator=generator)
        noise = torch.randn(1, N, C, generator=generator)
        yield base + {"iid": 0.0, "scenes": 0.3, "static": 0.02}[kind] * noise


def drift(frames: int, small: bool) -> dict:
    """Banks alone against a float32 bank fed the same rounded frames; then a whole Q-Former against float32."""
    banks, tokens = [], []
    for kind in ("iid", "scenes", "static"):
        for dtype in (torch.float16, torch.bfloat16):
            banks.append({"stream": kind, "bank": str(dtype)[6:]} | bank_drift(kind, dtype, frames, small))
    variants = (
        ("float16", "float32"),
        ("float16", "float16"),
        ("bfloat16", "float32"),
        ("bfloat16", "bfloat16"),
        ("float32", "float16"),
    )
    for kind in ("scenes", "iid"):
        tokens += token_drift(kind, variants, frames, small)
    return {"frames": frames, "banks": banks, "tokens": tokens}


def bank_drift(kind: str, dtype: torch.dtype, frames: int, small: bool) -> dict:
    N, C, M = (4, 32, 4) if small else (12, 1408, 20)
    wide, narrow = new_state(1, M, N, C), new_state(1, M, N, C, dtype)
    together, first, errors = torch.ones(1, N, dtype=torch.bool), None, {}
    marks = set(checkpoints(frames))
    for t, frame in enumerate(streams(kind, frames, N, C)):
        frame = frame.to(dtype)
        same = memory_merge_(*wide[:5], frame.float()) == memory_merge_(*narrow[:5], frame)
        together &= same
        first = t if first is None and not same.all() else first
        if t + 1 in marks and together.any():
            exact, found = (in_order(state)[0].float()[:, :, together[0]] for state in (wide, narrow))
            errors[t + 1] = float((found - exact).norm() / exact.norm())
    counted = wide.sizes.sum(-1).eq(frames).all() and narrow.sizes.sum(-1).eq(frames).all()
    if not counted:
        raise RuntimeError(f"long_run: a bank of {kind} does not count {frames} frames")
    return {"positions": N, "other_choices": int((~together).sum()), "first_at": first, "relative_error": errors}


def token_drift(kind: str, variants: Sequence[tuple[str, str]], frames: int, small: bool) -> list[dict]:
    """Relative error of the query tokens, ten times along the stream, of (weights, bank) dtypes."""
    config = MALMMConfig.tiny(time_length=0) if small else MALMMConfig(
        replace(EVA_G, image_size=42, width=1408, layers=0),
        QFormerConfig(width=384, heads=6, layers=4, mlp_width=1536, vocab=100), 8, 0)  # fmt: skip
    torch.manual_seed(1)
    exact = MALMM(config).eval()
    with torch.no_grad():  # attention that looks at something, as a trained one does
        exact.qformer.keys_values.weight.mul_(3)
    ids, M, chunk = torch.randint(0, 50, (1, TEXT)), 4 if small else 20, 32
    models, memories = {}, {}
    for variant in (("float32", "float32"), *variants):
        dtype, bank = (getattr(torch, name) for name in variant)
        model = MALMM(config).eval()
        model.load_state_dict(exact.state_dict())
        models[variant] = model.to(dtype)
        memories[variant] = model.start(model.prompt(ids), length=M, bank_dtype=bank)
    errors: dict[tuple[str, str], list[float]] = {variant: [] for variant in variants}
    N, C = 1 + config.vision.patches, config.vision.width
    source = streams(kind, frames, N, C)
    before = 0
    for mark in checkpoints(frames):
        for begin in range(before, mark, chunk):
            clip = torch.stack([next(source) for _ in range(min(chunk, mark - begin))], dim=1)
            for variant, model in models.items():
                dtype = getattr(torch, variant[0])
                memories[variant] = model.push(memories[variant], clip.to(dtype))
        before = mark
        want, *found = (model.ask(memories[variant]).float() for variant, model in models.items())
        for variant, tokens in zip(variants, found):
            errors[variant].append(float((tokens - want).norm() / want.norm()))
    return [
        {"stream": kind, "weights": weights, "bank": bank, "median": statistics.median(e), "max": max(e), "errors": e}
        for (weights, bank), e in errors.items()
    ]


def video(frames: int, small: bool) -> dict:
    """A square that wanders over a slowly changing ground, at 10 frames per second, through a small model."""
    from pyvidx.preprocess import clip_preprocess
    from pyvidx.video import stream, write

    model = MALMM(MALMMConfig.tiny(time_length=0)).eval()
    size = model.config.vision.image_size

    def pictures() -> Iterator[Tensor]:
        for t in range(frames):
            picture = torch.full((64, 96, 3), t * 200 // frames, dtype=torch.uint8)
            at = t * 7 % 80
            picture[20:36, at : at + 16] = torch.tensor([255, 40, 40], dtype=torch.uint8)
            yield picture

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.mp4"
        write(path, pictures(), fps=10)
        memories = model.start(model.prompt(torch.tensor([[3, 7, 9]])), length=10)
        rows, marks, seen = [], checkpoints(frames), 0
        for clip in stream(path):
            memories = model.push(memories, model.features(clip_preprocess(clip.frames, size))[None])
            seen += len(clip.frames)
            if seen >= marks[0]:
                marks = [mark for mark in marks if mark > seen] or [frames + 1]
                check_finite(model.ask(memories), seen)
                rows.append({"frames": seen, "resident_mib": round(resident_mib(), 1)})
        sizes = memories.visual.sizes.sum(-1)
        if seen != frames or not (sizes == frames).all():
            raise RuntimeError(f"long_run: {frames} frames written, {seen} read, {sizes.unique().tolist()} in the bank")
    return {"minutes": frames / 600, "rows": rows}


def clip(frames: int, small: bool, rounds: int) -> dict:
    """Features to the query tokens at the last frame, from empty memories: all three in turn, round by round."""
    from bench.bench_malmm import models

    model, reference = models("small" if small else "real", "cpu")
    P, C, Q = 1 + model.config.vision.patches, model.config.vision.width, model.config.qformer.queries
    features = torch.randn(1, 1, P, C) + 0.5 * torch.randn(1, frames, P, C)
    ids, mask = torch.randint(0, 50, (1, TEXT)), torch.ones(1, TEXT)

    def official(M: int) -> Tensor:
        state, x = reference.start(), None
        for t in range(frames):
            x, state = reference.step(state, features[:, t], t, ids, mask, M, last=t == frames - 1)
        return x[:, :Q]

    def stream(M: int) -> Tensor:
        memories = model.start(model.prompt(ids), length=M)
        for t in range(frames):
            memories = model.push(memories, features[:, t])
        return model.ask(memories)

    def whole(M: int) -> Tensor:
        return model.encode(features, model.prompt(ids), length=M)

    contenders, rows = {"official": official, "stream": stream, "clip": whole}, []
    for M in (4,) if small else (10, 20, 40):
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        tokens: dict[str, Tensor] = {}
        for _ in range(rounds):
            for name, contender in contenders.items():
                begin = time.perf_counter()
                tokens[name] = contender(M)
                seconds[name].append(time.perf_counter() - begin)
        scale = tokens["official"].abs().max()
        rows.append({"M": M, "seconds": {name: [round(s, 3) for s in taken] for name, taken in seconds.items()}} | {
            name: {"ratio": round(statistics.median(a / b for a, b in zip(seconds["official"], seconds[name])), 2),
                   "difference": float((tokens[name] - tokens["official"]).abs().max() / scale)}
            for name in ("stream", "clip")
        })  # fmt: skip
    return {"T": frames, "P": P, "C": C, "rounds": rounds, "rows": rows}


if __name__ == "__main__":
    main()
