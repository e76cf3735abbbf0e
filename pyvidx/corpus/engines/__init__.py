"""Engines: where a corpus is decoded and encoded.

A new engine is a class with @register in a file of its own, imported below.
"""

from pyvidx.corpus.engines.local import Local
from pyvidx.corpus.engines.ray import Ray
from pyvidx.corpus.engines.registry import ENGINES, Engine, Job, named, register

__all__ = ["ENGINES", "Engine", "Job", "Local", "Ray", "named", "register"]
