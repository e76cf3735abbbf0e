import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvidx.ops.memory_merge import (
    MemoryState,
    cosine,
    in_order,
    memory_merge,
    memory_merge_,
    merge_at,
    new_state,
    reference,
    reference_step,
    rows_in_order,
)
from tests.harness import (
    DEVICES,
    DTYPES,
    FLOOR,
    assert_close_to_reference,
    assert_gradients_close,
    randn,
)

# B, M, N, C: one of everything, odd, prime, past a vector, the longest rows in the bank's 1 KB blocks
CASES = [(1, 1, 1, 1), (2, 3, 3, 17), (1, 4, 5, 64), (1, 2, 2, 531)]
WIDTHS = (7, 32)  # of the attached tensors
LOW = [torch.float16, torch.bfloat16]
EMULATED = "PYVIDX_OPS_LIBRARY" in os.environ  # CUDA kernels on the CPU: slow, and not the CPU kernels
op, op_step = torch.ops.pyvidx.memory_merge, torch.ops.pyvidx.memory_merge_


def run_reference(bank, sizes, order, similarity, length, frame=None, attached=(), attached_frame=(), **options):
    options = {"weighted": True, "active": None} | options
    return reference_step(bank, sizes, order, similarity, length, frame, attached, attached_frame, **options)


def strided_state(B, M, N, C, dtype, device, attached_dtype=None):
    """A new state whose tensors are windows of larger ones."""
    state = new_state(B, M, N, C, dtype, device, WIDTHS, attached_dtype)

    def window(x):
        big = torch.full([n + 1 for n in x.shape[:-1]] + [x.shape[-1] + 3], 77, dtype=x.dtype, device=device)
        view = big[tuple(slice(n) for n in x.shape)]
        return view.copy_(x)

    return MemoryState(*map(window, state[:5]), tuple(map(window, state.attached)))


def frames_of(state, seed, like=None):
    """A frame for the bank and for every attached tensor; `like` makes it resemble an earlier one."""
    frames = []
    for i, rows in enumerate((state.bank, *state.attached)):
        B, _, N, C = rows.shape
        frames.append(randn(B, N, C, dtype=rows.dtype, device=rows.device, seed=1000 * i + seed))
        if like is not None:
            frames[i] = (0.6 * frames[i] + like[i]).to(rows.dtype)
    return frames


def clone(state):
    return MemoryState(*(t.clone() for t in state[:5]), tuple(t.clone() for t in state.attached))


def check_invariants(state, seen):
    """Order is a permutation, sizes count the frames seen, similarities are those of the rows as they are stored."""
    M = state.similarity.shape[2]
    slots = torch.arange(M + 1, device=state.order.device)
    assert torch.equal(state.order.sort(2).values.long(), slots.expand_as(state.order)), "order is no permutation"
    stored = slots < state.length[:, None, None]
    assert torch.equal(state.sizes.gather(2, state.order.long()) > 0, stored.expand_as(state.order)), "free slots"
    assert torch.equal(state.sizes.sum(2), seen[:, None].expand(-1, state.sizes.shape[1])), "frames lost or invented"
    rows = rows_in_order(state.bank, state.order, M + 1).double()
    expected = cosine(rows[:, :-1], rows[:, 1:]).transpose(1, 2).where(stored[..., 1:], 0)
    torch.testing.assert_close(state.similarity.double(), expected, rtol=0, atol=1e-6)


