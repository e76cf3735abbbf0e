"""pyvidx ask VIDEO "question" --model DIR: a video language model's answer, through a memory."""

import argparse
import importlib.util
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyvidx.cli import arguments
from pyvidx.files import printable

PACKAGES = {"transformers": "pyvidx[hosts]", "av": "pyvidx[video]"}
MOST = 40  # slots that are printed


def parser() -> argparse.ArgumentParser:
    p = arguments.Parser(
        prog="pyvidx ask",
        description="Ask a video language model of transformers about a video. Its own encoder reads the frames, a "
        "memory keeps what fits in --capacity slots, its language model answers. Printed are the answer, the seconds "
        "of the video that each slot holds, and where the time went (compress is, with an InstructBLIP or BLIP-2, the "
        "Q-Former with its memory). With --live the video may still be written, and "
        "answers come as it goes: one every --every seconds of it, or, without a QUESTION, one to each line that is "
        "typed.",
        epilog='live: ffmpeg -i CAMERA -f mpegts - | pyvidx ask - "what happens?" --live --every 10 --model DIR',
        example='pyvidx ask video.mp4 "what is the person doing?" --model onevision/ --memory merge --capacity 16',
    )
    p.add_argument("video", help="a video file; with --live also - (standard input), a pipe, or a file that grows, in "
                   "a container that plays from its start (MPEG-TS, Matroska, fragmented MP4)")  # fmt: skip
    p.add_argument("question", nargs="?", help="what is asked; only with --live it may be left out")
    p.add_argument("--model", required=True, type=arguments.there, metavar="DIR",
                   help="a folder of transformers, model and processor: one of pyvidx.hosts.language.names(), a LLaVA "
                   "or MiniGPT-4 with a BT-Adapter, an InstructBLIP or a BLIP-2")  # fmt: skip
    p.add_argument("--memory", type=policy, metavar="NAME[:OPTION=VALUE,...]",
                   help="what is kept of the frames, e.g. merge or fifo:anchors=1, see `pyvidx memory`. With an "
                   "InstructBLIP or BLIP-2 merge is MA-LMM's, within the Q-Former; merge:query=False is "
                   "its visual bank alone. Default: none, all frames are shown; --live: merge")  # fmt: skip
    p.add_argument("--capacity", type=arguments.count, help="slots of the memory; default: its own")
    p.add_argument("--frames", type=arguments.frames, help="frames to take of the video; default: 32, and with a "
                   "BT-Adapter as its processor says")  # fmt: skip
    p.add_argument("--sampler", help="which frames, a name of pyvidx.video.sampling; default: linspace, and with a "
                   "BT-Adapter midpoint")  # fmt: skip
    p.add_argument("--fps", type=arguments.positive, help="frames per second to take instead, of a video of any "
                   "length, which is then read in constant memory; default with --live: 1")  # fmt: skip
    p.add_argument("--live", action="store_true", help="answer while the video goes on")
    p.add_argument("--every", type=arguments.positive, help="of --live: seconds of the video between answers; default: "
                   "10")  # fmt: skip
    p.add_argument("--idle", type=arguments.seconds, help="of --live: seconds after which a file that does not grow "
                   "has ended; default: 10")  # fmt: skip
    p.add_argument("--new-tokens", type=arguments.count, default=128, help="tokens of an answer at most; default: 128")
    p.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="of the weights; default: as saved")
    arguments.add_device(p)
    return p


def policy(text: str) -> tuple[str, dict]:
    """A policy's name and options; see pyvidx.cli.memory.named_policy."""
    from pyvidx.cli.memory import named_policy

    return named_policy(text)


