import os

import pytest
import torch

from pyvidx.ops.memory_merge import MemoryState, in_order, memory_merge_, new_state, rows_in_order
from pyvidx.ops.memory_scan import (
    MergePlan,
    memory_replay_,
    memory_scan_,
    reference_replay,
    reference_scan,
)
from tests.harness import DEVICES, DTYPES, poisoned, randn

EMULATED = "PYVIDX_OPS_LIBRARY" in os.environ  # CUDA kernels on the CPU: slow, and not the CPU kernels
ALL = [*DTYPES, torch.float64]
op_scan, op_replay = torch.ops.pyvidx.memory_scan_, torch.ops.pyvidx.memory_replay_


def clone(state):
    return MemoryState(*(x.clone() for x in state[:5]), tuple(x.clone() for x in state.attached))


def started(B, M, N, C, before, dtype=torch.float32, device="cpu", widths=(5, 40)):
    """A state after `before` frames."""
    state = new_state(B, M, N, C, dtype, device, widths)
    for t in range(before):
        frames = [randn(B, N, rows.shape[3], dtype=dtype, device=device, seed=100 + t, sliced=False)
                  for rows in (state.bank, *state.attached)]  # fmt: skip
        memory_merge_(*state[:5], frames[0], state.attached, frames[1:])
    return state


def clip_of(state, t, seed=0):
    """t slowly changing frames for the bank, and some for every attached tensor."""
    B, _, N, C = state.bank.shape
    rows = [randn(B, t, N, C, dtype=torch.float64, seed=seed, sliced=False).cumsum(1) * 0.5]
    rows += [randn(B, t, N, a.shape[3], dtype=torch.float64, seed=seed + i + 1) for i, a in enumerate(state.attached)]
    return [x.to(r.device, r.dtype) for x, r in zip(rows, (state.bank, *state.attached))]


def one_by_one(state, clips, weighted=True, active=None):
    """t calls of memory_merge_; the MergePlan that they amount to, written as lists of ids."""
    B, slots, N, _ = state.bank.shape
    t = clips[0].shape[1]
    held = [[state.order[b, n, : int(state.length[b])].tolist() for n in range(N)] for b in range(B)]
    table = torch.full((B, t, N, slots), -1, dtype=torch.int32)
    sources, counts = torch.full((B, t, N, 2), -1, dtype=torch.int32), torch.zeros(B, t, N, 2, dtype=torch.int32)
    for s in range(t):
        sizes = state.sizes.gather(2, state.order.long()).cpu()
        frames = [c[:, s] for c in clips]
        k = memory_merge_(
            *state[:5], frames[0], state.attached, frames[1:], weighted=weighted, active=active
        ).tolist()  # fmt: skip
        for b in range(B):
            for n in range(N):
                ids, i = held[b][n], k[b][n]
                if i >= 0:
                    sources[b, s, n], counts[b, s, n] = torch.tensor(ids[i : i + 2]), sizes[b, n, i : i + 2]
                    ids[i : i + 2] = [slots + t + s]
                if active is None or active[b]:
                    ids.append(slots + s)
                table[b, s, n, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    return MergePlan(*(x.to(state.bank.device) for x in (table, sources, counts)))


def assert_same(ours, theirs):
    for what, a, b in zip(MemoryState._fields, ours[:5], theirs[:5]):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), what


def check_scan(state, t, weighted=True, active=None, clips=None):
    """The scan and the replay of every attached tensor against t calls of memory_merge_: the same bits."""
    clips = clip_of(state, t) if clips is None else clips
    stepped, before = clone(state), clone(state)
    expected = one_by_one(stepped, clips, weighted, active)
    plan = memory_scan_(*state[:5], clips[0], weighted=weighted, active=active)
    assert_same(state, stepped)
    for what, a, b in zip(MergePlan._fields, plan, expected):
        assert torch.equal(a, b), what
    for i, rows in enumerate((before.bank, *state.attached)):
        extended = memory_replay_(rows, clips[i], plan, state.order, weighted=weighted)
        theirs = (stepped.bank, *stepped.attached)[i]
        for b, length in enumerate(state.length.tolist()):
            a, c = (rows_in_order(x[b : b + 1], state.order[b : b + 1], length) for x in (rows, theirs))
            assert torch.equal(a.nan_to_num(7), c.nan_to_num(7)), f"rows {i} of video {b}"
        nothing = (plan.sources[..., 0] < 0)[..., None]
        assert (extended[:, -clips[i].shape[1] :].where(nothing, 0) == 0).all(), "zeros where nothing merged"
    return plan


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("M, t, before", [(1, 5, 0), (3, 1, 4), (3, 20, 2), (10, 5, 11), (10, 20, 7)])
def test_forward(M, t, before, dtype, device):
    check_scan(started(2, M, 3, 20, before, dtype, device), t)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("C", [1, 17, 531, 1408])
