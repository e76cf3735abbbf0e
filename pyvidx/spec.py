"""What names something with options in one word: NAME, or NAME:OPTION=VALUE,... as in stan:depth=2,per_frame=True."""

import ast
from typing import Any


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """The name, and the options with their values: of Python's literals (2, 0.5, True, None, (3, 1, 1)), else words.

    Raises:
        ValueError: an option is not NAME=VALUE, or given twice.
    """
    name, _, rest = text.partition(":")
    options = {}
    for part in _split(rest) if rest else ():
        option, equals, value = part.partition("=")
        if not equals or not option.isidentifier() or option in options:
            raise ValueError(f"{name}: its options must be NAME=VALUE with commas between, each once, got {part!r}")
        try:
            options[option] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            options[option] = value
    return name, options


def _split(text: str) -> list[str]:
    """At commas that are in no bracket: kernel=(3,1,1),width=64."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([") - (c in ")]")
        if c == "," and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return parts