def check_step(run, state, frames, weighted=True, active=None):
    """One step against the published algorithm on rows in time order, in float64, at the choice that was made."""
    before = clone(state)
    frame = (frames[0], list(state.attached), frames[1:]) if frames else (None, list(state.attached), [])
    index = run(*state[:5], *frame, weighted=weighted, active=active)
    B, slots, N, _ = state.bank.shape
    for b in range(B):
        length = int(before.length[b])
        on = active is None or bool(active[b])
        merges, appends = on and length == slots, on and bool(frames)
        assert int(state.length[b]) == length - merges + appends
        if not merges:
            assert (index[b] == -1).all()
        for i, (was, now) in enumerate(zip((before.bank, *before.attached), (state.bank, *state.attached))):
            rows = rows_in_order(was[b : b + 1], before.order[b : b + 1], length)
            sizes = before.sizes[b : b + 1].gather(2, before.order[b : b + 1, :, :length].long()).transpose(1, 2)
            exact, plain = rows.double(), rows
            if merges:
                if i == 0:
                    similarity = cosine(exact[:, :-1], exact[:, 1:])
                    chosen = similarity.gather(1, index[b : b + 1, None].long())
                    torch.testing.assert_close(chosen[:, 0], similarity.amax(1), rtol=0, atol=2e-6)
                exact, new_sizes = merge_at(exact, sizes, index[b : b + 1], weighted)
                plain, sizes = merge_at(rows, sizes, index[b : b + 1], weighted)[0], new_sizes
            if appends:
                exact = torch.cat([exact, frames[i][b : b + 1, None].double()], 1)
                plain = torch.cat([plain, frames[i][b : b + 1, None]], 1)
                sizes = torch.cat([sizes, sizes.new_ones(1, 1, N)], 1)
            length_now = int(state.length[b])
            ours = rows_in_order(now[b : b + 1], state.order[b : b + 1], length_now)
            allowed = 2 * (plain.double() - exact).abs().max() + FLOOR[ours.dtype] * exact.abs().max().clamp_min(1)
            assert (ours.double() - exact).abs().max() <= allowed, f"tensor {i} of video {b}"
            stored = state.order[b : b + 1, :, :length_now].long()
            assert torch.equal(state.sizes[b : b + 1].gather(2, stored).transpose(1, 2), sizes.to(torch.int32))
    return index


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "average"])
@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("run", [memory_merge_, run_reference], ids=["op", "reference"])
def test_stream(run, shape, weighted, dtype, device):
    state = strided_state(*shape, dtype, device, torch.float16 if dtype == torch.float32 else torch.float32)
    seen, frames = torch.zeros_like(state.length), None
    for t in range(2 * shape[1] + 3):
        frames = frames_of(state, t, like=frames if t % 3 else None)
        if t % 4 == 3:  # bring a merge forward, and where there is none do nothing
            check_step(run, state, None, weighted)
        check_step(run, state, frames, weighted)
        seen += 1
        check_invariants(state, seen)


