"""Memory banks: every policy against lists and loops, and the properties that all of them share."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvidx import memory
from pyvidx.memory import Bank, create, log_size_bias
from pyvidx.ops import memory_merge_
from pyvidx.ops.memory_merge import new_state
from tests import memory_reference as plain
from tests.harness import DEVICES, randn

N, C = 3, 5
POLICIES = {  # name: options with a capacity M, and the plain step
    "merge": (lambda M: dict(name="merge", capacity=M), plain.merge),
    "merge_average": (lambda M: dict(name="merge", capacity=M, weighted=False), partial(plain.merge, weighted=False)),
    "merge_frame": (lambda M: dict(name="merge", capacity=M, unit="frame"), plain.merge),
    "merge_hard": (lambda M: dict(name="merge", capacity=M, hard=True), partial(plain.merge, hard=True)),
    "merge_synchronized": (
        lambda M: dict(name="merge", capacity=M, unit="synchronized"),
        partial(plain.merge, alike=partial(plain.mean_of_cosines, N=N)),
    ),
    "average": (lambda M: dict(name="average"), plain.merge),
    "fifo": (lambda M: dict(name="fifo", capacity=M), plain.fifo),
    "uniform": (lambda M: dict(name="uniform", capacity=M), plain.uniform),
    "concat": (lambda M: dict(name="concat"), None),
    "tome": (lambda M: dict(name="tome", capacity=M), plain.tome_time),
}
SPACE = {
    "tome_space": lambda M: dict(name="tome", axis="space", tokens=2),
    "tome_space_fifo": lambda M: dict(name="tome", axis="space", tokens=2, capacity=M),
}
MOVIECHAT = {
    "moviechat": lambda M: dict(name="moviechat", fragment=M + 1, merged=max(1, M // 2)),
    "moviechat_onevision": lambda M: dict(name="moviechat", form="onevision", short=2 * M + 1, merged=M),
}
RAGGED = {
    "dtd": lambda M: dict(name="dtd", threshold=0.2),
    "dtd_ratio": lambda M: dict(name="dtd", threshold=None, ratio=0.5),
    "fluxmem": lambda M: dict(name="fluxmem", short=M, medium=2, grid=(1, N)),
}
CLUSTERS = {
    "flash_vstream": lambda M: dict(name="flash_vstream", capacity=M, clusters=max(1, M // 2)),
    "flash_vstream_official": lambda M: dict(
        name="flash_vstream", capacity=M, clusters=max(1, M // 2), compat="official"
    ),
}
FOREST = dict(name="streamforest", now=3, short=2, tokens=1, split=2, heads=1)
TOKENS = {  # their entries are tokens, and they keep no anchors
    "streamforest": lambda M: FOREST | dict(window=M, quota=M + 1),
    "streamforest_official": lambda M: FOREST | dict(window=M, quota=M + 1, compat="official"),
}
ALL = {name: options for name, (options, _) in POLICIES.items()}
ALL |= SPACE | MOVIECHAT | RAGGED | CLUSTERS | TOKENS
DROPS = {"fifo", "tome_space_fifo"}
ENDLESS = {"concat", "tome_space", *MOVIECHAT, *RAGGED}
REPEATS = {"moviechat_onevision"}  # its entries hold some frames more than once

every_policy = pytest.mark.parametrize("name", ALL)
small = settings(deadline=None, max_examples=15, derandomize=True)
lengths, capacities, anchor_counts = st.integers(1, 25), st.integers(1, 5), st.integers(0, 2)


def policy_of(name, M=4, anchors=0):
    return create(anchors=0 if name in TOKENS else anchors, **ALL[name](M + anchors))


def frames_of(B, T, seed=0, device="cpu"):
    return randn(B, T, N, C, seed=seed, device=device), torch.arange(T, device=device).double().expand(B, T) / 25


def same(a: Bank, b: Bank) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def equal(x, y) -> bool:
    """The same bits; NaN is NaN."""
    return torch.equal(x.nan_to_num(-1), y.nan_to_num(-1)) and torch.equal(x.isnan(), y.isnan())


def streamed(policy, frames, seconds=None, active=None):
    return policy.extend(policy.new(len(frames), *frames.shape[2:], device=frames.device), frames, seconds, active)


def test_every_policy_is_tested():
    assert {ALL[name](4)["name"] for name in ALL} == set(memory.names())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", POLICIES)
@given(T=lengths, M=capacities, anchors=anchor_counts, seed=st.integers(0, 99))
@small
def test_against_lists(name, device, T, M, anchors, seed):
    policy = policy_of(name, M, anchors)
    frames, seconds = frames_of(2, T, seed, device)
    entries = streamed(policy, frames, seconds).entries()
    for b in range(2):
        want = plain.run(POLICIES[name][1], frames[b].cpu(), policy.capacity, anchors, policy.whole_frame)
        for g, stored in enumerate(want):
            rows = entries.rows[b].flatten(1) if policy.whole_frame else entries.rows[b, :, g]
            torch.testing.assert_close(rows.cpu().double(), torch.stack([e.row for e in stored]), rtol=1e-5, atol=1e-5)
            assert entries.sizes[b, :, g].tolist() == [e.size for e in stored]
            assert (entries.first[b, :, g] * 25).round().tolist() == [e.frames[0] for e in stored]
            assert (entries.last[b, :, g] * 25).round().tolist() == [e.frames[-1] for e in stored]
    assert entries.mask.all() and not entries.ragged


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 11, 12])
def test_tokens_of_a_frame_against_lists(tokens, device):
    frames = randn(2, 11, C, device=device)
    rows, sizes, holder = memory.reduce_tokens(frames, tokens)
    for b in range(2):
        want = plain.tome_space(frames[b].cpu(), tokens)
        torch.testing.assert_close(rows[b].cpu().double(), torch.stack([e.row for e in want]), rtol=1e-5, atol=1e-5)
        assert sizes[b].tolist() == [e.size for e in want]
        for i, entry in enumerate(want):
            assert (holder[b] == i).nonzero().flatten().tolist() == entry.frames


@every_policy
@given(T=lengths, M=capacities, anchors=anchor_counts, seed=st.integers(0, 99))
@small
def test_frames_are_conserved_within_capacity_and_in_order(name, T, M, anchors, seed):
    policy = policy_of(name, M, anchors)
    bank = policy.new(2, N, C)
    frames, _ = frames_of(2, T, seed)
    for t in range(T):
        bank = policy.append(bank, frames[:, t])
        assert policy.capacity is None or bank.entries().rows.shape[1] <= policy.capacity + 1, "what attention sees"
        last = bank.entries().last[:, -1]
        assert ((last == t) | (last.isnan() & (name in RAGGED))).all()
        bank = policy.compress(bank)
        entries = bank.entries()
        assert policy.capacity is None or entries.rows.shape[1] <= policy.capacity
        assert bank.frames.tolist() == [t + 1, t + 1]
        held = min(t + 1, policy.capacity) if name in DROPS else t + 1
        if name in RAGGED:  # what is left is where it was
            assert entries.rows.shape[1] == t + 1 and entries.ragged
            assert ((entries.first == torch.arange(t + 1)[:, None]) == entries.mask).all()
            assert ((entries.sizes > 0) == entries.mask).all() and (entries.sizes.sum(2) <= N).all()
        elif name in TOKENS:
            assert (entries.first[:, 1:] < entries.first[:, :-1]).sum() == 0 and (entries.mask[:, -3:]).all()
            assert name == "streamforest_official" or (entries.sizes.sum((1, 2)) == held * N).all()
        elif name not in REPEATS:
            all_of = entries.sizes.sum((1, 2)) if name in SPACE else entries.sizes.sum(1)
            assert (all_of == (held * N if name in SPACE else held)).all()
            assert name in CLUSTERS or (entries.first[:, 1:] > entries.first[:, :-1]).all()
            assert name in ("tome", *CLUSTERS) or (entries.first[:, 1:] > entries.last[:, :-1]).all()
        assert (entries.last[entries.mask] <= t).all() and (entries.first[entries.mask] >= 0).all()


@every_policy
@given(data=st.data(), T=lengths, M=capacities, anchors=anchor_counts)
@small
def test_any_chunking_gives_the_same_state(name, data, T, M, anchors):
    policy = policy_of(name, M, anchors)
    frames, seconds = frames_of(2, T)
    at_once = streamed(policy, frames, seconds)
    bank, t = policy.new(2, N, C), 0
    while t < T:
        step = data.draw(st.integers(1, T - t))
        if data.draw(st.booleans()):
            bank = policy.extend(bank, frames[:, t : t + step], seconds[:, t : t + step])
        else:  # compress left to the next append
            for i in range(t, t + step):
                bank = policy.append(bank, frames[:, i], seconds[:, i])
        t += step
    assert same(policy.compress(bank), at_once)


@pytest.mark.parametrize("anchors", [0, 1])
@pytest.mark.parametrize("attached", [False, True])
def test_scans_of_a_clip_are_as_one_frame_after_the_other(attached, anchors, monkeypatch):
    """More frames than one scan takes, and a last scan that is shorter."""
    monkeypatch.setattr("pyvidx.memory.merge.CHUNK", 2)
    policy, (frames, seconds) = policy_of("merge", 3, anchors), frames_of(2, 19)
    rows, widths = ([frames[..., :2]], [2]) if attached else ([], [])
    banks = [policy.new(2, N, C, attached=widths) for _ in range(2)]
    at_once = policy.extend(banks[0], frames, seconds, attached=rows)
    for t in range(19):
        banks[1] = policy.push(banks[1], frames[:, t], seconds[:, t], attached=[x[:, t] for x in rows])
    assert same(at_once, banks[1])


@every_policy
@given(data=st.data(), T=lengths, M=capacities, anchors=anchor_counts)
@small
def test_videos_of_a_batch_are_independent(name, data, T, M, anchors):
    """Ragged: each video of a batch is what it is alone, and one without a frame keeps every bit."""
    policy = policy_of(name, M, anchors)
    frames, seconds = frames_of(3, T)
    active = torch.tensor([[data.draw(st.booleans()) for _ in range(T)] for _ in range(3)])
    bank = policy.new(3, N, C)
    for t in range(T):
        before = bank.fork()
        bank = policy.push(bank, frames[:, t], seconds[:, t], active[:, t])
        idle = (~active[:, t]).nonzero().flatten()
        for was, now in ((before, bank), (before.head, bank.head)):
            for key, x in (was.tensors() if was is not None else {}).items():
                y = now.tensors()[key]
                assert torch.equal(x[idle], y[idle]) or (name in ENDLESS and y.shape != x.shape), key
    entries = bank.entries()
    for b in range(3):
        chosen = active[b].nonzero().flatten()
        alone = streamed(policy, frames[b : b + 1, chosen], seconds[b : b + 1, chosen]).entries()
        L = alone.rows.shape[1]
        assert (entries.mask[b, :L].all() or name in (*RAGGED, *TOKENS)) and not entries.mask[b, L:].any()
        for mine, want in zip(entries[:5], alone[:5]):
            assert equal(mine[b, :L], want[0])
        assert (entries.rows[b, L:] == 0).all() and (entries.sizes[b, L:] == 0).all()


@pytest.mark.parametrize("name", POLICIES)
@given(data=st.data(), M=capacities, anchors=anchor_counts)
@small
def test_equal_to_concat_while_nothing_was_dropped(name, data, M, anchors):
    policy, concat = policy_of(name, M, anchors), create("concat")
    T = data.draw(st.integers(1, policy.capacity or 20))
    frames, seconds = frames_of(2, T + 1)
    mine, all_ = (streamed(p, frames[:, :T], seconds[:, :T]) for p in (policy, concat))
    for step in (None, T):  # and what attention sees with one frame more
        if step is not None:
            mine, all_ = (p.append(b, frames[:, T], seconds[:, T]) for p, b in ((policy, mine), (concat, all_)))
        for a, b in zip(mine.entries()[:5], all_.entries()[:5]):
            assert torch.equal(a, b)


@pytest.mark.parametrize("unit", ["token", "frame"])
def test_one_entry_is_the_running_mean(unit):
    frames, _ = frames_of(2, 50)
    for policy in (create("merge", capacity=1, unit=unit), create("average")):
        entries = streamed(policy, frames).entries()
        torch.testing.assert_close(entries.rows[:, 0], frames.mean(1))
        assert (entries.sizes == 50).all() and (entries.first == 0).all() and (entries.last == 49).all()


@given(T=st.integers(1, 200), M=st.integers(1, 9))
@small
def test_uniform_is_even(T, M):
    sizes = streamed(create("uniform", capacity=M), torch.zeros(1, T, 1, 1)).entries().sizes
    assert sizes.sum() == T and sizes.max() <= max(1, 2 * T / M)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [True, False])
def test_official_order_on_the_op(weighted, device):
    """append, attend, compress is memory_merge_ with a frame, the attention, memory_merge_ without; no slot moves."""
    M = 4
    frames = randn(2, 30, N, C, device=device)
    policy, state = create("merge", capacity=M, weighted=weighted), new_state(2, M, N, C, device=device)
    bank = policy.new(2, N, C, device=device)
    for t in range(30):
        bank = policy.append(bank, frames[:, t])
        memory_merge_(*state[:5], frames[:, t].contiguous(), weighted=weighted)
        seen = bank.slots()
        assert torch.equal(seen.rows, state.bank) and torch.equal(seen.sizes, state.sizes.transpose(1, 2))
        assert seen.rows.data_ptr() == bank.rows.data_ptr(), "a view"
        assert seen.mask.all() == (t >= M) and seen.ragged == (t < M)
        bank = policy.compress(bank)
        memory_merge_(*state[:5], weighted=weighted)
        for name in ("sizes", "order", "similarity", "length"):
            assert torch.equal(getattr(bank, name), getattr(state, name)), name


def test_a_file_keeps_more_beside_the_bank(tmp_path):
    policy, held = create("fifo"), torch.arange(6).view(2, 3)
    path = tmp_path / "a.safetensors"
    memory.save(path, policy, policy.new(1, 2, 3), tensors={"held": held}, notes={"program": '{"frames": 2}'})
    assert memory.load(path)[0] == policy
    note, tensors = memory.beside(path, "program")
    assert note == {"frames": 2} and tensors.keys() == {"held"} and torch.equal(tensors["held"], held)
    assert memory.beside(path, "another")[0] is None
    with pytest.raises(FileNotFoundError, match="memory.beside"):
        memory.beside(tmp_path / "none.safetensors", "program")


@every_policy
@pytest.mark.parametrize("anchors", [0, 2])
def test_sessions(name, anchors, tmp_path):
    """fork, select, batched, reset, state_dict and files: everyone goes on with the same bits."""
    policy = policy_of(name, anchors=anchors)
    frames, seconds = frames_of(3, 40)
    bank = streamed(policy, frames[:, :17], seconds[:, :17])
    saved = bank.state_dict()
    memory.save(tmp_path / "a.safetensors", policy, bank)
    forked, swapped = bank.fork(), bank.select([2, 0, 0])
    alone = [bank.select([b]) for b in range(3)]
    whole = policy.extend(bank, frames[:, 17:], seconds[:, 17:])
    assert same(policy.extend(forked, frames[:, 17:], seconds[:, 17:]), whole)
    again, loaded = memory.load(tmp_path / "a.safetensors")
    assert again == policy and same(policy.extend(loaded, frames[:, 17:], seconds[:, 17:]), whole)
    resumed = policy.check(Bank.load_state_dict(saved))
    assert same(policy.extend(resumed, frames[:, 17:], seconds[:, 17:]), whole), "saving copied"
    order = [2, 0, 0]
    assert same(policy.extend(swapped, frames[order, 17:], seconds[order, 17:]), whole.select(order))
    assert same(policy.extend(memory.batched(alone), frames[:, 17:], seconds[:, 17:]), whole)

    begun = [streamed(policy, frames[b : b + 1, :k], seconds[b : b + 1, :k]) for b, k in enumerate((1, 2))]
    early = policy.extend(memory.batched(begun), frames[:2, 17:], seconds[:2, 17:]).entries()
    for b, k in enumerate((1, 2)):  # with anchors: one of them lacks another
        t = [*range(k), *range(17, 40)]
        for mine, want in zip(early[:5], streamed(policy, frames[b : b + 1, t], seconds[b : b + 1, t]).entries()[:5]):
            assert equal(mine[b, : want.shape[1]], want[0])

    fresh = policy.new(2, N, C)
    mixed = memory.batched([whole.select([1]), policy.push(fresh, frames[:2, 0], seconds[:2, 0])])
    assert (mixed.ragged or name == "average") and mixed.frames.tolist() == [40, 1, 1]
    cleared = mixed.reset(torch.tensor([True, False, True]))
    assert cleared.frames.tolist() == [0, 1, 0] and not cleared.entries().mask[0].any()
    after = policy.push(cleared, frames[:, 5], seconds[:, 5]).entries()
    want = streamed(policy, frames[:1, 5:6], seconds[:1, 5:6]).entries()
    assert torch.equal(after.rows[0, : want.rows.shape[1]], want.rows[0]) and after.sizes[0].sum() == want.sizes.sum()
    emptied = whole.reset()
    assert name in ENDLESS or same(emptied, policy.new(3, N, C))
    assert emptied.entries().rows.shape[1] == 0


def test_a_state_that_was_given_up_says_so():
    policy = create("merge", capacity=2)
    bank = policy.new(1, N, C)
    after = policy.push(bank, randn(1, N, C))
    for use in (
        bank.entries,
        bank.slots,
        bank.fork,
        bank.state_dict,
        partial(policy.push, bank, randn(1, N, C)),
        bank.reset,
    ):
        with pytest.raises(RuntimeError, match="fork the state before"):
            use()
    assert after.entries().rows.shape == (1, 1, N, C)


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("merge_average", *SPACE, *TOKENS)])
def test_attached_rows_follow(name):
    """Keys are affine in the rows, so merging them by size gives the keys of the merged rows."""
    policy = policy_of(name, 4, anchors=1)
    W, b, frames = randn(C, 7, seed=1), randn(7, seed=2), randn(2, 30, N, C)
    bank = policy.new(2, N, C, attached=[7, 2])
    bank = policy.extend(bank, frames, attached=[frames @ W + b, frames[..., :2]])
    for entries in (bank.entries(), bank.slots()):
        stored = entries.sizes > 0
        rows, (keys, part) = entries.rows[stored], (x[stored] for x in entries.attached)
        torch.testing.assert_close(keys, rows @ W + b, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part, rows[:, :2])


def test_log_size_bias_counts_an_entry_as_often_as_its_frames():
    policy = create("merge", capacity=3)
    bank = policy.push(streamed(policy, randn(2, 9, N, C)), randn(2, N, C), active=torch.tensor([True, False]))
    bank = bank.reset(torch.tensor([False, True]))
    bank = policy.push(bank, randn(2, N, C, seed=3))
    entries, q = bank.entries(), randn(2, 1, 4, C, seed=4)
    keys = entries.rows.flatten(1, 2)
    bias = log_size_bias(entries).flatten(1)[:, None, None]
    out = F.scaled_dot_product_attention(q, keys[:, None], keys[:, None], attn_mask=bias)
    for b in range(2):
        repeated = keys[b].repeat_interleave(entries.sizes[b].flatten(), dim=0)[None, None]
        torch.testing.assert_close(out[b : b + 1], F.scaled_dot_product_attention(q[b : b + 1], repeated, repeated))


@every_policy
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(name, dtype):
    """Frames are stored in the bank's dtype; autocast does not reach the choices."""
    policy, frames = policy_of(name), randn(2, 20, N, C).to(dtype)
    wide = streamed(policy, frames.float()).entries()
    with torch.autocast("cpu", torch.bfloat16):
        stored = policy.extend(policy.new(2, N, C), frames).entries()
    if dtype != torch.float64:
        assert torch.equal(stored.rows, wide.rows)
    narrow = policy.extend(policy.new(2, N, C, dtype), frames.float()).entries()
    assert narrow.rows.dtype == dtype and torch.isfinite(narrow.rows).all()
    assert name in RAGGED or torch.equal(narrow.sizes.sum((1, 2)), wide.sizes.sum((1, 2)))


