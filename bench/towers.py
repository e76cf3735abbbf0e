"""Image towers on a CPU, side by side: python -m bench.towers --out FILE.json

    frames      a CLIP tower, a clip's frames to the mean of their embeddings
    bt_adapter  BT-Adapter, a clip to its embedding

Of both: pyvidx, folded, in float32 and in int8; the public code (transformers with its sdpa attention, the official
BT-Adapter) in torch, under torch.compile, and exported to OpenVINO and ONNX Runtime; their int8: OpenVINO's by NNCF
(static, calibrated on what is measured), ONNX Runtime's dynamic, per channel. Of frames: open_clip's tower as well.
What is not installed is left out with a word.

Weights are random, the same for all (open_clip has its own, and pyvidx those once more). Each result is first compared
with pyvidx's. Then the contenders take turns, a call each per round, so that a machine that drifts drifts for all of
them. Wall time decides on a machine without other work; CPU time, of all threads of the process, is what other work
disturbs least.
"""

import argparse
import functools
import importlib.metadata
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyvidx import temporal
from pyvidx.files import check_output, write_json
from pyvidx.hosts import huggingface, open_clip
from pyvidx.layers import products
from pyvidx.models import BTAdapter, VideoEncoder
from pyvidx.models.config import BTAdapterConfig
from pyvidx.reference.bt_adapter import ReferenceBTAdapter
from pyvidx.weights.bt_adapter import load_weights
from tests.torchvision_shim import mend_torchvision

PACKAGES = ("torch", "transformers", "open_clip_torch", "openvino", "nncf", "onnx", "onnxruntime", "pillow")
REST = 0.1  # seconds between two contenders: threads that wait for work by spinning have stopped by then
CLOSE = 1e-4  # of float32 outputs of about 1
Run = Callable[[], Tensor]


class Frames(nn.Module):
    """transformers' tower with the mean over frames, so that it can be exported. [1, T, 3, h, w] -> [1, E]."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        return self.tower(pixel_values=pixels[0]).image_embeds.mean(dim=0, keepdim=True)


def transformers_tower(config: BTAdapterConfig) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    v = config.vision
    made = CLIPVisionConfig(
        image_size=v.image_size, patch_size=v.patch_size, hidden_size=v.width, num_attention_heads=v.heads,
        num_hidden_layers=v.layers, intermediate_size=v.mlp_width, projection_dim=v.embed_dim, hidden_act=v.hidden_act,
        attn_implementation="sdpa",
    )  # fmt: skip
    return CLIPVisionModelWithProjection(made).eval()


def open_clip_tower(config: BTAdapterConfig) -> nn.Module:
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    v = config.vision
    sizes = {"width": v.width, "head_width": v.width // v.heads, "layers": v.layers, "mlp_ratio": v.mlp_width / v.width}
    made = CLIPVisionCfg(image_size=v.image_size, patch_size=v.patch_size, **sizes)
    return _build_vision_tower(v.embed_dim, made, quick_gelu=v.hidden_act == "quick_gelu").eval()


def pooled(model: nn.Module, pixels: Tensor) -> Run:
    return lambda: model(pixels, outputs=("pooled",)).pooled


def frames_of(tower: nn.Module) -> VideoEncoder:
    return VideoEncoder(tower, temporal.create("mean", tower.config)).eval()


def openvino(module: nn.Module, pixels: Tensor, threads: int, folder: Path, *, int8: bool = False) -> Run:
    import openvino as ov

    model = ov.convert_model(module, example_input=pixels, input=list(pixels.shape))
    if int8:
        import nncf

        samples = nncf.Dataset([pixels.numpy()])
        model = nncf.quantize(model, samples, model_type=nncf.ModelType.TRANSFORMER, subset_size=1)
    # Without the hint of float32 it multiplies in bfloat16 where the CPU can.
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled, given = ov.Core().compile_model(model, "CPU", hints), pixels.numpy()
    return lambda: torch.from_numpy(compiled(given)[0])


def onnxruntime(module: nn.Module, pixels: Tensor, threads: int, folder: Path, *, int8: bool = False) -> Run:
    import onnxruntime as ort

    path = folder / f"{type(module).__name__}.onnx"
    if not path.exists():
        import onnx  # noqa: F401 -- torch names another package where it is missing

        torch.onnx.export(module, (pixels,), path, dynamo=False, opset_version=17)
    if int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        full, path = path, path.with_suffix(".int8.onnx")
        if not path.exists():
            quantize_dynamic(full, path, per_channel=True, weight_type=QuantType.QInt8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: pixels.numpy()}
    return lambda: torch.from_numpy(session.run(None, given)[0])


def compiled(module: nn.Module, pixels: Tensor) -> Run:
    torch._dynamo.reset()
    module = torch.compile(module, dynamic=False)
    return lambda: module(pixels)


class Contender(NamedTuple):
    """make: loads and exports; ImportError: something is not installed. ours: pyvidx with the same weights."""

    name: str
    make: Callable[[], Run]
    ours: Run


def contenders(kind: str, config: BTAdapterConfig, pixels: Tensor, threads: int, folder: Path) -> Iterator[Contender]:
    if kind == "frames":
        tower = transformers_tower(config)
        public, name = Frames(tower).eval(), "transformers"
        model = frames_of(huggingface.vision_tower(tower))
    else:
        public, name = ReferenceBTAdapter(config, "mma").eval(), "official"
        model = BTAdapter(config).eval()
        load_weights(model, public.state_dict())
    ours = pooled(model.fold(), pixels)
    yield Contender("pyvidx", lambda: ours, ours)
    yield Contender("pyvidx, int8", lambda: pooled(model.fold(precision="int8"), pixels), ours)
    yield Contender(name, lambda: lambda: public(pixels), ours)
    yield Contender(f"{name}, torch.compile", lambda: compiled(public, pixels), ours)
    if kind == "frames":
        visual = functools.cache(lambda: open_clip_tower(config))  # made in its turn: it may not be installed

        def theirs() -> Run:
            tower = visual()
            return lambda: tower(pixels[0]).mean(dim=0, keepdim=True)

        def same() -> Tensor:
            return pooled(frames_of(open_clip.vision_tower(visual())).fold(), pixels)()

        yield Contender("open_clip", theirs, same)
    for library in (openvino, onnxruntime):
        for int8 in (False, True):
            make = functools.partial(library, public, pixels, threads, folder, int8=int8)
            yield Contender(library.__name__ + ", int8" * int8, make, ours)


def prepare(made: Iterable[Contender], report: Callable[[str], None]) -> tuple[dict[str, Run], dict[str, dict], dict]:
    """Those that can run, how near each comes to pyvidx, and why others cannot run.

    Raises:
        RuntimeError: a float32 contender's output is another.
    """
    runs, differences, absent = {}, {}, {}
    for name, make, ours in made:
        report(f"{name} ...")
        try:
            run = make()
            found = run()
        except ImportError as error:
            absent[name] = str(error)
            report(f"{name}: left out, {error}")
            continue
        wanted = ours()
        difference = (found - wanted).abs().max().item()
        cosine = torch.cosine_similarity(found, wanted).min().item()
        if not name.endswith("int8") and not difference <= CLOSE:
            raise RuntimeError(f"towers: {name} must give what pyvidx gives, got a difference of {difference}")
        runs[name], differences[name] = run, {"difference": difference, "cosine": cosine}
    return runs, differences, absent


def rounds(runs: dict[str, Run], count: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of wall and of CPU time of every call."""
    times = {name: [] for name in runs}
    for turn in range(count):
        # Each follows another one in the next round.
        for name in list(runs)[turn % len(runs) :] + list(runs)[: turn % len(runs)]:
            time.sleep(REST)
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name]()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def row(name: str, times: list[tuple[float, float]], ours: list[tuple[float, float]]) -> dict:
    """Its times in ms and how many times as long it takes as pyvidx."""
    wall, cpu = zip(*times)
    our_wall, our_cpu = zip(*ours)
    quarters = statistics.quantiles(wall, n=4) if len(wall) > 1 else (wall[0],) * 3
    return {
        "name": name,
        "ms": statistics.median(wall) * 1e3, "least_ms": min(wall) * 1e3,
        "quartiles_ms": [q * 1e3 for q in quarters[::2]],
        "cpu_ms": statistics.median(cpu) * 1e3, "least_cpu_ms": min(cpu) * 1e3,
        "ratio": statistics.median(wall) / statistics.median(our_wall), "ratio_of_least": min(wall) / min(our_wall),
        "cpu_ratio": statistics.median(cpu) / statistics.median(our_cpu),
    }  # fmt: skip