@pytest.mark.parametrize("device", DEVICES)
def test_float64(device):
    state = strided_state(2, 3, 3, 17, torch.float64, device)
    for t in range(8):
        check_step(memory_merge_, state, frames_of(state, t))
    check_invariants(state, torch.full_like(state.length, 8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("run", [memory_merge_, run_reference], ids=["op", "reference"])
def test_ragged_videos_are_independent(run, device):
    """Videos that join and pause at any time hold what they would hold alone, bit for bit; so do single positions."""
    together = new_state(3, 2, 3, 9, device=device, attached_widths=WIDTHS)
    alone = [new_state(1, 2, 3, 9, device=device, attached_widths=WIDTHS) for _ in range(3)]
    column = new_state(1, 2, 1, 9, device=device, attached_widths=WIDTHS)
    g = torch.Generator().manual_seed(3)
    for t in range(14):
        active = torch.rand(3, generator=g) < 0.7
        frames = frames_of(together, t)
        index = check_step(run, together, frames, active=active.to(device))
        for b in active.nonzero().flatten().tolist():
            own = [f[b : b + 1] for f in frames]
            one = run(*alone[b][:5], own[0], list(alone[b].attached), own[1:])
            assert torch.equal(index[b : b + 1], one)
            if b == 0:
                own = [f[:, 1:2] for f in own]
                run(*column[:5], own[0], list(column.attached), own[1:])
    for b in range(3):
        for a, c in zip((*together[:5], *together.attached), (*alone[b][:5], *alone[b].attached)):
            assert torch.equal(a[b : b + 1], c)
    assert torch.equal(in_order(column)[0], in_order(alone[0])[0][:, :, 1:2])


@pytest.mark.parametrize("device", DEVICES)
def test_merging_early_or_late_is_the_same(device):
    """Append, then merge what is too long (MA-LMM's order) = merge where full, then append."""
    late, early = (new_state(2, 3, 2, 8, device=device, attached_widths=WIDTHS) for _ in range(2))
    for t in range(9):
        frames = [f.contiguous() for f in frames_of(late, t)]  # as the bank: other alignments sum in another order
        memory_merge_(*late[:5], frames[0], late.attached, frames[1:])
        memory_merge_(*early[:5], frames[0], early.attached, frames[1:])
        merged = memory_merge_(*early[:5], None, early.attached)
        assert ((merged >= 0) == (t >= 3)).all() and int(early.length[0]) == min(t + 1, 3)
    memory_merge_(*late[:5], None, late.attached)
    for a, b in zip((*late[:5], *late.attached), (*early[:5], *early.attached)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("run", [memory_merge_, run_reference], ids=["op", "reference"])
def test_ties_zeros_and_nan(run, device):
    def after(*rows):
        rows = torch.tensor(rows, device=device)
        state = new_state(1, len(rows) - 1, 1, rows.shape[1], device=device)
        for row in rows:
            run(*state[:5], row[None, None])
        return int(run(*state[:5])), in_order(state)[0][0, :, 0]

    a, b, zero, nan = [1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [float("nan"), 0.0]
    assert after(b, a, a, a, a)[0] == 1, "the first of equal pairs"
    assert after(a, b, a, b, zero)[0] == 0, "all similarities are 0, a zero row's too"
    index, rows = after(a, [-1.0, 0.0], zero, b)
    assert index == 1 and torch.equal(rows, torch.tensor([a, [-0.5, 0.0], b], device=device))
    assert after(a, a, b, nan)[0] == 2, "NaN wins, as in torch.argmax"
    assert after(a, nan, b, nan)[0] == 0, "the first NaN"
    assert torch.equal(after(*[[0.1, 0.7]] * 4)[1], torch.tensor([[0.1, 0.7]] * 3, device=device)), "repeated frames"


@pytest.mark.parametrize("device", DEVICES)
def test_many_attached_of_mixed_dtypes(device):
    state = new_state(1, 2, 2, 8, device=device, attached_widths=[1 + i % 9 for i in range(37)])
    dtypes = [torch.float32] * 20 + [torch.float16, torch.bfloat16] * 8 + [torch.float64]
    state = state._replace(attached=tuple(a.to(d) for a, d in zip(state.attached, dtypes)))
    for t in range(5):
        check_step(memory_merge_, state, frames_of(state, t))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("attached_dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("C", [5, 12, 531])  # rows of 16 bits at any place, at multiples of 8 bytes alone, long ones
@pytest.mark.parametrize("run", [memory_merge_, run_reference], ids=["op", "reference"])
def test_16_bit_frames_are_as_if_cast(run, C, attached_dtype, dtype, device):
    as_is, cast = (new_state(2, 2, 3, C, torch.float32, device, WIDTHS, attached_dtype) for _ in range(2))
    for t in range(5):
        frame, *rows = frames_of(as_is, t)
        frame, rows = frame.contiguous().to(dtype), [x.contiguous() for x in rows]
        index = run(*as_is[:5], frame, as_is.attached, rows)
        assert torch.equal(index, run(*cast[:5], frame.float(), cast.attached, rows))
        for a, b in zip((*as_is[:5], *as_is.attached), (*cast[:5], *cast.attached)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_16_bit_frames_without_attached(device):
    """Strided ones, too."""
    state = new_state(2, 3, 3, 64, device=device)
    for t in range(6):
        frame = randn(2, 3, 64, dtype=LOW[t % 2], device=device, seed=t)
        check_step(memory_merge_, state, [frame])
    check_invariants(state, torch.full_like(state.length, 6))


@pytest.mark.parametrize("device", DEVICES)
def test_follows_float64(device):
    """300 steps of a slow stream in float32 stay beside the same choices in float64."""
    state = new_state(1, 4, 2, 24, device=device)
    rows, sizes, frame = None, None, torch.zeros(1, 2, 24, device=device)
    for t in range(300):
        frame = 0.9 * frame + randn(1, 2, 24, device=device, seed=t)
        index = memory_merge_(*state[:5], frame)
        if t >= 5:
            rows, sizes = merge_at(rows, sizes, index, True)
        new = frame[:, None].double()
        rows = new if rows is None else torch.cat([rows, new], 1)
        sizes = torch.ones_like(rows[..., 0]) if sizes is None else torch.cat([sizes, torch.ones_like(sizes[:, :1])], 1)
        if t % 50 == 49:
            ours, our_sizes = in_order(state)
            torch.testing.assert_close(ours.double(), rows, rtol=0, atol=1e-5)
            assert torch.equal(our_sizes.double(), sizes)


@pytest.mark.skipif(EMULATED, reason="about the CPU kernel's threads")
def test_threads_change_nothing():
    many, one = (new_state(2, 2, 40, 600, attached_widths=WIDTHS) for _ in range(2))
    for t in range(5):
        frames = frames_of(many, t)
        torch.set_num_threads(2)
        index = memory_merge_(*many[:5], frames[0], many.attached, frames[1:])
        torch.set_num_threads(1)
        assert torch.equal(index, memory_merge_(*one[:5], frames[0], one.attached, frames[1:]))
    for a, b in zip((*many[:5], *many.attached), (*one[:5], *one.attached)):
        assert torch.equal(a, b)


def long_stream(steps):
    state = new_state(1, 5, 2, 4, attached_widths=[3])
    frames, keys = randn(64, 1, 2, 4, sliced=False), randn(64, 1, 2, 3, seed=1, sliced=False)
    for t in range(steps):
        memory_merge_(*state[:5], frames[t % 64], state.attached, [keys[t % 64]])
    check_invariants(state, torch.full_like(state.length, steps))
    mean = (state.bank * state.sizes.transpose(1, 2)[..., None]).double().sum(1) / steps
    torch.testing.assert_close(mean, frames[torch.arange(steps) % 64].double().mean(0), rtol=0, atol=1e-4)


def test_many_steps():
    long_stream(200 if EMULATED else 2000)


@pytest.mark.slow
def test_100000_steps():
    long_stream(100_000)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_properties(data):
    """Any interleaving of steps and early merges: the invariants hold, and memory_merge makes the same merges."""
    B, M, N, C = (data.draw(st.integers(1, n), label) for n, label in ((2, "B"), (4, "M"), (3, "N"), (9, "C")))
    state, seen = new_state(B, M, N, C), torch.zeros(B, dtype=torch.int32)
    level = st.sampled_from([0.0, 1.0, -2.0])  # many ties, zero rows, opposite rows
    for t in range(data.draw(st.integers(0, 3 * M + 2), "steps")):
        rows, sizes = in_order(state)
        frame = randn(B, N, C, seed=t) if data.draw(st.booleans()) else torch.full((B, N, C), data.draw(level))
        frame = None if data.draw(st.integers(0, 3)) == 0 else frame
        full = rows.shape[1] == M + 1
        index = memory_merge_(*state[:5], frame)
        seen += frame is not None
        check_invariants(state, seen)
        if full:
            expected = merge_at(rows, sizes, index, True)
            torch.testing.assert_close(in_order(state, M), expected)


def test_in_order_of_ragged_videos():
    state = new_state(2, 3, 1, 4)
    frame = torch.ones(2, 1, 4)
    memory_merge_(*state[:5], frame)
    memory_merge_(*state[:5], 2 * frame, active=torch.tensor([True, False]))
    rows, sizes = in_order(state)
    assert rows[..., 0, 0].tolist() == [[1, 2], [1, 0]] and sizes[..., 0].tolist() == [[1, 1], [1, 0]]
    assert in_order(state, 1)[0].shape == (2, 1, 1, 4)


# --- one merge as a function ------------------------------------------------------------------------------------------


def bank_and_sizes(shape, dtype=torch.float32, device="cpu", sizes_dtype=torch.float32):
    B, T, N, C = shape
    sizes = torch.randint(1, 9, (B, T, N), generator=torch.Generator().manual_seed(0))
    return randn(B, T, N, C, dtype=dtype, device=device), sizes.to(device, sizes_dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "average"])
@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 5, 3, 17), (1, 9, 4, 64), (1, 3, 2, 131)], ids=str)
def test_forward(shape, weighted, dtype, device):
    bank, sizes = bank_and_sizes(shape, dtype, device, torch.int32 if weighted else torch.float32)
    out, out_sizes, index = memory_merge(bank, sizes, weighted=weighted)
    similarity = cosine(bank[:, :-1].double(), bank[:, 1:].double())
    chosen = similarity.gather(1, index[:, None].long()).squeeze(1)
    torch.testing.assert_close(chosen, similarity.amax(1), rtol=0, atol=2e-6)
    assert_close_to_reference(lambda *_: (out, out_sizes), lambda x: merge_at(x, sizes, index, weighted), (bank,))
    assert out_sizes.dtype == sizes.dtype and torch.equal(out_sizes.sum(1), sizes.sum(1))
    assert torch.equal(reference(bank, sizes, weighted)[2], index), "these pairs are far apart"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "average"])
