"""python -m pyvidx demo [VIDEO]: one video through the whole library, with a picture and a speed test."""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvidx.cli.encode import load_model
from pyvidx.encode import Timing, encode_videos
from pyvidx.models import BTAdapter, BTAdapterConfig
from pyvidx.models.reference import ReferenceBTAdapter
from pyvidx.preprocess import clip_preprocess
from pyvidx.video import Clip, read, write


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m pyvidx demo", description=__doc__)
    p.add_argument("video", nargs="?", type=Path, help="a video file; without: a short H.264 clip is written and used")
    p.add_argument("--out", type=Path, default=Path("demo"), help="folder for what the demo writes")
    p.add_argument("--frames", type=int, default=16, help="frames to encode and plot")
    p.add_argument("--size", default="clip-b-16", choices=BTAdapterConfig.names(), help="model size of the speed test")
    p.add_argument("--speed-frames", type=int, default=8, help="frames of the speed test")
    options = p.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    video = options.video
    if video is None:
        video = options.out / "clip.mp4"
        write(video, drawn_clip(), fps=25)
        print(f"video: wrote {video}, 3 scenes of 2 s")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(None, device, None)
    timing = Timing()
    (result,) = encode_videos([str(video)], model, frames=options.frames, timing=timing)
    if result.error:
        print(f"FAILED {video}: {result.error}")
        return 1
    encoding = result.encoding
    print(f"embedding: pooled {tuple(encoding.pooled.shape)}, tokens {tuple(encoding.tokens.shape)}")
    print(timing)

    clip = read(video, frames=options.frames)
    picture = options.out / "similarity.png"
    plot(clip, frame_similarity(model, clip), picture)
    print(f"plot: {picture}")

    speed(read(video, frames=options.speed_frames), options.size, device)
    return 0


def drawn_clip(seconds_per_scene: float = 2.0, size: tuple[int, int] = (240, 320), fps: int = 25):
    """Three scenes that look different: a red square moving right, a blue disk growing, green stripes rolling down."""
    h, w = size
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    steps = int(seconds_per_scene * fps)

    def painted(mask: Tensor, color: tuple[int, int, int], ground: tuple[int, int, int]) -> Tensor:
        return torch.where(mask[..., None], torch.tensor(color), torch.tensor(ground)).to(torch.uint8)

    for i in range(steps):
        left = i * (w - 80) // steps
        yield painted((x >= left) & (x < left + 80) & (y >= 80) & (y < 160), (220, 40, 40), (235, 235, 225))
    for i in range(steps):
        radius = 20 + i * 90 // steps
        yield painted((x - w // 2) ** 2 + (y - h // 2) ** 2 < radius**2, (40, 80, 220), (20, 20, 30))
    for i in range(steps):
        yield painted((y - 2 * i) // 20 % 2 == 0, (40, 170, 80), (240, 220, 90))


@torch.inference_mode()
def frame_similarity(model: BTAdapter, clip: Clip) -> Tensor:
    """Cosine between every two frames' vectors (output gate and last LayerNorm), [T, T] float32 on the CPU."""
    weight = next(model.parameters())
    size = model.config.vision.image_size
    pixels = clip_preprocess(clip.frames.to(weight.device), size, dtype=weight.dtype)[None]
    vectors = model.encode_frames(pixels)[0].float()  # [T, C]
    vectors = F.normalize(vectors - vectors.mean(dim=0), dim=-1)  # without what all frames share
    return (vectors @ vectors.T).cpu()


def plot(clip: Clip, similarity: Tensor, path: Path) -> None:
    """The frames in a row, and how alike each two of them are to the model."""
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("demo: the plot needs matplotlib: pip install 'pyvidx[cli]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    T = len(clip)
    figure = plt.figure(figsize=(10, 7.2))
    grid = figure.add_gridspec(2, T, height_ratios=[1, 6])
    for t in range(T):
        axis = figure.add_subplot(grid[0, t])
        axis.imshow(clip.frames[t].numpy())
        axis.set_title(f"{clip.seconds[t]:.1f} s", fontsize=6)
        axis.axis("off")
    axis = figure.add_subplot(grid[1, :])
    image = axis.imshow(similarity.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
    labels = [f"{s:.1f}" for s in clip.seconds]
    axis.set_xticks(range(T), labels, fontsize=7)
    axis.set_yticks(range(T), labels, fontsize=7)
    axis.set_xlabel("seconds")
    axis.set_title("similarity of the frames' vectors, mean removed")
    figure.colorbar(image, ax=axis, label="cosine")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


@torch.inference_mode()
def speed(clip: Clip, size: str, device: str, rounds: int = 3) -> None:
    """Print the time of pyvidx and of the published algorithm in eager torch, on the same random weights and pixels."""
    from pyvidx.integrations.checkpoints import load_official

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
    for i in range(rounds + 1):
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
          f"{torch.get_num_threads()} threads: eager reference {ms['eager reference']:.0f} ms, "
          f"pyvidx {ms['pyvidx']:.0f} ms, {ms['eager reference'] / ms['pyvidx']:.2f}x; "
          f"largest difference {difference:.1e} of the largest value")  # fmt: skip