def check(p: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with one line, before anything is loaded, where arguments do not go together; fill in defaults."""
    given = [name for name in ("every", "idle") if getattr(options, name) is not None]
    if not options.live and given:
        p.error(f"--{given[0]} needs --live")
    if not options.live and not (options.question or "").strip():
        p.error("there must be a question; only with --live they may be typed")
    if options.live and (wrong := [name for name in ("frames", "sampler") if getattr(options, name) is not None]):
        p.error(f"--{wrong[0]} must not be given with --live, whose frames are those of --fps")
    if options.frames is not None and options.fps is not None:
        p.error("--frames or --fps must be given, not both")
    if options.sampler is not None and options.fps is not None:
        p.error("--sampler is of --frames; --fps takes frames at even times")
    if options.video == "-" and not options.live:
        p.error("- (standard input) needs --live")
    if options.live and options.question is None:
        if options.video == "-":
            p.error("- is the video: without a question they would be typed there, too; give the question")
        if options.every is not None:
            p.error("--every needs a question")
    if options.question is not None and not options.question.strip():
        p.error("the question must have a word")
    if options.sampler is not None:
        from pyvidx.video import sampling

        try:
            sampling.sample(options.sampler, 100, options.frames, fps=25.0)
        except ValueError as error:  # no such rule, or one that draws
            p.error(f"--sampler: {error}")
    for package, extra in PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            p.error(f"this needs {package}: pip install '{extra}'")
    if options.video != "-":
        try:
            path = arguments.there(options.video)
        except argparse.ArgumentTypeError as error:
            p.error(str(error))
        if path.is_dir():
            p.error(f"the video must be a file, {path} is a folder")
    if options.live:
        options.fps, options.every = options.fps or 1.0, options.every or 10.0
        options.idle = 10.0 if options.idle is None else options.idle
    if options.memory is None and (options.live or options.capacity is not None):
        options.memory = ("merge", {})


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(argv)
    check(p, options)
    from safetensors import SafetensorError

    from pyvidx.cli import ask_hosts
    from pyvidx.cli.ask_hosts import Clock

    clock = Clock()
    try:
        kind = ask_hosts.kind_of(options)
        with clock.of("load"):
            watcher = kind(options, clock)
        code = watch(watcher, options, clock) if options.live else once(watcher, options, clock)
    except BrokenPipeError:
        raise  # who reads the answers has left; that is no fault of a file
    except (OSError, ValueError, SafetensorError) as error:  # transformers has OSError for a part that is not there
        p.error(str(error))
    except RuntimeError as error:
        print(f"FAILED {printable(options.video)}: {printable(str(error))}", file=sys.stderr)
        return 1
    print(clock)
    return code


def once(watcher, options: argparse.Namespace, clock) -> int:
    """All of the video, then the answer."""
    from pyvidx.video import read, stream

    if options.fps is None:
        with clock.of("read"):
            frames, sampler = watcher.sampling
            clips = iter([read(Path(options.video), options.frames or frames, options.sampler or sampler)])
    else:
        clips = stream(Path(options.video), chunk=16, fps=options.fps)
    for clip in taken(clips, clock):
        watcher.push(clip)
    print("\n".join(map(printable, watcher.ask(options.question).splitlines())))
    print(table(watcher))
    return 0


def watch(watcher, options: argparse.Namespace, clock) -> int:
    """Answers while the video goes on, and one at its end where the question is given. Returns the exit code: Ctrl-C,
    as a camera does not end by itself, is an end as well."""
    from pyvidx.video import follow

    typed = Typed() if options.question is None else None
    due, now, said, code = options.every, 0.0, False, 0
    try:
        for clip in taken(follow(options.video, chunk=1, fps=options.fps, idle=options.idle), clock):
            watcher.push(clip)
            now, said = float(clip.seconds[-1]), False
            if typed is not None:
                typed.answer(watcher, now)
            elif now >= due:
                tell(watcher, options.question, now)
                due, said = now + options.every, True
        if typed is not None:
            typed.reader.join(1.0)  # what was piped in may still be on its way
            typed.answer(watcher, now)
        elif not said:
            tell(watcher, options.question, now)
    except KeyboardInterrupt:
        if not watcher.frames:
            raise
        code = arguments.INTERRUPTED
    print(table(watcher))
    return code


def tell(watcher, question: str, now: float) -> None:
    """A line at once: who reads it may be waiting."""
    print(f"{now:.1f} s | {printable(question)} | {printable(watcher.ask(question))}", flush=True)


class Typed:
    """Lines of standard input, as they are typed."""

    def __init__(self):
        self.lines: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in sys.stdin:
            if line.strip():
                self.lines.put(line.strip())

    def answer(self, watcher, now: float) -> None:
        """Answer those that wait."""
        while not self.lines.empty():
            tell(watcher, self.lines.get(), now)


def taken(clips: Iterator, clock) -> Iterator:
    """The clips, and the time that reading them takes."""
    while True:
        with clock.of("read"):
            clip = next(clips, None)
        if clip is None:
            return
        yield clip


def table(watcher) -> str:
    """What the slots hold."""
    rows = watcher.slots()
    lines = [f"{watcher.frames} frames, {watcher.said}"]
    if rows is None:
        return lines[0]
    lines.append("slot   first s    last s")
    lines += [f"{i:4} {first:9.2f} {last:9.2f}" for i, (first, last) in enumerate(rows[:MOST])]
    return "\n".join(lines + ([f"... and {len(rows) - MOST} more"] if len(rows) > MOST else []))