def test_backward(weighted, dtype, device):
    bank, sizes = bank_and_sizes((2, 5, 3, 17), dtype, device, torch.int32)
    index = memory_merge(bank, sizes)[2]
    args = (bank.requires_grad_(), sizes)
    assert_gradients_close(
        lambda x, s: memory_merge(x, s, weighted=weighted)[0],
        lambda x, s: merge_at(x, s, index, weighted)[0],
        args,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_transposed_input_and_many_bytes(device):
    bank, sizes = bank_and_sizes((1, 3, 8, 16), device=device)
    turned = bank.transpose(-1, -2).contiguous().transpose(-1, -2)  # the last stride is not 1
    assert torch.equal(memory_merge(turned, sizes)[0], memory_merge(bank, sizes)[0])
    bank, sizes = bank_and_sizes((1, 3, 4, 96 * 1024), device=device)  # written past the caches
    out, _, index = memory_merge(bank.contiguous(), sizes)
    torch.testing.assert_close(out, merge_at(bank, sizes, index, True)[0])


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "average"])
def test_gradcheck(weighted):
    bank, sizes = bank_and_sizes((2, 4, 2, 3), torch.float64)
    bank = bank.contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: memory_merge(x, sizes, weighted=weighted)[0], bank)


# --- registration -----------------------------------------------------------------------------------------------------


