"""What the commands share: arguments that are checked before any work is done, errors in one line, and how they end."""

import argparse
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from pyvidx.files import check_output, printable

INTERRUPTED, PIPE_CLOSED = 130, 141  # 128 + the signal, as shells count


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and exit 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {printable(message)} (--help says more)\n")


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace output files that exist")


def check_outputs(parser: argparse.ArgumentParser, overwrite: bool, *paths: Path | None) -> None:
    """End with one line, before any work, if one of the outputs exists or cannot be written."""
    given = [path for path in paths if path is not None]
    if len({os.path.realpath(path) for path in given}) < len(given):
        parser.error("output: files must differ, got one twice")
    for path in given:
        try:
            check_output(path, overwrite=overwrite)
        except OSError as error:
            parser.error(str(error))


def count(text: str) -> int:
    """A whole number of at least 1."""
    value = _number(int, text)
    if value is None or value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def amount(text: str) -> float:
    """A number of at least 1."""
    value = _number(float, text)
    if value is None or not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return value


def seconds(text: str) -> float:
    """Seconds, finite and not negative."""
    value = _number(float, text)
    if value is None or not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be seconds, 0 or more, got {text!r}")
    return value


def check_span(parser: argparse.ArgumentParser, start: float | None, end: float | None) -> None:
    """End with one line unless [start, end) can hold a frame."""
    if end is not None and end <= (start or 0.0):
        parser.error(f"--end must come after --start, got {start or 0.0:g} to {end:g}")


def device(text: str) -> str:
    """A device that is here."""
    from pyvidx.device import usable

    try:
        return str(usable(text))
    except (RuntimeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def outputs(text: str) -> list[str]:
    """Names of a model's outputs, with commas between them."""
    names = text.split(",")
    if not names or not set(names) <= {"pooled", "tokens"} or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"must be pooled, tokens or pooled,tokens, got {text!r}")
    return names


def weights(text: str) -> Path:
    """A file or folder of weights that is there."""
    path = file(text)
    if path.exists():
        return path
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not path.parent.is_dir()
    hint = "; pyvidx downloads nothing: if it is a name on a hub, download it and give the folder" if hub else ""
    raise argparse.ArgumentTypeError(f"there is no {path}{hint}")


def file(text: str) -> Path:
    """A path: no URL."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"pyvidx reads files: download {text} and give its path")
    return Path(text)


def existing(text: str) -> Path:
    """A file that is there."""
    path = file(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, {path} is a folder")
    if not path.exists():
        raise argparse.ArgumentTypeError(f"no such file: {path}")
    return path


def picture(text: str) -> Path:
    """Where a picture goes, if matplotlib is there and can write one of that suffix."""
    path = Path(text)
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise argparse.ArgumentTypeError("a picture needs matplotlib: pip install 'pyvidx[cli]'") from error
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise argparse.ArgumentTypeError(f"must end in .{', .'.join(sorted(kinds))}, got {text!r}")
    return path


def check_reader(parser: argparse.ArgumentParser, reader: str) -> None:
    """End with one line if the package of a --reader is not installed."""
    for package in {"auto": ["av"], "pyav": ["av"], "decord": ["av", "decord"]}.get(reader, ["av", reader]):
        if importlib.util.find_spec(package) is None:
            parser.error(f"--reader {reader} needs {package}: pip install {package}")


def ended(name: str, command: Callable[[], int | None]) -> int:
    """The exit code of a command. Ctrl-C, a reader of the output that went away, a full disk and the errors of devices
    and decoders are one line at most; python -X dev shows where they came from."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show costs no run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = command() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # What is still buffered for the reader that is gone would fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (OSError, RuntimeError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"{name}: {type(error).__name__}: {printable(str(error))}", file=sys.stderr)
        return 1


def _number(kind: type, text: str):
    try:
        return kind(text)
    except ValueError:
        return None
