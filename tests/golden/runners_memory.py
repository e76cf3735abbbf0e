"""The policies of pyvidx.memory: MA-LMM's own merging, plain definitions of the others, and ToMe."""

import torch

from pyvidx import memory
from pyvidx.memory.tome import merge_tokens, reduce_tokens
from tests.golden.vectors import runner


def stream(policy, frames, each=lambda t, bank: None):
    """[B, T, N, C] frame by frame."""
    bank = policy.new(frames.shape[0], *frames.shape[2:])
    for t in range(frames.shape[1]):
        bank = policy.push(bank, frames[:, t])
        each(t, bank)
    return bank


def compare(check, name, bank):
    entries = bank.entries()
    check(f"out.{name}", entries.rows, 1e-6)
    check.equal(f"out.{name}_size", entries.sizes)


@runner("bank_policies", runs=lambda file: [""])
def bank_policies(file, run, variant, check):
    frames = file.tensors["in.frames"]
    for M in (1, 3, 4, 9):
        policy = memory.create("merge", capacity=M)
        compare(check, f"mbc_M{M}", stream(policy, frames, lambda t, b, M=M: compare(check, f"mbc_M{M}_step{t}", b)))
    for case in ("tie", "zero"):
        compare(check, f"mbc_{case}", stream(memory.create("merge", capacity=3), file.tensors[f"in.{case}"]))
    compare(check, "avgpool", stream(memory.create("average"), frames))
    compare(check, "concat", stream(memory.create("concat"), frames))
    compare(check, "fifo_M4", stream(memory.create("fifo", capacity=4), frames))


@runner("tome_bank_temporal_stream", runs=lambda file: [""])
def tome_time(file, run, variant, check):
    frames = file.tensors["in.frames"]
    for M in (3, 4):
        entries = stream(memory.create("tome", capacity=M), frames).entries()
        check(f"out.bank_M{M}", entries.rows, 1e-6)
        check.equal(f"out.size_M{M}", entries.sizes)
        source = file.tensors[f"out.source_M{M}"] > 0  # [B, M, N, T]: which frames each entry holds
        assert torch.equal(entries.sizes, source.sum(3).int())
        assert torch.equal(entries.first.long(), source.int().argmax(3))
        assert torch.equal(entries.last.long(), source.shape[3] - 1 - source.flip(3).int().argmax(3))
        check.excuse(f"out.source_M{M}")


@runner("tome_bank_spatial", runs=lambda file: [""])
def tome_space(file, run, variant, check):
    frames = file.tensors["in.bank"]
    for tokens in (2, 5):
        entries = stream(memory.create("tome", axis="space", tokens=tokens), frames).entries()
        check(f"out.keep{tokens}", entries.rows, 1e-6)
        check.equal(f"out.size{tokens}", entries.sizes)
        B, T, N, _ = frames.shape
        holder = reduce_tokens(frames.flatten(0, 1), tokens)[2].view(B, T, 1, N)
        check.equal(f"out.source{tokens}", holder == torch.arange(tokens)[:, None])


@runner("tome_bsm_r?", runs=lambda file: [""], may_lack=("out.amax", "out.mean", "out.sum", "out.unmerge", "out.*2"))
@runner("tome_bsm_rmax", runs=lambda file: [""], may_lack=("out.amax", "out.mean", "out.sum", "out.unmerge", "out.*2"))
def tome_round(file, run, variant, check):
    """One round, without protected tokens, of which a bank has none."""
    x = file.tensors["in.x"]
    B, n, _ = x.shape
    r = min(file.meta["r"], n // 2)
    rows, sizes, holder = merge_tokens(x, torch.ones(B, n), r, file.tensors["in.metric"])
    check("out.wavg", rows, 1e-6)
    check.equal("out.size", sizes[..., None])
    check.equal("out.source", holder[:, None] == torch.arange(n - r)[:, None])
