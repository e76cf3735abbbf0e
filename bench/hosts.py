"""What a memory before a language model costs: python -m bench.hosts COMMAND [--out FILE.json]

    cost      beside the host's own encoder, at the sizes of real towers, on random weights
    session   a session over many frames: memory that the process holds, time per frame, an answer at every tenth

cost: a round is some steps by the encoder, then compress of a longer video whose encoder is left out (it returns
features made before), so all that is measured of compress is its own. Rounds follow each other, so that a machine that
drifts drifts for both; times are of the CPU, which other work disturbs least, and the least of the rounds.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from bench.long_run import checkpoints, resident_mib
from pyvidx.files import write_json
from pyvidx.hosts import Session, compress
from pyvidx.hosts.language import Prompt, host_of
from pyvidx.memory import Policy
from tests.hosts.chats import llava_onevision
from tests.hosts.tiny import IMAGE, TEXT, VIDEO
from tests.hosts.tiny_llava_onevision import ENTRY as TINY

SO400M = dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16)
IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=292, vision_end_token_id=293)


def text(width: int) -> dict:
    """A language model as wide as a real one, of one layer."""
    heads = dict(num_attention_heads=width // 128, num_key_value_heads=width // 128)
    return TEXT | heads | dict(hidden_size=width, intermediate_size=256, num_hidden_layers=1)


def onevision(small: bool):
    """LLaVA-OneVision 7B: SigLIP-so400m at 384, 196 tokens of 3584 per frame."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    vision = SO400M | dict(model_type="siglip_vision_model", num_hidden_layers=1 if small else 26)
    config = LlavaOnevisionConfig(
        vision_config=vision | dict(image_size=56 if small else 384, patch_size=14),
        text_config=dict(model_type="qwen2", **text(256 if small else 3584)), image_token_index=IMAGE,
        video_token_index=VIDEO, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    side = config.vision_config.image_size
    return LlavaOnevisionForConditionalGeneration(config), 4 if small else 196, lambda T: clip(T, side)


def video_llava(small: bool):
    """Video-LLaVA 7B: CLIP-L/14 at 224, 257 tokens of 4096 per frame."""
    from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

    vision = dict(model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_attention_heads=16,
                  num_hidden_layers=2 if small else 24, image_size=56 if small else 224, patch_size=14)  # fmt: skip
    config = VideoLlavaConfig(
        vision_config=vision, text_config=dict(model_type="llama", **text(256 if small else 4096)),
        image_token_index=IMAGE, video_token_index=VIDEO, vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    side = vision["image_size"]
    return VideoLlavaForConditionalGeneration(config), 17 if small else 257, lambda T: clip(T, side)


def qwen3_vl(small: bool):
    """Qwen3-VL 8B at 448: 196 tokens of 4096 per two frames, on four levels."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    width, side = (256, 4) if small else (4096, 28)
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[24, 20, 20], mrope_interleaved=True)
    vision = dict(
        depth=3 if small else 27, hidden_size=1152, intermediate_size=4304, num_heads=16, out_hidden_size=width,
        patch_size=16, deepstack_visual_indexes=[0, 1, 2] if small else [8, 16, 24],
    )  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text(width) | {"rope_parameters": rope, "head_dim": 128}, vision_config=vision, **IDS
    )

    def inputs(T: int) -> dict:
        patches = torch.randn(T * side * side, 3 * 2 * 16 * 16)
        return {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([[T, side, side]])}

    return Qwen3VLForConditionalGeneration(config), side * side // 4, inputs


def clip(T: int, side: int) -> dict:
    return {"pixel_values_videos": torch.randn(1, T, 3, side, side)}


def prompt(kind: str, T: int, P: int) -> Tensor:
    """The ids of a video of T steps."""
    if kind == "qwen3_vl":
        body = [token for t in range(T) for token in (30, 20 + t // 10, 20 + t % 10, 31, 292, *[VIDEO] * P, 293)]
        return torch.tensor([[5, 292, *body, 293, 7]])
    return torch.tensor([[5, *[VIDEO] * (T * P + (kind == "llava_onevision")), 7]])


HOSTS = {"llava_onevision": onevision, "video_llava": video_llava, "qwen3_vl": qwen3_vl}


def random_(model) -> None:
    """Weights of the size that trained ones have; those of transformers take minutes at this size."""
    for x in model.parameters():
        x.fill_(1) if x.dim() == 1 else x.normal_(std=0.02)


def seconds_of(call: Callable[[], object]) -> float:
    """Of the CPU, of all threads."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def cost(kind: str, frames: int, capacities: Sequence[int], rounds: int, small: bool) -> list[dict]:
    """compress of `frames` steps beside its encoder."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model, P, inputs_of = HOSTS[kind](small)
    random_(model.eval())
    host = host_of(model)

    def inputs(T: int) -> dict:
        ids = prompt(kind, T, P)
        types = {"mm_token_type_ids": (ids == VIDEO) * 2} if kind == "qwen3_vl" else {}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | types | inputs_of(T)

    short, long = inputs(1), inputs(frames)
    (place,) = host.videos(short, Prompt.of(short))
    levels = host.encode(short, place, 0, 1)
    made = [x + 0.3 * x.std() * torch.randn(frames, *x.shape[1:]) for x in levels]
    encoder: list[float] = []
    whole: dict[int, list[float]] = {M: [] for M in capacities}
    bank: dict[int, list[float]] = {M: [] for M in capacities}
    spent: list[float] = []
    extend = Policy.extend

    def timed(*args, **kwargs):
        begin = time.process_time()
        found = extend(*args, **kwargs)
        spent.append(time.process_time() - begin)
        return found

    def left_out(self, inputs, place, start, stop):
        return [x[start:stop] for x in made]

    for _ in range(rounds + 1):  # the first warms up
        encoder.append(seconds_of(lambda: host.encode(short, place, 0, 1)))
        for M in capacities:
            spent.clear()
            with mock.patch.object(type(host), "encode", left_out), mock.patch.object(Policy, "extend", timed):
                whole[M].append(seconds_of(partial(compress, model, long, "merge", capacity=M)) / frames)
            bank[M].append(sum(spent) / frames)
    best = min(encoder[1:])
    return [
        {
            "host": kind, "P": P, "C": levels[0].shape[-1], "levels": len(levels), "frames": frames, "capacity": M,
            "rounds": rounds, "encoder_ms": 1e3 * best, "bank_ms": 1e3 * min(bank[M][1:]),
            "compress_ms": 1e3 * min(whole[M][1:]), "share": min(whole[M][1:]) / best,
            "share_of_medians": statistics.median(whole[M][1:]) / statistics.median(encoder[1:]),
        }
        for M in capacities
    ]  # fmt: skip


def session(frames: int, chunk: int) -> list[dict]:
    """Frames in chunks to a tiny model, a question at every tenth of them."""
    model, rows = TINY.model(), []
    watching = Session(model, llava_onevision(), "merge", capacity=16)
    generator, marks, before = torch.Generator().manual_seed(0), checkpoints(frames), 0
    for mark in marks:
        begin = time.process_time()
        for start in range(before, mark, chunk):
            n = min(chunk, mark - start)
            shown = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
            watching.push(shown, [(start + i) / 2 for i in range(n)])
        taken = time.process_time() - begin
        answer = watching.ask("What now?", max_new_tokens=4, do_sample=False, pad_token_id=0)
        if watching.frames != mark or len(answer.slots) > 16 or answer.slots[-1][1] != (mark - 1) / 2:
            raise RuntimeError(f"hosts: a session of {mark} frames says {watching} and {answer.slots}")
        rows.append({"frames": mark, "resident_mib": round(resident_mib(), 1),
                     "ms_per_frame": round(1e3 * taken / (mark - before), 3)})  # fmt: skip
        before = mark
    return rows


def main(argv: Sequence[str] | None = None) -> dict:
    p = argparse.ArgumentParser(prog="python -m bench.hosts", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    p.add_argument("command", choices=["cost", "session"])
    p.add_argument("--hosts", nargs="+", choices=list(HOSTS), default=list(HOSTS))
    p.add_argument("--frames", type=int, help="default: 64 steps of cost, 100000 of session")
    p.add_argument("--capacity", type=int, nargs="+", default=[16, 32])
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--small", action="store_true", help="tiny sizes: does it still run?")
    p.add_argument("--out", type=Path, help="added to what is there")
    options = p.parse_args(argv)
    torch.manual_seed(0)
    with torch.inference_mode():
        if options.command == "session":
            rows = session(options.frames or 100_000, 100)
        else:
            rows = []
            for kind in options.hosts:
                rows += cost(kind, options.frames or 64, options.capacity, options.rounds, options.small)
    import transformers

    result = {
        "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__,
        "transformers": transformers.__version__, "threads": torch.get_num_threads(), "load": os.getloadavg(),
        "rows": rows,
    }  # fmt: skip
    if options.out:
        others = json.loads(options.out.read_text()) if options.out.exists() else {}
        write_json(options.out, others | {options.command: result}, indent=1)
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