def step_arguments(steps=4):
    state = new_state(2, 2, 3, 4, attached_widths=WIDTHS)
    for t in range(steps):
        frames = frames_of(state, t)
        memory_merge_(*state[:5], frames[0], state.attached, frames[1:])
    return state, frames_of(state, steps)


def test_registration():
    bank, sizes = bank_and_sizes((2, 4, 3, 5))
    torch.library.opcheck(op.default, (bank.detach().requires_grad_(), sizes, True))
    state, frames = step_arguments()
    torch.library.opcheck(op_step.default, (*state[:5], frames[0], list(state.attached), frames[1:], True, None))
    torch.library.opcheck(op_step.default, (*state[:5], None, [], [], False, torch.ones(2, dtype=torch.int32)))
    torch.library.opcheck(op_step.default, (*state[:5], frames[0].bfloat16(), [], [], True, None))


def test_compiled():
    bank, sizes = bank_and_sizes((2, 4, 3, 5))
    f = torch.compile(lambda *a: memory_merge(*a)[0] * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(f(bank, sizes), memory_merge(bank, sizes)[0] * 2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(state, frames):
        return memory_merge_(*state[:5], frames[0], state.attached, frames[1:]), state.bank.sum()

    state, frames = step_arguments()
    other = clone(state)
    index, total = step(state, frames)
    assert torch.equal(index, memory_merge_(*other[:5], frames[0], other.attached, frames[1:]))
    torch.testing.assert_close(total, other.bank.sum())
    for a, b in zip((*state[:5], *state.attached), (*other[:5], *other.attached)):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: {"bank": s["bank"][0]}, r"bank must be \[B, M\+1, N, C\]"),
        (lambda s: {"bank": s["bank"][:, :1]}, "M >= 1"),
        (lambda s: {"bank": s["bank"].int()}, "bank must be float32"),
        (lambda s: {"bank": s["bank"].transpose(2, 3).contiguous().transpose(2, 3)}, "stride must be 1"),
        (lambda s: {"sizes": s["sizes"].long()}, "sizes must be torch.int32"),
        (lambda s: {"order": s["order"][..., 1:]}, "order must be torch.int32"),
        (lambda s: {"similarity": s["similarity"].double()}, "similarity must be torch.float32"),
        (lambda s: {"length": s["length"][:1]}, "length must be torch.int32"),
        (lambda s: {"active": torch.ones(2)}, "active must be torch.bool"),
        (lambda s: {"frame": s["frame"][:, 1:]}, r"frame must be \[B, N, C\]"),
        (lambda s: {"frame": s["frame"].double()}, "frame must have the dtype of bank, or 16 bits"),
        (lambda s: {"bank": s["bank"].half()}, "frame must have the dtype of bank, or 16 bits"),
        (lambda s: {"bank": s["bank"].double(), "frame": s["frame"].half()}, "frame must have the dtype of bank"),
        (lambda s: {"bank": s["bank"].half(), "frame": s["frame"].bfloat16()}, "frame must have the dtype of bank"),
        (lambda s: {"attached_frame": [x.half() for x in s["attached_frame"]]}, r"attached_frame\[0\] must be"),
        (lambda s: {"frame": None}, "without one none"),
        (lambda s: {"attached_frame": []}, "one frame per attached tensor"),
        (lambda s: {"attached": [s["attached"][0][:, 1:], s["attached"][1]]}, r"attached\[0\] must be"),
        (lambda s: {"attached_frame": s["attached_frame"][::-1]}, r"attached_frame\[0\] must be"),
        (lambda s: {"frame": s["frame"].clone().requires_grad_()}, "no gradient"),
    ],
)
def test_step_rejects(change, message):
    state, frames = step_arguments(1)
    arguments = state._asdict() | {"frame": frames[0], "attached_frame": frames[1:]}
    with pytest.raises(ValueError, match=message):
        memory_merge_(**arguments | change(arguments))


