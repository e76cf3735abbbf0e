"""pyvidx COMMAND, also as python -m pyvidx COMMAND: encode videos, train, evaluate, convert weights."""

import importlib
import importlib.metadata
import sys

from pyvidx.cli.arguments import ended

COMMANDS = {
    "encode": "encode video files into embeddings",
    "convert": "published weights into pyvidx's file, and back, with what became of every key",
    "demo": "encode one video and show what comes out",
    "eval": "numbers of a benchmark from answers or embeddings",
    "ask": "a video language model's answer about a video, through a memory, also while the video goes on",
    "memory": "stream one video through a memory bank and draw what its slots hold",
    "train": "pretrain or fine-tune a model, on one device or with torchrun on several",
    "plan": "hours of a pretraining, hours and storage of a corpus, before they are started",
    "bench": "what the benches measured: a table and a plot",
    "flops": "parameters, arithmetic and memory of every temporal module",
    "info": "versions, devices, and which op runs as kernel or reference",
}


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: pyvidx COMMAND [--help]\n")
        for command, what in COMMANDS.items():
            print(f"  {command:8} {what}")
        print("\nexample: pyvidx encode videos/ --frames 8 --out embeddings.parquet")
        return 0
    if name == "--version":
        try:
            print(importlib.metadata.version("pyvidx"))
        except importlib.metadata.PackageNotFoundError:
            print("unknown: a source tree that is not installed")
        return 0
    if name not in COMMANDS:
        print(f"pyvidx: error: COMMAND must be one of {', '.join(COMMANDS)}, got {name!r} (--help says more)",
              file=sys.stderr)  # fmt: skip
        return 2
    return ended(f"pyvidx {name}", lambda: importlib.import_module(f"pyvidx.cli.{name}").main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
