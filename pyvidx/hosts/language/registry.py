"""Hosts by the model_type of their configurations. A file of this folder is imported when its name is asked for."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from pyvidx.hosts.language.host import Host

HOSTS: dict[str, type[Host]] = {}
PACKAGE = "pyvidx.hosts.language"


def register(*model_types: str) -> Callable[[type[Host]], type[Host]]:
    """Decorator: make a host known under the model_type of one or more configurations. Those of pyvidx lie in a file
    named after the first; a class of another program is known once it is registered."""

    def known(kind: type[Host]) -> type[Host]:
        for name in model_types:
            HOSTS[name] = kind
        return kind

    return known


def names() -> list[str]:
    """The model types that there is a host for."""
    for file in _files():
        importlib.import_module(f"{PACKAGE}.{file}")
    return sorted(HOSTS)


def host_of(model: nn.Module, processor: Any = None) -> Host:
    """The host of a model of transformers, also where PEFT, torch.compile or a wrapper for parallel training holds it.

    Raises:
        ValueError: there is none for its config.model_type.
        RuntimeError: transformers is older than 5.20.2 and takes no encoded video, or not that of every model.
    """
    model = _bare(model)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in HOSTS and kind in _files():
        importlib.import_module(f"{PACKAGE}.{kind}")
    if kind not in HOSTS and kind not in names():
        said = type(model).__name__ if kind is None else repr(kind)
        raise ValueError(f"compress: the model's config.model_type must be one of {', '.join(names())}, got {said}")
    import transformers

    if tuple(map(int, re.findall(r"\d+", transformers.__version__)[:3])) < (5, 20, 2):
        raise RuntimeError(
            f"compress: models take encoded video (mm_encoder_outputs) from transformers 5.20.2 on, this is "
            f"{transformers.__version__}: pip install -U transformers"
        )
    return HOSTS[kind](model, processor)


def _bare(model: nn.Module) -> nn.Module:
    if hasattr(model, "get_base_model"):  # PEFT
        return _bare(model.get_base_model())
    wrapped = isinstance(model, (DataParallel, DistributedDataParallel))
    inner = model.module if wrapped else getattr(model, "_orig_mod", model)
    return model if inner is model else _bare(inner)


def _files() -> list[str]:
    path = importlib.import_module(PACKAGE).__path__
    return [module.name for module in pkgutil.iter_modules(path)]
