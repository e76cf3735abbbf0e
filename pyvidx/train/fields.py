"""Configurations from files: every value has its type and range before anything is done with it."""

import dataclasses
import inspect
import math
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence

from pyvidx.models.config import known

# Largest number of anything that is counted: of more, a typing error is likelier.
MANY = 10**9
# Frames of a clip: thousands of tokens each.
FRAMES = 10_000
SMALLEST = 1e-300
BELOW_ONE = math.nextafter(1.0, 0.0)
_NAMES = {
    int: "a whole number", float: "a finite number", str: "a text", bool: "true or false", dict: "an object",
    types.NoneType: "null",
}  # fmt: skip


def fields(cls, values: object, needed: Sequence[str] = ()) -> dict:
    """The values of a JSON or TOML object as a dataclass takes them: tuples for lists, dataclasses for objects.

    Args:
        cls: the dataclass; of dataclasses among its fields `from_dict` is called.
        values: to check.
        needed: fields that must be among them.

    Raises:
        ValueError: it is no object, or a field is unknown, missing, or not of its type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__}: it must be an object, got {reprlib.repr(values)}")
    missing = [name for name in needed if name not in values]
    if missing:
        raise ValueError(f"{cls.__name__}: {', '.join(missing)} must be given")
    hints = typing.get_type_hints(cls)
    return {name: _fitted(value, hints[name], f"{cls.__name__}: {name}") for name, value in known(cls, values).items()}


def arguments(function: Callable, values: Mapping, who: str) -> dict:
    """The same of the arguments of a function.

    Raises:
        ValueError: they are not those of the function, or not of their types.
    """
    try:
        inspect.signature(function).bind(**values)
    except TypeError as error:
        raise ValueError(f"{who}: {error}") from error
    return typed(function, values, who)


def typed(function: Callable, values: Mapping, who: str) -> dict:
    """The same of some of its arguments."""
    hints = typing.get_type_hints(function)
    if unknown := values.keys() - hints.keys():
        raise ValueError(f"{who}: it has no {', '.join(sorted(unknown))}, but {', '.join(hints)}")
    return {name: _fitted(value, hints[name], f"{who}: {name}") for name, value in values.items()}


def check_ranges(config, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise ValueError where a number of a dataclass, or one of several, is not in its range; None is in all."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not low <= number <= high:  # not a number is in none
                bound = f"at most {high}" if number > high else f"at least {low}"
                raise ValueError(f"{type(config).__name__}: {name} must be {bound}, got {value}")


def check_choices(config, choices: Mapping[str, Collection[str]]) -> None:
    """Raise ValueError where a text of a dataclass is none of those that it may be; None is in all."""
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value is not None and value not in allowed:
            raise ValueError(
                f"{type(config).__name__}: {name} must be one of {', '.join(allowed)}, got {reprlib.repr(value)}"
            )


def _fitted(value: object, hint, where: str):
    """A value as its type has it."""
    for kind in typing.get_args(hint) if _is_union(hint) else (hint,):
        if dataclasses.is_dataclass(kind) and isinstance(value, dict):
            return kind.from_dict(value)
        try:
            return _plain(value, kind)
        except TypeError:
            continue
    raise ValueError(f"{where} must be {_described(hint)}, got {reprlib.repr(value)}")


def _plain(value: object, kind):
    """Raises TypeError where the value is not of this kind."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is float and type(value) in (int, float) and abs(value) < 1e300:  # what is no number is not
        return float(value)
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(inner):
        return tuple(_plain(item, k) for item, k in zip(value, inner))
    if origin in (list, Sequence) and isinstance(value, list) and value:
        return [_plain(item, inner[0]) for item in value]
    if origin is dict and isinstance(value, dict):
        return {k: _plain(v, inner[1]) for k, v in value.items()} if inner else value
    if origin in (int, str, bool, types.NoneType) and type(value) is origin:
        return value
    raise TypeError


def _described(hint) -> str:
    """In the words of JSON."""
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if _is_union(hint):
        return " or ".join(dict.fromkeys(filter(None, map(_described, inner))))
    if origin is tuple:
        return f"a list of {len(inner)} like {_described(inner[0])}"
    if origin in (list, Sequence):
        return f"a list of at least one, each {_described(inner[0])}"
    if origin is dict and inner:
        return f"an object with {_described(inner[1])} for each name"
    return _NAMES.get(dict if dataclasses.is_dataclass(hint) else origin, "")


def _is_union(hint) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
