"""What other people's programs are joined by: transformers, open_clip, language models."""

from pyvidx.hosts.attached import attached
from pyvidx.hosts.compress import compress
from pyvidx.hosts.session import Answer, Session
from pyvidx.hosts.together import together

__all__ = ["Answer", "Session", "attached", "compress", "together"]
