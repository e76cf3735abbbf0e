"""MA-LMM: the memory bank, step by step, on the slots of memory_merge_."""

import torch

from pyvidx.ops import memory_merge_
from tests.golden.vectors import runner


class SlotBank:
    """A bank as memory_merge_ keeps it: M + 1 slots, and the order in which they are to be read."""

    def __init__(self, B, M, N, C, dtype):
        self.M = M
        self.bank = torch.zeros(B, M + 1, N, C, dtype=dtype)
        self.sizes = torch.zeros(B, N, M + 1, dtype=torch.int32)
        self.order = torch.arange(M + 1, dtype=torch.int32).repeat(B, N, 1)
        self.similarity = torch.zeros(B, N, M)
        self.length = torch.zeros(B, dtype=torch.int32)

    def step(self, frame=None):
        return memory_merge_(self.bank, self.sizes, self.order, self.similarity, self.length, frame)

    def entries(self):
        """In time order: [B, n, N, C] and sizes [B, n, N]."""
        n = int(self.length[0])
        order = self.order[..., :n].long()  # [B, N, n]
        rows = self.bank.gather(1, order.transpose(1, 2)[..., None].expand(-1, -1, -1, self.bank.shape[-1]))
        return rows, self.sizes.gather(2, order).transpose(1, 2)


@runner("mbc_*", runs=lambda file: [""])
def memory_bank(file, run, variant, check):
    frames = file.tensors["in.frames"]
    T, B, N, C = frames.shape
    bank = SlotBank(B, file.meta["M"], N, C, frames.dtype)
    by_rounding = file.meta["kind"] == "identical"  # which pair is merged is decided by rounding errors
    for t, frame in enumerate(frames):
        bank.step(frame)
        index = None
        if t < T - 1 and int(bank.length[0]) > bank.M:
            index = bank.step()
        rows, sizes = bank.entries()
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