def test_widths_and_plain_mean(C, device):
    """Not a multiple of a vector, and longer than one block of the walk; attached rows past a block of the replay."""
    check_scan(started(1, 2, 2, C, 3, device=device, widths=(C, 300)), 5, weighted=False)


@pytest.mark.parametrize("device", DEVICES)
def test_a_position_alone_and_among_many(device):
    """The same bits: a GPU gives a position fewer threads where there are more than it takes at a time."""
    N = 300 if device == "cuda" else 6
    many = new_state(1, 2, N, 1408, device=device)
    alone = new_state(1, 2, 1, 1408, device=device)
    clip = clip_of(many, 5)[0]
    memory_merge_(*many[:5], clip[:, 0]), memory_merge_(*alone[:5], clip[:, 0, -1:])
    memory_scan_(*many[:5], clip[:, 1:]), memory_scan_(*alone[:5], clip[:, 1:, -1:])
    assert torch.equal(many.bank[:, :, -1:], alone.bank)
    assert torch.equal(many.similarity[:, -1:], alone.similarity) and alone.similarity.abs().min() > 0


@pytest.mark.parametrize("device", DEVICES)
def test_ragged_and_inactive_videos(device):
    state = new_state(3, 3, 2, 8, device=device, attached_widths=(5,))
    for s, who in enumerate(([1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0])):
        clips = clip_of(state, 1, seed=s)
        active = torch.tensor(who, dtype=torch.bool, device=device)
        memory_merge_(*state[:5], clips[0][:, 0], state.attached, [clips[1][:, 0]], active=active)
    assert state.length.tolist() == [4, 2, 0]
    plan = check_scan(clone(state), 6, active=torch.tensor([True, False, True], device=device))
    assert (plan.sources[1] == -1).all() and (plan.table[1, :, :, 2:] == -1).all()
    check_scan(state, 6)


@pytest.mark.parametrize("device", DEVICES)
def test_ties_zeros_and_nan(device):
    a, b, zero, nan = [1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [float("nan"), 0.0]
    for rows in ([a] * 7, [a, b, a, b, zero, zero, a], [a, nan, b, nan, a, a, b], [zero] * 5):
        clips = [torch.tensor(rows, device=device)[None, :, None]]
        check_scan(new_state(1, 2, 1, 2, device=device), len(rows), clips=clips)
    plan = check_scan(new_state(1, 3, 1, 2, device=device), 5, clips=[torch.tensor([[a]] * 5, device=device)[None]])
    assert plan.sources[0, 4, 0].tolist() == [4, 5], "the first of equal pairs: the frames of steps 0 and 1"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("split", [1, 4, 9])
def test_chunks_give_the_same(split, device):
    whole, parts = (started(1, 3, 2, 16, 2, device=device) for _ in range(2))
    clips = clip_of(whole, 10)
    memory_scan_(*whole[:5], clips[0])
    for chunk in clips[0].split(split, dim=1):
        memory_scan_(*parts[:5], chunk.contiguous())
    assert_same(parts, whole)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "average"])
