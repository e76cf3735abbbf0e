"""Numbers as users give them, from a csv or a command line too."""

from __future__ import annotations

import math
from typing import Any


def number(op: str, name: str, value: Any, *, at_least: float | None = None, above: float | None = None) -> float:
    """A finite float; text is converted.

    Raises:
        ValueError: it is no finite number, or out of range.
    """
    try:
        if isinstance(value, (bytes, bytearray)):
            raise ValueError
        result = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(f"{op}: {name} must be a number, got {value!r}") from None
    if not math.isfinite(result):
        raise ValueError(f"{op}: {name} must be finite, got {value!r}")
    if at_least is not None and result < at_least:
        raise ValueError(f"{op}: {name} must be >= {at_least}, got {value!r}")
    if above is not None and result <= above:
        raise ValueError(f"{op}: {name} must be > {above}, got {value!r}")
    return result


def integer(op: str, name: str, value: Any, *, at_least: int | None = None) -> int:
    """An int; text and whole floats are converted.

    Raises:
        ValueError: it is no whole number, or out of range.
    """
    result = number(op, name, value, at_least=at_least)
    if result != int(result):
        raise ValueError(f"{op}: {name} must be a whole number, got {value!r}")
    return int(result)
