"""pyvidx info [--json]: what this installation is, and for every op and device whether a kernel or the
reference will run, and why. The first lines of any bug report.

What the environment decides is shown, too: PYVIDX_STRICT=1 makes a missing kernel an error, PYVIDX_ISA and
PYVIDX_PRODUCTS choose instructions and who multiplies, and PYVIDX_OPS_LIBRARY names another file to load the kernels
from: that is code, so whoever sets it is trusted with all that this process may do."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence

import torch

import pyvidx.ops  # noqa: F401  (defines the ops)
from pyvidx.cli.arguments import Parser
from pyvidx.hosts.importing import torchvision_misfit
from pyvidx.layers import products
from pyvidx.ops import _library

PACKAGES = ("transformers", "torchvision", "open_clip_torch", "decord", "av", "torchcodec", "numpy", "safetensors")


def collect() -> dict:
    """Versions, devices, build and ops, as plain data."""
    return {
        "pyvidx": _version("pyvidx"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in PACKAGES},
        "torchvision_misfit": torchvision_misfit(),
        "cpu": {"threads": torch.get_num_threads(), "isa": _isa(), "products": products.LIBRARY},
        "gpus": _gpus(),
        "build": _build(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("PYVIDX_")},
        "ops": {op: {device: _implementation(op, device) for device in ("cpu", "cuda")} for op in _library.REFERENCES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _isa() -> str:
    return _library.isa() or "unknown, as no compiled library says"


def _gpus() -> list[dict]:
    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append({"name": p.name, "sm": f"{p.major}{p.minor}", "memory_gib": round(p.total_memory / 2**30, 1)})
    return found


def _build() -> dict:
    built = _library.build() or {"compiler": None, "torch": None, "cuda_archs": []}
    return built | {"library_error": _library.LOAD_ERROR, "kernel_resources": _kernel_resources()}


def _kernel_resources() -> dict:
    """What the CUDA compiler said of each kernel: known in builds in the source tree alone."""
    try:
        from pyvidx import _C
    except ImportError:
        return {}
    return json.loads(_C.kernel_resources)


def _implementation(name: str, device: str) -> dict:
    if not _library.has_kernel(name, device):
        return {"runs": "reference", "why": _library.why_reference(device)}
    why = "compiled kernel"
    if device == "cuda" and not torch.cuda.is_available():
        why = "torch sees no GPU here"
    elif device == "cuda" and (missing := _uncovered_gpus()):
        return {"runs": "error", "why": f"this build has no code for {missing}: rebuild with PYVIDX_CUDA_ARCHS"}
    return {"runs": "kernel", "why": why}


def _uncovered_gpus() -> str:
    """GPUs that are older than every architecture built for, or between them without binary code."""
    archs = [int(a) for a in (_library.build() or {}).get("cuda_archs", [])]
    if not archs:
        return ""
    sms = [int(gpu["sm"]) for gpu in _gpus()]
    # A cubin runs on the same major version from its minor on; the newest architecture is there as PTX for newer GPUs.
    covered = [any(a // 10 == sm // 10 and a <= sm for a in archs) or sm >= max(archs) for sm in sms]
    return ", ".join(f"sm_{sm}" for sm, ok in zip(sms, covered) if not ok)


def as_text(info: dict, kernels: bool = False) -> str:
    """The report for people; kernels: with what the CUDA compiler says of each."""
    build, cpu = info["build"], info["cpu"]
    lines = [
        f"pyvidx {info['pyvidx']} | python {info['python']} | torch {info['torch']} (cuda {info['torch_cuda']})",
        f"cpu: {cpu['threads']} threads, kernels at level {cpu['isa']}, float32 products by {cpu['products']}",
        "gpu: " + (", ".join(f"{g['name']} (sm_{g['sm']}, {g['memory_gib']} GiB)" for g in info["gpus"]) or "none"),
        "built with: " + (f"{build['compiler']}, torch {build['torch']}" if build["compiler"] else "nothing compiled"),
        "cuda code for: " + (" ".join(f"sm_{a}" for a in build["cuda_archs"]) or "none"),
        "packages: " + ", ".join(f"{k} {v or '-'}" for k, v in info["packages"].items()),
    ]
    if info["environment"]:
        lines.append("environment: " + " ".join(f"{k}={v}" for k, v in info["environment"].items()))
    if info["torchvision_misfit"]:
        lines.append(f"TORCHVISION DOES NOT FIT: {info['torchvision_misfit']}")
    if build["library_error"]:
        lines.append(f"NO COMPILED KERNELS, every op runs its reference: {build['library_error']}")
    width = max(len(name) for name in info["ops"])
    lines.append(f"{'op':{width}}  {'cpu':9}  {'cuda':9}  why")
    for name, on in info["ops"].items():
        whys = dict.fromkeys(o["why"] for o in on.values())
        lines.append(f"{name:{width}}  {on['cpu']['runs']:9}  {on['cuda']['runs']:9}  {'; '.join(whys)}")
    if kernels and build["kernel_resources"]:
        lines.append("kernel (registers / static shared bytes / spilled bytes)")
        for kernel, archs in build["kernel_resources"].items():
            used = "  ".join(f"sm_{a}: {r['registers']}/{r['shared']}/{r['spills']}" for a, r in archs.items())
            lines.append(f"  {kernel}  {used}")
    return "\n".join(lines)


def parser() -> Parser:
    p = Parser(prog="pyvidx info", description=__doc__, example="pyvidx info --json")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.add_argument(
        "--kernels",
        action="store_true",
        help="also print registers and shared memory per CUDA kernel (of a build in the source tree)",
    )
    return p


def main(argv: Sequence[str] | None = None) -> None:
    options, info = parser().parse_args(argv), collect()
    print(json.dumps(info, indent=2) if options.json else as_text(info, options.kernels))
