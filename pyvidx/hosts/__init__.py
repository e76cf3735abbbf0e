"""What other people's programs are joined by: transformers, open_clip, language models."""

from pyvidx.hosts.compress import compress
from pyvidx.hosts.together import together

__all__ = ["compress", "together"]
