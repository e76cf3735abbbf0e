"""Temporal modules by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyvidx.backbones.vit import ViTConfig
from pyvidx.ops._library import require
from pyvidx.temporal.module import TemporalModule

MODULES: dict[str, type[TemporalModule]] = {}


def register(name: str) -> Callable[..., Any]:
    """Decorator: make a module known to `create` under a name."""

    def known(module: Any) -> Any:
        MODULES[name], module.name = module, name
        return module

    return known


def names() -> list[str]:
    """The modules that `create` knows."""
    return list(MODULES)


def create(name: str, vision: ViTConfig, **options: Any) -> TemporalModule:
    """A temporal module by name, for a tower of these sizes. Its options are the keyword arguments of its class.

    Raises:
        ValueError: the name, an option or its value is unknown, or does not fit the tower.
    """
    require(name in MODULES, f"temporal.create: name must be one of {', '.join(MODULES)}, got {name!r}")
    try:
        module = MODULES[name](vision, **options)
    except TypeError as error:
        raise ValueError(f"temporal.create: the options do not fit {name!r}: {error}") from None
    module.spec = {"name": name, **options}
    return module