@every_policy
@pytest.mark.parametrize("anchors", [0, 2])
def test_nothing_is_read_back(name, anchors):
    """On the meta device there is nothing to read, and any tensor of another device is an error."""
    policy = policy_of(name, anchors=anchors)
    bank = policy.new(2, N, C, device="meta")
    active = torch.empty(2, dtype=torch.bool, device="meta")
    for t in range(13):
        bank = policy.push(bank, torch.empty(2, N, C, device="meta"), active=active if t > 10 else None)
        assert bank.entries().rows.shape[0] == len(bank.slots().rows) == 2
    assert bank.reset(active).select(torch.empty(5, dtype=torch.int64, device="meta")).rows.is_meta


@every_policy
def test_memory_stays_flat(name):
    policy = policy_of(name)
    bank = policy.new(1, N, C, times=False)
    grows = []
    for t in range(300):
        bank = policy.push(bank, randn(1, N, C, seed=t))
        grows.append(sum(x.numel() for x in bank.state_dict().values()))
    assert (len(set(grows)) == 1) != (name in ENDLESS)
    assert bank.entries().first is None and int(bank.frames) == 300


@pytest.mark.parametrize("make, message", [
    (lambda: create("mean"), "name must be one of"),
    (lambda: create("fifo", size=3), "options do not fit 'fifo'"),
    (lambda: create("merge", hard="false"), "hard must be bool"),
    (lambda: create("merge", capacity=2, anchors=2), "capacity must leave room"),
    (lambda: create("merge", capacity=None), "capacity must leave room"),
    (lambda: create("merge", unit="pixel"), "unit must be"),
    (lambda: create("tome", axis="depth"), "axis must be"),
    (lambda: create("tome", axis="space", tokens=0), "tokens must be at least 1"),
    (lambda: create("fifo", anchors=-1), "anchors must be at least 0"),
    (lambda: create("fifo").new(1, 0, 2), "sizes must be at least 1"),
    (lambda: create("fifo").new(1, 2, 2, torch.int64), "dtype must be"),
    (lambda: create("tome", axis="space").new(1, 4, 2, attached=[3]), "attached rows go with"),
    (lambda: memory.merge_tokens(randn(1, 5, 2), torch.ones(1, 5), 3), "r must be"),
    (lambda: memory.batched([]), "at least one"),
    (lambda: memory.batched([create("fifo").new(1, 2, C), create("fifo").new(1, 3, C)]), "bank 1 must have"),
    (lambda: create("fifo").new(2, 3, 4).select([True]), "index must be int64"),
    (lambda: create("fifo").new(2, 3, 4).reset(torch.tensor([0])), "videos must be bool"),
    (lambda: Bank.load_state_dict({"rows": torch.ones(1)}), "lacks"),
    (lambda: create("fifo").check(create("merge").new(1, 2, 3)), "another policy"),
    (lambda: create("fifo").check(create("fifo", capacity=5).new(1, 2, 3)), "another policy"),
    (lambda: create("fifo").check(create("fifo", capacity=22, anchors=2).new(1, 2, 3)), "another policy"),
    (lambda: memory.plot(create("fifo").new(1, 2, 3), "x.png"), "must hold a frame"),
    (lambda: memory.plot(memory.History(), "x.png"), "must hold a record"),
    (lambda: memory.save("bank.pt", create("fifo"), create("fifo").new(1, 2, 3)), "must end in .safetensors"),
])  # fmt: skip
def test_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("frame, options, message", [
    (randn(2, N, C + 1), {}, "frame must be"),
    (randn(2, N + 1, C), {}, "frame must be"),
    (torch.ones(2, N, C, dtype=torch.int64), {}, "frame must be floating"),
    (torch.ones(2, N, C, requires_grad=True), {}, "detach frame"),
    (randn(2, N, C), dict(seconds=torch.zeros(3)), "seconds must be"),
    (randn(2, N, C), dict(active=torch.ones(2)), "active must be bool"),
    (randn(2, N, C), dict(attached=[randn(2, N, 1)]), "attached must be 0, got 1"),
])  # fmt: skip
def test_bad_frames_leave_the_bank_alone(frame, options, message):
    policy = create("merge")
    bank = policy.new(2, N, C)
    with pytest.raises(ValueError, match=message):
        policy.append(bank, frame, **options)
    assert bank.entries().rows.shape[1] == 0


def test_gradients_may_be_ignored_explicitly():
    policy = create("fifo")
    with torch.no_grad():
        bank = policy.push(policy.new(2, N, C), torch.ones(2, N, C, requires_grad=True))
    assert not bank.rows.requires_grad


@pytest.mark.parametrize("name", ["merge", "uniform", "tome_space"])
def test_pictures(name, tmp_path):
    policy, history = policy_of(name, anchors=1), memory.History(position=1, limit=300)
    bank = policy.new(2, N, C)
    for t in range(120):
        bank = policy.push(bank, randn(2, N, C, seed=t), torch.tensor([t / 25, t / 5]))
        history.record(bank)
        assert sum(map(len, history.records)) <= 300
    assert len(history.records) >= 2
    for source, path in ((history, tmp_path / "history.png"), (bank, tmp_path / "bank.png")):
        assert memory.plot(source, path).read_bytes().startswith(b"\x89PNG")
    assert memory.plot(bank, tmp_path / "other.png", video=1).stat().st_size > 5000
