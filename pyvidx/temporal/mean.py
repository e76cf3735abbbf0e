"""The baseline: frames by themselves, averaged."""

from pyvidx.temporal.module import TemporalModule
from pyvidx.temporal.registry import register


@register("mean")
class Mean(TemporalModule):
    """No parameters, no sense of order. "Baseline" in the tables of BT-Adapter (arXiv:2309.15785)."""

    class_row = True
