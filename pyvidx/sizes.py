"""Configurations hold what their fields declare: they may come from the header of a file that anyone wrote."""

import dataclasses
import math
import typing
from collections.abc import Sequence
from typing import Any

LARGEST = 2**31 - 1


def check(config: Any, zero: Sequence[str] = ()) -> None:
    """Refuse a dataclass whose fields are not of their declared types; int, float, str, bool and None are looked at.

    Args:
        config: ints must be in [1, 2^31), floats finite.
        zero: names of the ints that may be 0.

    Raises:
        ValueError: a field is not what it must be.
    """
    hints, kind = typing.get_type_hints(type(config)), type(config).__name__
    for field in dataclasses.fields(config):
        value, low = getattr(config, field.name), 0 if field.name in zero else 1
        if typing.get_origin(hints[field.name]) is tuple:
            continue
        wanted = typing.get_args(hints[field.name]) or (hints[field.name],)
        if not {*wanted} <= {int, float, str, bool, type(None)}:
            continue
        if not any(_is(value, one) for one in wanted):
            said = " or ".join("None" if one is type(None) else one.__name__ for one in wanted)
            raise ValueError(f"{kind}: {field.name} must be {said}, got {value!r:.100}")
        if _is(value, int) and float not in wanted and not low <= value <= LARGEST:
            raise ValueError(f"{kind}: {field.name} must be in [{low}, {LARGEST}], got {value!r:.100}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{kind}: {field.name} must be finite, got {value}")


def check_counts(op: str, least: int = 1, **counts: int) -> None:
    """Refuse arguments that are no whole numbers from `least` on.

    Raises:
        ValueError: one is not; op says whose it is.
    """
    for name, value in counts.items():
        if not _is(value, int) or not least <= value <= LARGEST:
            raise ValueError(f"{op}: {name} must be a whole number in [{least}, {LARGEST}], got {value!r:.100}")


def _is(value: Any, wanted: type) -> bool:
    numbers = (int, float) if wanted is float else wanted
    return isinstance(value, numbers) and (wanted is bool or not isinstance(value, bool))
