"""pyvidx demo [VIDEO]: one video through the whole library, with a picture and a speed test."""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvidx.cli import arguments
from pyvidx.cli.encode import folded
from pyvidx.cli.models import load
from pyvidx.corpus.encode import Timing, encode_videos
from pyvidx.data import motion
from pyvidx.files import printable
from pyvidx.models import BTAdapter, BTAdapterConfig, TextVideo
from pyvidx.pictures import drawn
from pyvidx.preprocess import clip_preprocess
from pyvidx.reference.bt_adapter import ReferenceBTAdapter
from pyvidx.video import Clip, read

# No training had a green cross, neither the CLIP's nor the branch's, only other green shapes and other crosses. It is
# one of the new objects that so small a CLIP tells well; a red circle it takes for a square.
SCENE = motion.Scene("horizontal", (("green", "cross"),), "black", forward=False, seed=7)
CAPTIONS = (
    "the green cross moves left",
    "the green cross moves right",
    "the green cross moves up",
    "the green cross grows",
    "the green cross disappears",
    "the green square moves left",
    "the blue cross moves left",
    "the blue cross moves right",
)


def parser() -> argparse.ArgumentParser:
    p = arguments.Parser(prog="pyvidx demo", description=__doc__, example="pyvidx demo video.mp4 --out shown")
    p.add_argument(
        "video",
        nargs="?",
        type=arguments.existing,
        help="a video file; without: a short H.264 clip is written and used",
    )
    p.add_argument("--out", type=Path, default=Path("demo"), help="folder for what the demo writes")
    p.add_argument("--frames", type=arguments.frames, default=8, help="frames to encode and plot")
    p.add_argument("--size", default="clip-b-16", choices=BTAdapterConfig.names(), help="model size of the speed test")
    p.add_argument("--speed-frames", type=arguments.frames, default=8, help="frames of the speed test")
    arguments.add_overwrite(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    video, backwards = options.video or options.out / "clip.mp4", options.out / "backwards.mp4"
    drawn = options.out / "similarity.png"
    if importlib.util.find_spec("matplotlib") is None:
        p.error("the plot needs matplotlib: pip install 'pyvidx[cli]'")
    written = [drawn] if options.video else [drawn, video, backwards]
    arguments.check_outputs(p, options.overwrite, *written, inputs=[options.video])
    if options.video is None:
        ranking(video, backwards, device)

    model = folded(load(None)[0], device, None)
    timing = Timing()
    (result,) = encode_videos([str(video)], model, frames=options.frames, timing=timing)
    if result.error:
        print(f"FAILED {printable(video)}: {printable(result.error)}", file=sys.stderr)
        return 1
    encoding = result.encoding
    print(f"embedding: pooled {tuple(encoding.pooled.shape)}, tokens {tuple(encoding.tokens.shape)}")
    print(timing)

    clip = read(video, frames=options.frames)
    plot(clip, frame_similarity(model, clip), drawn)
    print(f"plot: {drawn}")

    speed(read(video, frames=options.speed_frames), options.size, device)
    return 0


@torch.inference_mode()
def ranking(video: Path, backwards: Path, device: str) -> None:
    """Write a clip, and the same clip backwards, and print how alike captions are to both: for the model, and for the
    mean of the frozen CLIP's frames, to which the two clips are one."""
    clip_text = TextVideo.default()
    model = clip_text.model.to(device)
    frames, size = clip_text.about["frames"], model.config.vision.image_size
    names = "BT-Adapter", "frame mean"
    scores = {(name, path): None for name in names for path in (video, backwards)}  # in the order of the columns
    for path, scene in ((video, SCENE), (backwards, motion.opposite(SCENE))):
        motion.write_clip(path, scene)
        pixels = clip_preprocess(read(path, frames=frames).frames.to(device), size)[None]
        (x,) = model.tower(pixels)
        scores["BT-Adapter", path] = clip_text.similarity(model(pixels, outputs=["pooled"]).pooled, CAPTIONS)[0]
        scores["frame mean", path] = clip_text.similarity(model.tower.embedding(x).mean(dim=1), CAPTIONS)[0]
    print(f"video: wrote {video}, and {backwards}, the same frames in the other order\n")
    print(f"cosine of {frames} frames' embedding with captions (1 = ranked first)")
    print(f"{'':30}" + "".join(f"{name:>12}{'':10}" for name in names))
    print(f"{'':30}" + f"{'clip':>11}{'backwards':>11}" * 2)
    places = {key: s.argsort(descending=True).argsort() + 1 for key, s in scores.items()}
    for i, text in enumerate(CAPTIONS):
        print(f"{text:30}" + "".join(f"{s[i]:8.3f} ({places[key][i]})" for key, s in scores.items()))
    apart = (scores["frame mean", video] - scores["frame mean", backwards]).abs().max()
    print(
        f"To the frame mean the clip and its reverse differ by {apart:.3f} at most: whether left or right is a guess.\n"
    )


@torch.inference_mode()
def frame_similarity(model: BTAdapter, clip: Clip) -> Tensor:
    """Cosine between every two frames' embeddings, whose mean is the clip's, [T, T] float32 on the CPU."""
    weight = next(model.parameters())
    size = model.config.vision.image_size
    pixels = clip_preprocess(clip.frames.to(weight.device), size, dtype=weight.dtype)[None]
    xs = model.layers(pixels, outputs=("pooled",))
    vectors = model.temporal.encode(xs, model.tower, outputs=("pooled",), per_frame=True).pooled[0].float()  # [T, E]
    vectors = F.normalize(vectors - vectors.mean(dim=0), dim=-1)  # without what all frames share
    return (vectors @ vectors.T).cpu()


def plot(clip: Clip, similarity: Tensor, path: Path) -> None:
    """The frames in a row, and how alike each two of them are to the model."""
    T = len(clip)
    with drawn(path, 7, 6.5, "demo") as figure:
        grid = figure.add_gridspec(2, T, height_ratios=[1, 6])
        for t in range(T):
            axis = figure.add_subplot(grid[0, t])
            axis.imshow(clip.frames[t].numpy())
            axis.set_title(f"{clip.seconds[t]:.1f} s", fontsize=7)
            axis.axis("off")
        axis = figure.add_subplot(grid[1, :])
        image = axis.imshow(similarity.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        labels = [f"{s:.1f}" for s in clip.seconds]
        axis.set_xticks(range(T), labels)
        axis.set_yticks(range(T), labels)
        axis.set_xlabel("seconds")
        axis.set_title("similarity of the frames' vectors, mean removed")
        figure.colorbar(image, ax=axis, label="cosine")


@torch.inference_mode()
def speed(clip: Clip, size: str, device: str, rounds: int = 3, seconds: float = 15) -> None:
    """Print the time of pyvidx and of the published algorithm in eager torch, on the same random weights and pixels.

    Args:
        rounds: that count, after one that does not.
        seconds: after so many no further round begins, but one always counts.
    """
    from pyvidx.weights.bt_adapter import load_official

    torch.manual_seed(0)
    config = BTAdapterConfig.named(size)
    reference = ReferenceBTAdapter(config).eval()
    model, _ = load_official(reference.state_dict(), heads=config.vision.heads, depth=config.depth)
    dtype = torch.float16 if device == "cuda" else torch.float32
    reference, model = reference.to(device, dtype), model.to(device).fold(dtype)
    pixels = clip_preprocess(clip.frames.to(device), config.vision.image_size, dtype=dtype)[None]
    contenders = {
        "eager reference": lambda: reference(pixels),
        "pyvidx": lambda: model(pixels, outputs=["pooled"]).pooled,
    }
    times, outputs = {name: [] for name in contenders}, {}
    began = time.perf_counter()
    for i in range(rounds + 1):
        if i > 1 and time.perf_counter() - began > seconds:
            break
        for name, run in contenders.items():
            start = time.perf_counter()
            outputs[name] = run()
            if device == "cuda":
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - start)
    ms = {name: statistics.median(t) * 1e3 for name, t in times.items()}
    a, b = (x.float() for x in outputs.values())
    difference = ((a - b).abs().max() / a.abs().max()).item()
    print(f"speed, {size} (random weights), {len(clip)} frames, {device}, {str(dtype)[6:]}, "
          f"{torch.get_num_threads()} threads, median of {len(times['pyvidx'])}: "
          f"eager reference {ms['eager reference']:.0f} ms, "
          f"pyvidx {ms['pyvidx']:.0f} ms, {ms['eager reference'] / ms['pyvidx']:.2f}x; "
          f"largest difference {difference:.1e} of the largest value")  # fmt: skip