def test_no_gradient_asked_for_under_no_grad():
    state, frames = step_arguments(1)
    with torch.no_grad():
        memory_merge_(*state[:5], frames[0].requires_grad_(), state.attached, frames[1:])
    assert int(state.length[0]) == 2


@pytest.mark.skipif(EMULATED, reason="a CUDA kernel stops where this raises")
@pytest.mark.parametrize("what, value", [("length", 4), ("length", -1), ("order", 3), ("order", -1)])
def test_state_out_of_range(what, value):
    state, frames = step_arguments()
    getattr(state, what).fill_(value)
    with pytest.raises(IndexError, match=what):
        memory_merge_(*state[:5], frames[0], state.attached, frames[1:])


@pytest.mark.parametrize(
    "bank, sizes, message",
    [
        (torch.zeros(2, 3, 4), torch.ones(2, 3, 4), "bank must be"),
        (torch.zeros(1, 1, 2, 3), torch.ones(1, 1, 2), "T >= 2"),
        (torch.zeros(1, 3, 2, 3).int(), torch.ones(1, 3, 2), "bank must be float32"),
        (torch.zeros(1, 3, 2, 3), torch.ones(1, 3, 1), "sizes must be"),
        (torch.zeros(1, 3, 2, 3), torch.ones(1, 3, 2).double(), "float32 or int32"),
        (torch.zeros(1, 3, 2, 3), torch.ones(1, 3, 2).requires_grad_(), "sizes are counts"),
    ],
)
def test_rejects(bank, sizes, message):
    with pytest.raises(ValueError, match=message):
        memory_merge(bank, sizes)
    with pytest.raises(ValueError, match="at least 1"):
        new_state(1, 0, 2, 3)
