"""python -m pyvidx COMMAND: encode videos, run the demo, train, say what is installed."""

import importlib
import sys

from pyvidx.cli.arguments import ended

COMMANDS = {
    "encode": "encode video files into embeddings",
    "demo": "encode one video and show what comes out",
    "eval": "numbers of a benchmark from answers or embeddings",
    "memory": "stream one video through a memory bank and draw what its slots hold",
    "train": "pretrain or fine-tune a model, on one device or with torchrun on several",
    "plan": "hours of a pretraining run on cards of a kind, from counted work",
    "bench": "a table and a plot of what the benches measured",
    "flops": "parameters, arithmetic and memory of every temporal module",
    "info": "versions, devices, and which op runs as kernel or reference",
}


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        print("usage: python -m pyvidx COMMAND [--help]\n", file=sys.stderr)
        for command, what in COMMANDS.items():
            print(f"  {command:8} {what}", file=sys.stderr)
        return 0 if name in ("", "-h", "--help") else 2
    return ended(f"python -m pyvidx {name}", lambda: importlib.import_module(f"pyvidx.cli.{name}").main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
