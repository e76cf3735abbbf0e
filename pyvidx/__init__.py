"""Fast video encoders for language models. Names are imported when first used; importing pyvidx does no work."""

import importlib
from typing import Any

_HOME = {
    "BTAdapter": "pyvidx.models",
    "Encoding": "pyvidx.models",
    "MALMM": "pyvidx.models",
    "TextVideo": "pyvidx.models",
    "VideoEncoder": "pyvidx.models",
    "Clip": "pyvidx.video",
    "read": "pyvidx.video",
    "stream": "pyvidx.video",
    "encode_videos": "pyvidx.corpus.encode",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pyvidx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
