"""What other people's programs are joined by: transformers, open_clip, language models."""

from pyvidx.hosts.compress import compress

__all__ = ["compress"]
