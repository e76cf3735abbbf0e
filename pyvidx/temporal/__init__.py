"""Temporal modules: what gives a frozen image tower a sense of time.

    module = create("bt_adapter", vision)           # names() lists them; vision: ViTConfig
    encoder = pyvidx.models.VideoEncoder(tower, module)
    encoder(pixels, frame_mask=mask)                # [B, T, 3, h, w], bool [B, T] -> tokens, pooled

A new module is a class with @register in a file of its own, imported below; tests/test_temporal.py then holds it to
the properties of all.
"""

from pyvidx.temporal.branch import Branch, BTAdapterModule
from pyvidx.temporal.clip_vip import CLIPViP
from pyvidx.temporal.grid_pool import GridPool
from pyvidx.temporal.joint import Joint
from pyvidx.temporal.mean import Mean
from pyvidx.temporal.module import OUTPUTS, TemporalModule
from pyvidx.temporal.registry import MODULES, create, names, register
from pyvidx.temporal.separate import Separate
from pyvidx.temporal.st_adapter import STAdapter
from pyvidx.temporal.st_pool import STPool
from pyvidx.temporal.stan import STAN

__all__ = [
    "MODULES",
    "OUTPUTS",
    "STAN",
    "BTAdapterModule",
    "Branch",
    "CLIPViP",
    "GridPool",
    "Joint",
    "Mean",
    "STAdapter",
    "STPool",
    "Separate",
    "TemporalModule",
    "create",
    "names",
    "register",
]