def test_references(weighted, device):
    """The plain loops choose and merge alike where the pairs are far apart."""
    ours, theirs = (started(2, 3, 3, 24, 2, device=device) for _ in range(2))
    clip, keys = clip_of(ours, 9)[:2]
    plan = memory_scan_(*ours[:5], clip, weighted=weighted)
    expected = reference_scan(*theirs[:5], clip, weighted, None)
    for a, b in zip((*plan, *ours[1:3], ours.length), (*expected, *theirs[1:3], theirs.length)):
        assert torch.equal(a, b)
    torch.testing.assert_close((ours.bank, ours.similarity), (theirs.bank, theirs.similarity))
    rows = ours.attached[0]
    expected = reference_replay(rows, keys, *plan[1:], weighted)
    torch.testing.assert_close(memory_replay_(rows, keys, plan, ours.order, weighted=weighted), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_replay_into_out(device):
    state = started(2, 3, 2, 8, 4, device=device, widths=(33,))
    clips = clip_of(state, 6)
    plan = memory_scan_(*state[:5], clips[0])
    turned = clips[1].transpose(2, 3).contiguous().transpose(2, 3)  # the last stride is not 1
    for frames in (clips[1], turned):
        ours = randn(2, 4, 2, 33, device=device, seed=5)
        theirs, out = ours.contiguous(), poisoned((2, 4 + 12, 2, 33), ours)
        assert memory_replay_(ours, frames, plan, state.order, out=out) is out
        assert torch.equal(out, memory_replay_(theirs, frames.contiguous(), plan, state.order))
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(EMULATED, reason="about the CPU kernel's threads")
def test_threads_change_nothing():
    one, two = (started(1, 3, 60, 300, 2) for _ in range(2))
    clips = clip_of(one, 8)
    torch.set_num_threads(2)
    plan = memory_scan_(*two[:5], clips[0])
    extended = memory_replay_(two.attached[1], clips[2], plan, two.order)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(plan, memory_scan_(*one[:5], clips[0])))
    assert_same(two, one)
    assert torch.equal(extended, memory_replay_(one.attached[1], clips[2], plan, one.order))
    assert torch.equal(two.attached[1], one.attached[1])


def test_100000_frames():
    frames = 2_000 if EMULATED else 100_000
    state = new_state(1, 3, 2, 4)
    memory_scan_(*state[:5], randn(1, frames, 2, 4, sliced=False))
    assert (state.sizes.sum(2) == frames).all() and state.length.tolist() == [4]
    assert torch.equal(state.order.sort(2).values, torch.arange(4, dtype=torch.int32).expand(1, 2, 4))
    mean = (state.bank * state.sizes.transpose(1, 2)[..., None]).double().sum(1) / frames
    expected = randn(1, frames, 2, 4, sliced=False).double().mean(1)
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-4)
    assert (in_order(state)[1] > 0).all()


def test_registration():
    state = started(1, 2, 2, 4, 2)
    clips = clip_of(state, 3)
    torch.library.opcheck(op_scan.default, (*state[:5], clips[0], True, torch.ones(1, dtype=torch.int32)))
    plan = memory_scan_(*state[:5], clips[0])
    rows, out = state.attached[0], torch.empty(1, 3 + 6, 2, 5)
    torch.library.opcheck(op_replay.default, (rows, clips[1], *plan, state.order, True, out))


