"""The arguments of `pyvidx eval`."""

import argparse
from pathlib import Path

from pyvidx.cli import arguments
from pyvidx.cli.arguments import existing
from pyvidx.eval import annotations, judge, tasks
from pyvidx.eval.annotations import classes
from pyvidx.eval.retrieval import TIES
from pyvidx.eval.tasks import EXACT

# Options that mean nothing, or not enough, without another one: (command, given, needed).
NEEDED = (
    ("retrieval", "broken", "config"),
    ("answers", "reference", "format"), ("answers", "option", "format"),
    ("anticipation", "predictions", "verbs"), ("anticipation", "predictions", "nouns"),
    ("anticipation", "submission", "levels"), ("anticipation", "levels", "submission"),
    ("judge", "url", "model"), ("judge", "model", "url"), ("judge", "key_file", "url"),
)  # fmt: skip
WRITTEN = ("json", "plot", "submission", "out", "job")


def parser() -> argparse.ArgumentParser:
    p = arguments.Parser(
        prog="pyvidx eval",
        description="Numbers of a benchmark from videos, embeddings, answers or a judge's replies.",
        epilog="Nothing uses a network but `judge --url`, which sends questions and answers to that service.",
    )
    commands = p.add_subparsers(dest="command", required=True)

    r = commands.add_parser(
        "retrieval",
        help="text-video retrieval, from videos or from embeddings",
        example="pyvidx eval retrieval --config msrvtt.json --json numbers.json",
    )
    source = r.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=existing, help=".json or .toml, see pyvidx.eval.zero_shot.Config")
    source.add_argument(
        "embeddings",
        type=existing,
        nargs="?",
        help="safetensors with text [n, E], video [m, E] and, "
        "where n != m, captions int [m]: how many texts each video has, in their order",
    )
    r.add_argument("--ties", choices=TIES, help="default: average, or what the configuration says")
    r.add_argument("--dsl", action="store_true", help="dual softmax over the whole test set; the result is labeled")
    r.add_argument("--compat", choices=["clip4clip"], help="count ties as the public code does")
    c = commands.add_parser(
        "classify",
        help="zero-shot classification, from videos or from embeddings",
        example="pyvidx eval classify --config kinetics.json",
    )
    c.add_argument("--config", type=existing, required=True, help=".json or .toml, see pyvidx.eval.zero_shot.Config")
    for command in (r, c):
        command.add_argument("--broken", choices=["fail", "exclude"], help="videos that can not be read")

    m = commands.add_parser(
        "predict",
        help="MA-LMM's answers to a task's questions, from videos",
        example="pyvidx eval predict --task lvu_genre --format lvu --annotations test.json "
        "--config run.json --out answers.jsonl",
    )
    m.add_argument("--task", required=True, choices=tasks.names(), help="whose questions, frames and memory")
    _annotated(m, required=True)
    m.add_argument(
        "--config",
        type=existing,
        required=True,
        help="model and language model, as `pyvidx train` reads it; the task says the rest",
    )
    m.add_argument(
        "--weights", type=arguments.there, help="in place of the configuration's, e.g. its out/best.safetensors"
    )
    m.add_argument("--root", type=folder, help="folder that is searched for the videos; default: the configuration's")
    m.add_argument("--frames", type=arguments.frames, help="in place of the task's")
    m.add_argument("--memory", type=arguments.count, help="bank length in place of the task's")
    m.add_argument("--device", type=arguments.device, help="default: a GPU if there is one")
    m.add_argument("--out", type=Path, required=True, help=".jsonl; an ended run goes on from it")

    a = commands.add_parser(
        "answers",
        help="answers in words against the annotated ones",
        example="pyvidx eval answers --task lvu_genre --format lvu --annotations test.json --predictions answers.jsonl",
    )
    exact = [t for t in tasks.names() if tasks.task(t).metric in EXACT]
    a.add_argument("--task", required=True, choices=exact, help="how answers are counted")
    a.add_argument(
        "--predictions", type=existing, required=True, help='of `predict`, or JSON {id: "answer" or [ranked]}'
    )
    _annotated(a)
    a.add_argument(
        "--reference",
        type=existing,
        nargs="+",
        metavar="FILE",
        help="the full test set, as official_qa: what the annotations lack is reported",
    )
    a.add_argument("--compat", choices=["official"], help="ActivityNet's free questions as the published script counts")

    v = commands.add_parser(
        "lvu",
        help="LVU as its authors count: the summed softmax over the clips of each video",
        example="pyvidx eval lvu --task genre --annotations test.csv --scores scores.safetensors",
    )
    v.add_argument("--task", required=True, choices=classes.LVU_LABELS + classes.LVU_REGRESSIONS, help="of LVU")
    v.add_argument("--annotations", type=existing, required=True, help="test.csv of the task, see lvu_official")
    v.add_argument(
        "--scores",
        type=existing,
        required=True,
        help="safetensors with video int [clips], the line of each "
        "clip's video from 0, and scores [clips, classes], or [clips] of a regression",
    )

    t = commands.add_parser(
        "anticipation",
        help="EPIC-Kitchens-100: the challenge's numbers and its submission file",
        example="pyvidx eval anticipation --segments EPIC_100_validation.csv "
        "--scores scores.safetensors --submission test.json --levels 1 3 3",
    )
    t.add_argument(
        "--segments", type=existing, required=True, help="EPIC_100_validation.csv, or a file without classes"
    )
    given = t.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--scores", type=existing, help="safetensors with verb [n, 97] and noun [n, 300], in their order"
    )
    given.add_argument("--predictions", type=existing, help='of `predict`, or JSON {narration_id: ["verb noun", ...]}')
    for name in ("verbs", "nouns"):
        t.add_argument(f"--{name}", type=existing, help=f"EPIC_100_{name[:-1]}_classes.csv, to read predictions with")
    t.add_argument("--unseen", type=existing, help="participants who are not in the training set")
    for name in ("verbs", "nouns"):
        t.add_argument(f"--tail-{name}", type=existing, help=f"rare {name}")
    t.add_argument("--submission", type=Path, help="write the challenge's file")
    t.add_argument(
        "--levels",
        type=arguments.whole_number(0, 5),
        nargs=3,
        metavar=("PT", "TL", "TD"),
        help="sls_pt, sls_tl and sls_td",
    )

    j = commands.add_parser(
        "judge",
        help="answers graded by a judge: question answering, or an aspect of conversation",
        example="pyvidx eval judge --protocol qa --predictions pred.json --prompt prompt.json "
        "--job replies.jsonl --url http://localhost:8000/v1 --model judge",
    )
    j.add_argument("--protocol", required=True, choices=["qa", *judge.ASPECTS], help="what is graded")
    j.add_argument(
        "--predictions", type=existing, required=True, help="JSON list as Video-ChatGPT's inference writes it"
    )
    j.add_argument(
        "--prompt",
        type=existing,
        required=True,
        help='JSON list of {"role", "content"} with {question}, {answer}, {pred} (consistency: {question1}, '
        "{question2}, {answer}, {pred1}, {pred2}); none is shipped",
    )
    j.add_argument("--job", type=Path, required=True, help=".jsonl of the replies; an ended run goes on from it")
    by = j.add_mutually_exclusive_group(required=True)
    by.add_argument("--url", type=url, help="OpenAI-compatible service, e.g. http://localhost:8000/v1")
    by.add_argument("--replay", type=existing, help="recorded replies: .jsonl of id and reply, or JSON {id: reply}")
    j.add_argument("--model", help="name of the model at --url")
    j.add_argument("--key-file", type=existing, help="file with the service's key")
    j.add_argument("--attempts", type=arguments.whole_number(1, 100), default=3, help="per answer")
    j.add_argument("--partial", action="store_true", help="numbers of what has a reply that reads; else all must")
    s = commands.add_parser(
        "aspects",
        help="five aspects of conversation and their mean, from the jobs of `judge`",
        example="pyvidx eval aspects --correctness a.jsonl --detail b.jsonl --context c.jsonl "
        "--temporal d.jsonl --consistency e.jsonl",
    )
    for name in judge.ASPECTS:
        s.add_argument(f"--{name}", type=existing, required=True, help=".jsonl")
    for command in (j, s):
        command.add_argument("--compat", choices=["video_chatgpt"], help="whole scores, as the published script counts")

    w = commands.add_parser(
        "rows",
        help="annotations to the rows that `pyvidx train` reads",
        example="pyvidx eval rows --task lvu_genre --format lvu --annotations train.json --out rows.jsonl",
    )
    w.add_argument("--task", required=True, choices=tasks.names(), help="whose prompt is asked")
    _annotated(w, required=True)
    w.add_argument("--suffix", default="", help="of the video files, e.g. .mp4")
    w.add_argument("--out", type=Path, required=True, help=".jsonl")

    for command in (r, c, a, v, t, j, s):
        command.add_argument("--json", "--out", type=Path, help="write the numbers, and what was run, as JSON too")
        command.add_argument("--plot", type=arguments.picture, help="draw them, .png or whatever matplotlib writes")
    for command in (r, c, a, v, t, j, s, w):
        arguments.add_overwrite(command)
    return p


