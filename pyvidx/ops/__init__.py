from pyvidx.ops.token_gather import token_gather

__all__ = ["token_gather"]
