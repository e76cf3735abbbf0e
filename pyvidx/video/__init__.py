"""Video files to frames: sampled reads, constant-memory streaming, exact named sampling rules, and a small writer."""

from . import sampling
from .clip import Clip, Damage
from .find import find_videos
from .pool import Decoders
from .reader import follow, read, stream
from .writer import write

__all__ = ["Clip", "Damage", "Decoders", "find_videos", "follow", "read", "sampling", "stream", "write"]
