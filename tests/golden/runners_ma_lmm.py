"""MA-LMM: the memory bank, step by step, on the slots of memory_merge_."""

import torch

from pyvidx.ops.memory_merge import in_order, memory_merge_, new_state
from tests.golden.vectors import runner


@runner("mbc_*", runs=lambda file: [""])
def memory_bank(file, run, variant, check):
    frames, M = file.tensors["in.frames"], file.meta["M"]
    T, B, N, C = frames.shape
    state = new_state(B, M, N, C)
    by_rounding = file.meta["kind"] == "identical"  # which pair is merged is decided by rounding errors
    for t, frame in enumerate(frames):
        memory_merge_(*state[:5], frame)
        index = None
        if t < T - 1 and t >= M:  # full: merge at once, as the vectors do, and not before the next frame
            index = memory_merge_(*state[:5])
        rows, sizes = in_order(state)
        names = {what: f"out.{what}.{t:02d}" for what in ("bank", "size", "index", "gap")}
        check(names["bank"], rows, 2e-6)
        if by_rounding:
            check.excuse(names["index"])
            check.excuse(names["size"])
            assert torch.equal(sizes.sum(1).float(), file.tensors[names["size"]].sum(1))
        else:
            check.equal(names["size"], sizes)
            if index is not None:
                check.equal(names["index"], index)
        check.excuse(names["gap"])  # the distance to the second best pair; says how firm the choice is
