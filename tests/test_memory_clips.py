"""Functions of a whole clip: against loops in float64, ragged batches, the contract of serving engines."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvidx import memory
from tests.harness import randn
from tests.memory_reference import cosine

small = settings(deadline=None, max_examples=15, derandomize=True)
sizes, rates = st.integers(1, 6), st.floats(0, 0.99)


def evs_by_loops(x, q):
    T, N = x.shape[:2]
    d = [1 - cosine(x[t, p], x[t - 1, p]) if t else 255.0 for t in range(T) for p in range(N)]
    best = sorted(range(T * N), key=lambda i: -d[i])[: max(N, int(T * N * (1 - q)))]
    return torch.tensor([i in best for i in range(T * N)]).view(T, N)


def keyframes_by_loops(x, count, unit):
    T, N = x.shape[:2]
    g = torch.tensor([[1 - cosine(x[t - 1, p], x[t, p]) if t else 1.0 for p in range(N)] for t in range(T)])
    if unit == "synchronized":
        g = g.mean(1, keepdim=True).expand(-1, N)
    index = torch.zeros(min(count, T), N, dtype=torch.int64)
    for p in range(N):
        column = g[:, p].tolist()
        peak = [t for t in range(T) if column[t] > max(column[max(t - 1, 0) : t], default=-9)
                and column[t] >= max(column[t + 1 : t + 2], default=-9)]  # fmt: skip
        chosen = sorted(range(T), key=lambda t: -column[t] - 2 * (t in peak))[: len(index)]
        index[:, p] = torch.tensor(sorted(chosen))
    return index


@given(T=sizes, N=sizes, q=rates, seed=st.integers(0, 99))
@small
def test_evs_and_keyframes_against_loops(T, N, q, seed):
    frames = randn(2, T, N, 8, seed=seed)
    keep = memory.evs(frames, q)
    for unit in ("token", "synchronized"):
        got = memory.keyframes(frames, N, unit)
        for b in range(2):
            assert torch.equal(keep[b], evs_by_loops(frames[b].double(), q))
            index = keyframes_by_loops(frames[b].double(), N, unit)
            assert torch.equal(got.index[b], index) and got.mask.all()
            assert torch.equal(got.rows[b], frames[b].gather(0, index[..., None].expand(-1, -1, 8)))


@given(data=st.data(), T=st.integers(1, 9), N=sizes, q=rates, seed=st.integers(0, 99))
@small
def test_a_short_video_of_a_batch_is_what_it_is_alone(data, T, N, q, seed):
    frames = randn(3, T, N, 8, seed=seed)
    lengths = torch.tensor([data.draw(st.integers(1, T)) for _ in range(3)])
    junk = frames.clone()
    junk[torch.arange(T) >= lengths[:, None]] = torch.nan
    several = {
        "evs": lambda x, n: memory.evs(x, q, n),
        "vllm": lambda x, n: memory.vidcom2(x, q, n),
        "authors": lambda x, n: memory.vidcom2(x, q, n, form="authors"),
    }
    for name, f in several.items():
        keep = f(junk, lengths)
        for b, n in enumerate(lengths.tolist()):
            alone = f(frames[b : b + 1, :n], None)[0]
            assert not keep[b, n:].any()
            if name == "evs":
                assert torch.equal(keep[b, :n], alone)
            else:  # its shares stand on the edge of rounding
                assert keep[b, :n].sum() == alone.sum() or name == "authors"
    got = memory.keyframes(junk, 4, lengths=lengths)
    shrunk = memory.create("merge", capacity=4).shrink(junk, lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        alone = memory.keyframes(frames[b : b + 1, :n], 4)
        L = alone.rows.shape[1]
        assert torch.equal(got.rows[b, :L], alone.rows[0]) and not got.rows[b, L:].any()
        assert torch.equal(got.peak[b, :L], alone.peak[0]) and got.mask[b].sum() == L * N
        alone = memory.create("merge", capacity=4).shrink(frames[b : b + 1, :n])
        for mine, want in zip(shrunk[:5], alone[:5]):
            assert torch.equal(mine[b, :L], want[0])
        assert not shrunk.mask[b, L:].any()


@pytest.mark.parametrize("method", memory.PRUNERS)
@given(T=sizes, h=sizes, q=rates, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@small
def test_the_number_of_tokens_is_known_before(method, T, h, q, dtype):
    count = memory.compute_retained_tokens_count(h * 2, T, q, method)
    rows = randn(T * h * 2, 6, sliced=False).to(dtype)
    keep = memory.compute_retention_mask(rows, torch.tensor([T, 2 * h, 4]), 2, q, method)
    assert keep.dtype == torch.bool and keep.sum() == count
    assert torch.equal(keep, memory.compute_retention_mask(rows.float(), (T, 2 * h, 4), 2, q, method)), "in float32"


def test_a_whole_clip_merges_the_best_pairs_first():
    """Where only neighbors are alike, a clip of pairs becomes its pairs."""
    frames = randn(2, 6, 5, 8).repeat_interleave(2, dim=1) + 1e-3 * randn(2, 12, 5, 8, seed=1)
    policy = memory.create("merge", capacity=7, anchors=1)
    entries = policy.shrink(frames, torch.arange(12).expand(2, -1) / 4)
    assert torch.equal(entries.sizes[0, :, 0].long(), torch.tensor([1, 1, 2, 2, 2, 2, 2]))
    torch.testing.assert_close(entries.rows[:, 2:], frames[:, 2:].unflatten(1, (5, 2)).mean(2))
    assert entries.first[0, :, 0].tolist() == [0, 0.25, 0.5, 1, 1.5, 2, 2.5]
    assert torch.equal(entries.rows[:, 0], frames[:, 0])


@pytest.mark.parametrize("call, message", [
    (lambda: memory.evs(randn(2, 3, 4), 0.5), "frames must be floating"),
    (lambda: memory.evs(randn(1, 2, 3, 4), 0.5, torch.ones(2, dtype=torch.int64)), "lengths must be int"),
    (lambda: memory.evs(randn(1, 2, 3, 4), 0.5, torch.tensor([3])), r"lengths must be in \[0, 2\], got 3 to 3"),
    (lambda: memory.evs(randn(1, 2, 3, 4), 0.5, torch.tensor([True])), "lengths must be int"),
    (lambda: memory.evs(randn(1, 2, 3, 4), 1.0), "evs: q must be in"),
    (lambda: memory.vidcom2(randn(1, 2, 3, 4), -0.5), "vidcom2: q must be in"),
    (lambda: memory.keyframes(randn(1, 2, 3, 4), 1, lengths=torch.tensor([-1])), "lengths must be in"),
    (lambda: memory.compute_retention_mask(randn(8, 4), (2, 2), 1, 0.5), "video_size_thw must be"),
    (lambda: memory.compute_retention_mask(randn(8, 4), (2, 2, 2), 0, 0.5), "spatial_merge_size at least 1"),
    (lambda: memory.vidcom2(randn(1, 2, 3, 4), 0.5, form="mine"), "form must be"),
    (lambda: memory.vidcom2(randn(1, 2, 3, 1), 0.5), "at least two channels"),
    (lambda: memory.keyframes(randn(1, 2, 3, 4), 0), "count must be"),
    (lambda: memory.keyframes(randn(1, 2, 3, 4), 2, unit="frame"), "unit must be"),
    (lambda: memory.compute_retained_tokens_count(4, 3, 1.0), "q must be in"),
    (lambda: memory.compute_retained_tokens_count(4, 0, 0.5), "must have tokens"),
    (lambda: memory.compute_retained_tokens_count(4, 3, 0.5, "mine"), "method must be one of"),
    (lambda: memory.compute_retention_mask(randn(7, 4), (2, 4, 4), 2, 0.5), "video_embeds must be"),
    (lambda: memory.create("merge").shrink(randn(1, 2, 3)), "frames must be"),
    (lambda: memory.create("merge").shrink(randn(1, 2, 3, 4), torch.zeros(3)), "seconds must be"),
    (lambda: memory.create("merge").extend(memory.create("merge").new(1, 3, 4), randn(1, 2, 3, 4), torch.zeros(1)),
     "seconds must be"),
])  # fmt: skip
def test_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