def measure(
    kind: str, size: str, T: int, threads: int, count: int, without: Collection[str] = (), report=print
) -> dict:
    """One case, all contenders but `without`; report is told what is under way and what came out."""
    mend_torchvision()  # transformers imports it
    config = BTAdapterConfig.named(size)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    side = config.vision.image_size
    pixels = torch.randn(1, T, 3, side, side)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracers and converters
        made = [c for c in contenders(kind, config, pixels, threads, Path(folder)) if c.name not in without]
        runs, differences, absent = prepare(made, report)
        before = os.getloadavg()[0]
        times = rounds(runs, count)
    rows = [row(name, times[name], times["pyvidx"]) | differences[name] for name in runs]
    for r in rows:
        report(
            f"{kind} {size} T={T} threads={threads} {r['name']}: {r['ms']:.0f} ms ({r['ratio']:.2f} of pyvidx; "
            f"CPU {r['cpu_ms']:.0f} ms, {r['cpu_ratio']:.2f}), difference {r['difference']:.1e}"
        )
    case = {"kind": kind, "size": size, "frames": T, "threads": threads, "rounds": count}
    return case | {"load_before": before, "load_after": os.getloadavg()[0], "contenders": rows, "absent": absent}


def about() -> dict:
    """The machine and the packages of a measurement."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in lines if ":" in line}
    machine = {name: cpu.get(name) for name in ("model name", "cpu family", "model")} | {"cores": os.cpu_count()}
    isa = torch.backends.cpu.get_cpu_capability()
    return {"machine": platform.machine(), **machine, "isa": isa, "products": products.LIBRARY, "packages": found}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.towers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", default="clip-b-16", help="as BTAdapterConfig.named takes it")
    parser.add_argument("--kinds", nargs="+", default=["frames", "bt_adapter"], choices=["frames", "bt_adapter"])
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help='contenders, e.g. "openvino, int8"')
    options = parser.parse_args()
    check_output(options.out)
    cases = []
    for threads in options.threads:
        for kind in options.kinds:
            cases.append(measure(kind, options.size, options.frames, threads, options.rounds, options.without))
            write_json(options.out, {"about": about(), "cases": cases}, indent=1)  # a long run leaves what it has


if __name__ == "__main__":
    main()
