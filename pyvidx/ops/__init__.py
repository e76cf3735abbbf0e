from pyvidx.ops.bank_attention import bank_attention
from pyvidx.ops.gated_fusion import fusion_input, gated_fusion, output_gate
from pyvidx.ops.memory_merge import memory_merge, memory_merge_
from pyvidx.ops.memory_scan import MergePlan, memory_replay_, memory_scan_
from pyvidx.ops.quick_gelu import quick_gelu
from pyvidx.ops.residual_norm import residual_norm
from pyvidx.ops.resize_normalize import resize_normalize
from pyvidx.ops.st_pool import st_pool
from pyvidx.ops.temporal_attention import temporal_attention
from pyvidx.ops.temporal_scale import temporal_scale
from pyvidx.ops.token_gather import token_gather

__all__ = [
    "MergePlan",
    "bank_attention",
    "fusion_input",
    "gated_fusion",
    "memory_merge",
    "memory_merge_",
    "memory_replay_",
    "memory_scan_",
    "output_gate",
    "quick_gelu",
    "residual_norm",
    "resize_normalize",
    "st_pool",
    "temporal_attention",
    "temporal_scale",
    "token_gather",
]
