"""What the commands share: arguments that are checked before any work is done, errors in one line, and how they end."""

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from pyvidx.files import check_output, printable

INTERRUPTED, PIPE_CLOSED = 130, 141  # 128 + the signal, as shells count


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and exit 2, and whose --help ends with an example.

    Args:
        example: a command that parses.
    """

    def __init__(self, *args, example: str | None = None, **options):
        super().__init__(*args, **options)
        self.example = example

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {printable(message)} (--help says more)\n")

    def format_help(self) -> str:
        return super().format_help() + (f"\nexample:\n  {self.example}\n" if self.example else "")


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace output files that exist")


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device, by default a GPU if there is one."""
    from torch.cuda import is_available

    default = "cuda" if is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default, help="cpu, cuda or cuda:N")


def add_model(parser: argparse.ArgumentParser, without: str = "a small built-in model") -> None:
    """--model and --module, as every command takes them; see pyvidx.hosts.open.open_model."""
    parser.add_argument(
        "--model",
        type=model,
        help="a file or folder that pyvidx saved, a folder of transformers, a published file (.pth, .pt, .bin, "
        f".safetensors), or open_clip:NAME[:FILE]; without: {without}",
    )
    parser.add_argument(
        "--module",
        type=module,
        metavar="NAME[:OPTION=VALUE,...]",
        help="temporal module, e.g. stan:depth=2, of which `pyvidx flops` lists all; default: the model's own, for a "
        "tower alone mean. Another than the model's own has random weights",
    )


def check_outputs(
    parser: argparse.ArgumentParser,
    overwrite: bool,
    *paths: str | os.PathLike | None,
    inputs: Iterable[str | os.PathLike | None] = (),
) -> None:
    """End with one line, before any work, if one of the outputs exists, cannot be written, or is an input."""
    given = [os.path.realpath(path) for path in paths if path is not None]
    if len({*given}) < len(given):
        parser.error("output: files must differ, got one twice")
    for path in inputs:
        if path is not None and os.path.realpath(path) in given:
            parser.error(f"output: {path} is an input, which would be lost; give another name")
    for path in given:
        try:
            check_output(path, overwrite=overwrite)
        except OSError as error:
            parser.error(str(error))


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """A whole number of a range."""

    def convert(text: str) -> int:
        value = _number(int, text)
        if value is None or not least <= value <= most:
            limit = f"of at least {least}" if value is None or value < least else f"of at most {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number {limit}, got {text!r:.100}")
        return value

    return convert


count = whole_number(1, 10**9)  # of more, a typing error is likelier
frames = whole_number(1, 10_000)  # thousands of tokens each
workers = whole_number(1, 1024)  # processes


def amount(text: str) -> float:
    """A number of at least 1."""
    value = _number(float, text)
    if value is None or not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r:.100}")
    return value


def positive(text: str) -> float:
    """A number above 0."""
    value = _number(float, text)
    if value is None or not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text!r:.100}")
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
    if not set(names) <= {"pooled", "tokens"} or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"must be pooled, tokens or pooled,tokens, got {text!r}")
    return names


def model(text: str) -> str:
    """What --model names, if it is there; see pyvidx.hosts.open.open_model."""
    from pyvidx.hosts.open import check_source

    return _checked(check_source, text)


def module(text: str) -> str:
    """A temporal module and its options, if there is such a one."""
    from pyvidx.hosts.open import parse_module

    return _checked(parse_module, text)


def file(text: str) -> Path:
    """A path: no URL."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got an empty one")
    if "://" in text:
        raise argparse.ArgumentTypeError(f"pyvidx reads files: download {text} and give its path")
    return Path(text)


def out(text: str) -> str:
    """Where something is written on this machine; a slash at the end stays."""
    if not text or "://" in text:
        raise argparse.ArgumentTypeError(f"must be a path on this machine, got {text!r:.200}")
    return text


def there(text: str) -> Path:
    """A file or folder that is there."""
    path = file(text)
    if not os.path.exists(path):
        raise argparse.ArgumentTypeError(f"there is no {path}")
    return path


def existing(text: str) -> Path:
    """A file that is there."""
    path = file(text)
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"must be a file, {path} is a folder")
    if not os.path.exists(path):
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
    for package in ["av"] if reader in ("auto", "pyav") else ["av", reader]:
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


def _checked(check: Callable[[str], object], text: str) -> str:
    """The text, if the check takes it."""
    try:
        check(text)
    except (OSError, RuntimeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _number(kind: type, text: str):
    try:
        return kind(text)
    except ValueError:
        return None
