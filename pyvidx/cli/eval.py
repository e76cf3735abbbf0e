"""python -m pyvidx eval answers|retrieval: numbers of a benchmark from files."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from pyvidx import eval as tasks
from pyvidx.eval.retrieval import TIES, retrieval


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m pyvidx eval", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    a = commands.add_parser("answers", help="answers in words against the annotated ones")
    a.add_argument("--task", required=True, choices=tasks.names())
    a.add_argument("--predictions", type=Path, required=True, help='JSON {id: "answer" or [ranked answers]}')
    a.add_argument("--annotations", type=Path, required=True,
                   help='JSON {id: {"answer": ..., "answer_type": ... (ActivityNet-QA)}}')  # fmt: skip
    a.add_argument("--compat", choices=["official"], help="ActivityNet's free questions as the published script counts")
    r = commands.add_parser("retrieval", help="text-video retrieval from embeddings")
    r.add_argument("embeddings", type=Path, help="safetensors with text [n, E], video [m, E] and, where n != m, "
                   "captions int [m]: how many texts each video has, in their order")  # fmt: skip
    r.add_argument("--ties", choices=TIES, default="average")
    r.add_argument("--dsl", action="store_true", help="dual softmax over the whole test set; the result is labeled")
    r.add_argument("--compat", choices=["clip4clip"], help="count ties as the public code does")
    for command in (a, r):
        command.add_argument("--out", type=Path, help="write the numbers as JSON too")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(argv)
    try:
        if options.command == "answers":
            files = (json.loads(path.read_text()) for path in (options.predictions, options.annotations))
            result = {options.task: tasks.task(options.task).score(*files, compat=options.compat)}
        else:
            result = from_embeddings(options)
    except (FileNotFoundError, ValueError) as error:
        p.error(str(error))
    print(table(result))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {options.out}")
    return 0


def from_embeddings(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    from safetensors.torch import load_file
    from torch.nn.functional import normalize

    arrays = load_file(options.embeddings)
    if not {"text", "video"} <= set(arrays):
        raise ValueError(f"eval: {options.embeddings} must hold text and video, got {', '.join(sorted(arrays))}")
    similarity = normalize(arrays["text"].float(), dim=1) @ normalize(arrays["video"].float(), dim=1).T
    captions = arrays["captions"].tolist() if "captions" in arrays else None
    return retrieval(similarity, captions, ties=options.ties, dsl=options.dsl, compat=options.compat)


def table(result: dict[str, dict[str, float]]) -> str:
    """One line per row of numbers, under their names."""
    names = list(next(iter(result.values())))
    left = max(len(row) for row in result)
    lines = [" " * left + "".join(f"{name:>10}" for name in names)]
    lines += [row.ljust(left) + "".join(f"{values[name]:10.2f}" for name in names) for row, values in result.items()]
    return "\n".join(lines)
