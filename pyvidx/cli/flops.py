"""pyvidx flops --size clip-l-14 --frames 8 16 64"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from pyvidx.cli import arguments
from pyvidx.files import write_json
from pyvidx.models import BTAdapterConfig, flops

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def parser() -> argparse.ArgumentParser:
    p = arguments.Parser(
        prog="pyvidx flops",
        description="Parameters, arithmetic and memory of every temporal module over one CLIP tower, counted from the "
        "code on tensors without values. FLOPs: matrix products and attention of a forward pass over one clip, 2 per "
        "multiply-add. peak: the most bytes of activations alive at once in that pass, without gradients.",
        example="pyvidx flops --size clip-l-14 --frames 8 16 64 --plot costs.png",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--size", default="clip-l-14", choices=BTAdapterConfig.names(), help="of the tower")
    p.add_argument("--frames", type=arguments.frames, nargs="+", default=[8, 16, 64], help="frames of the clip")
    p.add_argument("--dtype", default="float16", choices=DTYPES, help="of weights and activations")
    p.add_argument("--json", type=Path, help="write the numbers as well")
    p.add_argument("--plot", type=arguments.picture, help="draw them, .png or whatever matplotlib writes")
    arguments.add_overwrite(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(argv)
    arguments.check_outputs(p, options.overwrite, options.json, options.plot)
    try:
        costs = flops.family(BTAdapterConfig.named(options.size).vision, options.frames, DTYPES[options.dtype])
    except ValueError as error:
        p.error(str(error))
    title = f"{options.size}, one clip, {options.dtype}"
    print(title)
    print(flops.table(costs))
    if options.json is not None:
        about = {"size": options.size, "dtype": options.dtype, "torch": torch.__version__}
        write_json(options.json, {"about": about, "costs": [asdict(c) for c in costs]}, indent=1)
        print(f"wrote {options.json}")
    if options.plot is not None:
        print(f"wrote {flops.plot(costs, options.plot, title)}")
    return 0