def _annotated(command: argparse.ArgumentParser, *, required: bool = False) -> None:
    command.add_argument(
        "--annotations",
        type=existing,
        nargs="+",
        required=True,
        metavar="FILE",
        help="the benchmark's file" + ("" if required else '; without --format JSON {id: {"answer": ...}}'),
    )
    command.add_argument(
        "--format", required=required, choices=list(annotations.FORMATS), help="see pyvidx.eval.annotations"
    )
    command.add_argument(
        "--option", nargs="+", default=[], metavar="NAME=VALUE", type=pair, help="of the format, e.g. split=test"
    )


def check(p: arguments.Parser, options: argparse.Namespace) -> None:
    """End with one line if options contradict or lack one another, or an output is an input or cannot be written."""
    for command, given, needed in NEEDED:
        if command == options.command and getattr(options, given) and not getattr(options, needed):
            p.error(f"--{given.replace('_', '-')} needs --{needed}")
    if options.command == "predict" and options.out.suffix != ".jsonl":
        p.error(f"--out must end in .jsonl, got {options.out}")
    found = [(name, value) for name, value in vars(options).items() if isinstance(value, list | Path)]
    inputs = [
        path
        for name, value in found
        if name not in WRITTEN
        for path in (value if isinstance(value, list) else [value])
        if isinstance(path, Path)
    ]
    resumed = {"job", "out"} if options.command == "predict" else {"job"}  # an ended run goes on from them
    for overwrite, names in ((True, resumed), (getattr(options, "overwrite", False), {*WRITTEN} - resumed)):
        arguments.check_outputs(p, overwrite, *(getattr(options, n, None) for n in names), inputs=inputs)


def folder(text: str) -> Path:
    path = arguments.there(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, {path} is a file")
    return path


def url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"must begin with http:// or https://, got {text!r:.200}")
    return text


def pair(text: str) -> tuple[str, object]:
    """NAME=VALUE, of numbers, true and false their values."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r:.200}")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            pass
    return name, {"true": True, "false": False}.get(value.lower(), value)