def test_compiled():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def scan(state, clips):
        plan = memory_scan_(*state[:5], clips[0])
        return *plan, memory_replay_(state.attached[0], clips[1], plan, state.order)

    ours, theirs = (started(1, 2, 2, 4, 2) for _ in range(2))
    clips = clip_of(ours, 4)
    plan = memory_scan_(*theirs[:5], clips[0])
    expected = *plan, memory_replay_(theirs.attached[0], clips[1], plan, theirs.order)
    assert all(torch.equal(a, b) for a, b in zip(scan(ours, clips), expected))
    assert_same(ours, theirs)
    assert torch.equal(ours.attached[0], theirs.attached[0])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: {"bank": s["bank"][:, :1]}, "memory_scan_: bank must be"),
        (lambda s: {"order": s["order"].long()}, "memory_scan_: order must be torch.int32"),
        (lambda s: {"frames": s["frames"][:, 0]}, r"frames must be \[B, t, N, C\]"),
        (lambda s: {"frames": s["frames"][:, :0]}, "t >= 1"),
        (lambda s: {"frames": s["frames"].half()}, "frames must have the dtype"),
        (lambda s: {"frames": s["frames"].clone().requires_grad_()}, "no gradient"),
        (lambda s: {"active": torch.ones(1)}, "active must be torch.bool"),
    ],
)
def test_scan_rejects(change, message):
    state = started(1, 2, 2, 4, 2)
    arguments = dict(zip(MemoryState._fields, state[:5])) | {"frames": clip_of(state, 3)[0]}
    with pytest.raises(ValueError, match=message):
        memory_scan_(**arguments | change(arguments))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r, f, p, o: (r[0], f, p, o), "must have 4 dimensions"),
        (lambda r, f, p, o: (r.int(), f, p, o), "rows must be float32"),
        (lambda r, f, p, o: (r, f[..., 1:], p, o), r"frames must be \[B, t, N, W\]"),
        (lambda r, f, p, o: (r.mT.contiguous().mT, f, p, o), "last stride of rows must be 1"),
        (lambda r, f, p, o: (r, f, p._replace(table=p.table[..., 1:]), o), "plan.table must be"),
        (lambda r, f, p, o: (r, f, p._replace(sources=p.sources[:, 1:]), o), "plan.sources must be"),
        (lambda r, f, p, o: (r, f, p._replace(counts=p.counts.long()), o), "plan.counts must be"),
        (lambda r, f, p, o: (r, f, p, o.long()), "order must be"),
        (lambda r, f, p, o: (r.clone().requires_grad_(), f, p, o), "no gradient"),
    ],
)
def test_replay_rejects(change, message):
    state = started(1, 2, 2, 4, 2)
    clips = clip_of(state, 3)
    plan = memory_scan_(*state[:5], clips[0])
    with pytest.raises(ValueError, match=message):
        memory_replay_(*change(state.attached[0], clips[1], plan, state.order))
    with pytest.raises(ValueError, match="out must be"):
        memory_replay_(state.attached[0], clips[1], plan, state.order, out=torch.empty(1, 8, 2, 5))


@pytest.mark.skipif(EMULATED, reason="a CUDA kernel stops where this raises")
@pytest.mark.parametrize("bad", [99, -2, 7])
def test_a_broken_plan_raises(bad):
    state = started(1, 2, 2, 4, 3)
    clips = clip_of(state, 3)
    plan = memory_scan_(*state[:5], clips[0])
    right = plan.sources[0, 0, 0, 1].item()
    plan.sources[0, 0, 0, 1] = bad  # 7: the row that step 1 merges
    with pytest.raises(IndexError, match="sources"):
        memory_replay_(state.attached[0], clips[1], plan, state.order)
    plan.sources[0, 0, 0, 1] = right
    for order in (state.order - 1, state.order + 1):
        with pytest.raises(IndexError, match="table and order"):
            memory_replay_(state.attached[0], clips[1], plan, order)
    plan.table[0, -1, 1, 0] = 9
    with pytest.raises(IndexError, match="table and order"):
        memory_replay_(state.attached[0], clips[1], plan, state.order)
    state.order.fill_(5)
    with pytest.raises(IndexError, match="order"):
        memory_scan_(*state[:5], clips[0])


@pytest.mark.skipif(EMULATED, reason="how the CPU kernel stores")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_replay_past_the_caches(dtype, shift):
    """Results of more than 4 MB, where rows are aligned and where they are not."""
    M, t, N, W = 3, 6, 120 * 4 // dtype.itemsize, 1064
    bank = randn(1, M + 1, N, 2, sliced=False)
    state = new_state(1, M, N, 2, torch.float32, "cpu", ())
    plan = memory_scan_(*state[:5], torch.cat([bank, bank], 1)[:, :t])
    rows, frames = randn(1, M + 1, N, W, dtype=dtype, sliced=False), randn(1, t, N, W, dtype=dtype, seed=1)
    out = torch.empty(1, M + 1 + 2 * t, N, W + 64, dtype=dtype)[..., shift : shift + W]
    assert out.numel() * dtype.itemsize > 4 << 20 and (plan.sources >= 0).any()
    expected = reference_replay(rows.double(), frames.double(), *plan[1:], True)
    memory_replay_(rows, frames, plan, state.order, out=out)
    copied, off = M + 1 + t, 1e-6 if dtype.itemsize == 4 else 0.05
    at = plan.table[:, -1].long().transpose(1, 2)[..., None].expand(-1, -1, -1, W)
    assert torch.equal(rows_in_order(rows, state.order, M + 1), out.gather(1, at))
    assert torch.equal(out[:, :copied].double(), expected[:, :copied])
    torch.testing.assert_close(out[:, copied:].double(), expected[:, copied:], rtol=0, atol=off)
