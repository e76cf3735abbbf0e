"""pyvidx convert IN... OUT"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pyvidx.cli import arguments
from pyvidx.files import printable
from pyvidx.hosts.convert import NAMINGS, to_published, to_pyvidx
from pyvidx.weights.place import MissingWeights

SUFFIXES = (".safetensors", ".pth")


def parser() -> argparse.ArgumentParser:
    p = arguments.Parser(
        prog="pyvidx convert",
        description="Published weights into the file that every command reads at once, or back, and what became of "
        "every key. Later files replace weights of earlier ones: a CLIP, then the branch that was trained on it.",
        epilog="Exit code: 0, 1 if weights that the model needs are in none of the files, 2 for arguments that do not "
        "fit. Nothing is read from a network, but for a tag of open_clip.",
        example="pyvidx convert clip-vit-large-patch14/ sft_btadapter_weight.bin chat.safetensors --part tokens",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("sources", nargs="+", type=arguments.model, metavar="IN", help="files or folders of transformers, "
                   "open_clip, OpenAI, BT-Adapter, STAN, MA-LMM or pyvidx, or open_clip:NAME[:FILE]")  # fmt: skip
    p.add_argument("out", type=arguments.out, metavar="OUT", help="a .safetensors file, with --to also .pth")
    p.add_argument("--to", default="pyvidx", choices=["pyvidx", *NAMINGS], help="whose names the weights get: official "
                   "are BT-Adapter's, lavis and huggingface MA-LMM's")  # fmt: skip
    p.add_argument("--module", type=arguments.module, metavar="NAME[:OPTION=VALUE,...]",
                   help="temporal module, as `pyvidx encode` takes it; default: the weights' own, or mean")  # fmt: skip
    p.add_argument("--compat", choices=["official", "paper"], help="of BT-Adapter; default: as saved, published "
                   "weights as the public code")  # fmt: skip
    p.add_argument("--part", choices=["full", "tokens", "features"], help="of BT-Adapter, tokens for the chat model's; "
                   "default: full")  # fmt: skip
    p.add_argument("--heads", type=arguments.count, help="of attention, where neither weights nor config.json tell")
    p.add_argument("--vision-heads", type=arguments.count, help="of MA-LMM's image tower, where it is not EVA-ViT-g")
    p.add_argument("--hidden-act", choices=["quick_gelu", "gelu"], help="of a CLIP, where nothing tells it")
    p.add_argument("--allow-missing", nargs="+", default=[], metavar="PATTERN",
                   help="parameters that may stay random, e.g. 'temporal.branch.gate'")  # fmt: skip
    p.add_argument("--keys", action="store_true", help="print every key, and what it became")
    arguments.add_overwrite(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(argv)
    suffixes = SUFFIXES if options.to != "pyvidx" else SUFFIXES[:1]
    if Path(options.out).suffix not in suffixes:
        p.error(f"OUT must end in {' or '.join(suffixes)}, got {options.out}")
    arguments.check_outputs(p, options.overwrite, options.out, inputs=options.sources)
    names = ("module", "compat", "part", "heads", "vision_heads", "hidden_act", "allow_missing")
    given = {name: value for name in names if (value := getattr(options, name))}
    try:
        if options.to == "pyvidx":
            converted = to_pyvidx(options.sources, **given)
        elif given or len(options.sources) > 1:
            p.error(f"--to {options.to} takes one file that pyvidx saved, and no more options")
        else:
            converted = to_published(options.sources[0], options.to)
    except MissingWeights as error:
        show(f"{p.prog}: {error}", sys.stderr)
        return 1
    except (OSError, RuntimeError, ValueError) as error:
        p.error(str(error))
    show(str(converted))
    for key, name in converted.names.items() if options.keys else ():
        show(f"  {key} -> {name}")
    print(f"wrote {printable(converted.save(options.out))}")
    return 0


def show(text: str, file=None) -> None:
    for line in text.splitlines():
        print(printable(line), file=file)
