"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyvidx.memory.policy import Policy
from pyvidx.ops._library import require
from pyvidx.sizes import check

POLICIES: dict[str, Callable[..., Policy]] = {}


def register(name: str) -> Callable[..., Any]:
    """Decorator: make a policy known to `create` under a name."""

    def known(policy: Any) -> Any:
        POLICIES[name] = policy
        return policy

    return known


def names() -> list[str]:
    """The policies that `create` knows."""
    return list(POLICIES)


def create(name: str, **options: Any) -> Policy:
    """A policy by name, one of `names()`. Its options are the fields of its class.

    Raises:
        ValueError: the name, an option or its value is unknown.
    """
    require(name in POLICIES, f"memory.create: name must be one of {', '.join(POLICIES)}, got {name!r}")
    try:
        policy = POLICIES[name](**options)
    except TypeError as error:
        raise ValueError(f"memory.create: the options do not fit {name!r}: {error}") from None
    check(policy, zero=("anchors",))
    return policy
