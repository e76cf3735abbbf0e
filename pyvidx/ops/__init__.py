from pyvidx.ops.temporal_attention import temporal_attention
from pyvidx.ops.token_gather import token_gather

__all__ = ["temporal_attention", "token_gather"]
