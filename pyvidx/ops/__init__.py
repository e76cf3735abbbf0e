from pyvidx.ops.memory_merge import memory_merge, memory_merge_
from pyvidx.ops.token_gather import token_gather

__all__ = ["memory_merge", "memory_merge_", "token_gather"]
