"""Policies of the field: their rules against lists, and what the properties in test_memory.py do not say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvidx import memory
from pyvidx.memory import create, fluxmem
from pyvidx.memory.ragged_tome import shorten
from tests.harness import randn
from tests.memory_reference import cosine

small = settings(deadline=None, max_examples=20, derandomize=True)


def streamed(policy, frames, active=None):
    return policy.extend(policy.new(len(frames), *frames.shape[2:]), frames, active=active)


# ---- moviechat ----


def consolidated(buffer, M):
    """Frames [N, C] in a list."""
    while len(buffer) > M:
        means = [x.double().mean(0) for x in buffer]
        products = [float(a @ b) for a, b in zip(means, means[1:])]
        k = products.index(max(products))
        buffer = [*buffer[:k], (buffer[k].double() + buffer[k + 1].double()) / 2, *buffer[k + 2 :]]
    return buffer


@given(data=st.data(), seed=st.integers(0, 99))
@small
def test_moviechat_against_lists(data, seed):
    fragment, used, short, M = (data.draw(st.integers(1, n)) for n in (6, 6, 6, 3))
    policy = create("moviechat", fragment=fragment, used=used, short=short, merged=M)
    ends = [data.draw(st.booleans()) for _ in range(data.draw(st.integers(1, 25)))]  # where flush is called
    frames = randn(1, len(ends), 3, 5, seed=seed)
    bank, long, buffer, phase = policy.new(1, 3, 5), [], [], 0
    for t, end in enumerate(ends):
        bank = policy.push(bank, frames[:, t])
        phase += 1
        if phase <= used:
            buffer = [*buffer, frames[0, t]][-short:]
        if end:
            bank = policy.flush(bank)
        if end or phase == fragment:
            long, buffer, phase = long + consolidated(buffer, M), [], 0
        entries = bank.entries()
        want = torch.stack([x.double() for x in long + buffer])
        torch.testing.assert_close(entries.rows[0].double(), want, rtol=1e-5, atol=1e-5)
        assert entries.mask.all() and int(bank.frames) == t + 1


@given(data=st.data(), seed=st.integers(0, 99))
@small
def test_moviechat_onevision_against_lists(data, seed):
    M = data.draw(st.integers(1, 3))
    short, T = M + data.draw(st.integers(1, 4)), data.draw(st.integers(1, 30))
    frames = randn(1, T, 3, 5, seed=seed)
    long, buffer = [], []
    for t in range(T):
        buffer.append(frames[0, t])
        if (t + 1) % (short - M) == 0:
            buffer = consolidated(buffer, M)
            long += buffer
    entries = streamed(create("moviechat", form="onevision", short=short, merged=M), frames).entries()
    want = torch.stack([x.double() for x in long + buffer])
    torch.testing.assert_close(entries.rows[0].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["fragments", "onevision"])
def test_moviechat_slots_follow_the_list_in_ragged_batches(form):
    """The bound counts what can be there, not every frame that was pushed."""
    policy = create("moviechat", form=form, **({"fragment": 8} if form == "fragments" else {"short": 10}))
    active = torch.rand(2, 400, generator=torch.Generator().manual_seed(0)) < 0.7
    bank = streamed(policy, randn(2, 400, 1, 2), active)
    assert bank.bound <= 400 // 8 * 2 + 18 and (bank.length <= bank.bound).all()
    bank = policy.flush(bank, torch.tensor([True, False]))
    assert bank.extra["phase"].tolist()[0] == 0 and (bank.length <= bank.bound).all()


@pytest.mark.parametrize("compat", ["paper", "official"])
def test_moviechat_consolidates_a_clip(compat):
    frames = randn(1, 5, 2, 4)
    frames[:, 3] = frames[:, 2] * 2
    frames[:, 1] = -frames[:, 0]
    entries = memory.moviechat_consolidate(frames, 4, compat=compat)
    k = 2 if compat == "paper" else 0
    torch.testing.assert_close(entries.rows[:, k], frames[:, k : k + 2].mean(1))
    assert memory.moviechat_consolidate(frames, 9, compat=compat).rows.equal(frames)


# ---- dtd ----


@given(T=st.integers(1, 8), seed=st.integers(0, 99), tau=st.floats(-0.5, 0.9), anchors=st.integers(0, 2))
@small
def test_dtd_against_loops(T, seed, tau, anchors):
    frames = randn(2, T, 5, 4, seed=seed)
    frames[:, 3:4, 2] = 0  # unlike everything
    kept = streamed(create("dtd", threshold=tau, anchors=anchors), frames).entries().mask
    share = streamed(create("dtd", threshold=None, ratio=0.5), frames).entries().mask
    for b in range(2):
        for t in range(T):
            c = [cosine(frames[b, t - 1, p].double(), frames[b, t, p].double()) if t else -2.0 for p in range(5)]
            assert kept[b, t].tolist() == [t < anchors or not x > tau for x in c]
            worst = sorted(range(5), key=lambda p: -c[p])[: 2 if t else 0]
            assert share[b, t].tolist() == [p not in worst for p in range(5)]


def test_dtd_by_pixels_sees_pictures_apart():
    """Two pictures to a step; the first of step 0 and the last of step 1 are compared, in [0, 1]."""
    patch, mean, std = 3, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    pictures = torch.rand(1, 2, 3, 2, patch * patch, generator=torch.Generator().manual_seed(0))  # step, color, picture
    pictures[:, 1, :, 1] = pictures[:, 0, :, 0] + 0.05
    norm = [torch.tensor(v)[:, None, None] for v in (mean, std)]
    pixels = ((pictures - norm[0]) / norm[1])[:, :, None].expand(-1, -1, 4, -1, -1, -1).reshape(1, 8, -1)
    for threshold, kept in ((0.04, True), (0.06, False)):
        keep = memory.dtd_pixels(pixels, (2, 1, 1), threshold, mean=mean, std=std)
        assert keep.tolist() == [[[True], [kept]]]


# ---- fluxmem ----


@given(h=st.integers(1, 6), w=st.integers(1, 6), share=st.floats(0.1, 0.9), seed=st.integers(0, 99))
@small
def test_regions_are_those_of_a_search(h, w, share, seed):
    p, q = fluxmem.pairs((h, w), torch.device("cpu"))
    joined = torch.rand(3, len(p), generator=torch.Generator().manual_seed(seed)) < share
    label = fluxmem.regions(joined, p, q, h * w)
    for b in range(3):
        region = list(range(h * w))
        for _ in range(h * w):  # the least number wanders along the pairs
            for x, y in zip(p[joined[b]].tolist(), q[joined[b]].tolist()):
                region[x] = region[y] = min(region[x], region[y])
        assert label[b].tolist() == region


def test_a_long_snake_is_one_region():
    """Numbers that are least at every other place are the slowest case of joining the least."""
    N = 257
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    high, low = order.sort(descending=True).values[: N // 2 + 1], order.sort().values[: N // 2]
    snake = torch.stack([high[:-1], low], 1).flatten()
    for path in (snake, order, torch.arange(N)):
        label = fluxmem.regions(torch.ones(1, len(path) - 1, dtype=torch.bool), path[:-1], path[1:], N)
        assert label[0, path].unique().tolist() == [int(path.min())]


@given(n=st.integers(1, 40), seed=st.integers(0, 99), median=st.booleans(), wide=st.booleans())
@small
def test_otsu_is_the_split_of_least_variance(n, seed, median, wide):
    d = torch.rand(2, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * (2 if wide else 1e-9)
    there = torch.rand(2, n, generator=torch.Generator().manual_seed(seed + 1)) < 0.8
    there |= torch.tensor(median)
    got = fluxmem.otsu(d, there, median)
    for b in range(2):
        bins = (d[b, there[b]] * 64).long().clamp_max(127)
        splits = {}
        for k in range(127):
            low, high = bins[bins <= k].double(), bins[bins > k].double()
            if len(low) and len(high):
                splits[k] = len(low) * len(high) * (low.mean() - high.mean()) ** 2
        if splits:
            best = max(splits.values())
            assert splits[round(float(got[b]) * 64 - 0.5)] >= best * (1 - 1e-12)
            assert all(v < best * (1 - 1e-12) for k, v in splits.items() if k < round(float(got[b]) * 64 - 0.5))
        else:
            assert got[b] == (d[b].sort().values[(n - 1) // 2] if median else -1)


def test_fluxmem_levels():
    """A picture that stands still but for one place: old frames keep that place, and its neighbors there are joined."""
    h, w, T = 4, 4, 12
    frames = randn(1, 1, 1, 8).expand(1, T, h * w, 8).clone()
    frames[0, :, 0] = randn(T, 8, seed=1)
    frames[0, :, 1] = frames[0, :, 0] + 1e-3
    frames[0, :, [2, 3, 6]] = randn(T, 3, 8, seed=2).transpose(0, 1).reshape(3, T, 8).transpose(0, 1)[None]
    bank = streamed(create("fluxmem", short=2, medium=3, drop=0.9), frames)
    entries = bank.entries()
    assert entries.mask[0, -2:].all(), "the newest are whole"
    assert not entries.mask[0, :-2, 8:].any(), "what stands still is gone"
    sizes = entries.sizes[0, 1 : T - 5]
    assert (sizes[:, 0] >= 2).all() and (sizes[:, 1] == 0).all(), "the first of the two alike stands for both"
    two = sizes[:, 0] == 2
    assert two.any()
    torch.testing.assert_close(entries.rows[0, 1 : T - 5, 0][two], frames[0, 1 : T - 5, :2].mean(1)[two])


def test_a_token_that_is_not_finite_goes_alone():
    """It has no bin in a histogram, and 0 times NaN is NaN in the mean of a region."""
    frames = randn(1, 1, 12, 8).expand(1, 10, 12, 8) + 0.3 * randn(1, 10, 12, 8, seed=1)
    frames[0, 4, 5] = torch.nan
    frames[0, 7] = torch.nan
    entries = streamed(create("fluxmem", short=1, medium=1, drop=2.0, grid=(3, 4)), frames).entries()
    joined = entries.sizes[0] > 1
    assert joined[4].any() and not entries.mask[0, 4, 5] and not entries.mask[0, 7].any()
    assert entries.rows[entries.mask].isfinite().all()
    assert streamed(create("dtd", threshold=0.99), frames).entries().mask[0, 7].all(), "it is not like the one before"


# ---- flash_vstream ----


def kmeans_by_loops(x, K, weights):
    """x [T, W] float64 -> labels, centers."""
    centers = x[[k * len(x) // K for k in range(K)]]
    for _ in range(10):
        far = (x[:, None] - centers).square().sum(2)
        label = far.argmin(1)
        new = [x[label == k].T @ weights[label == k] / weights[label == k].sum() for k in range(K)]
        own = far.min(1).values.sort(descending=True, stable=True).indices.tolist()
        new = torch.stack([c if (label == k).any() else x[own.pop(0)] for k, c in enumerate(new)])
        if (new - centers).norm(dim=1).sum() < 1e-4:
            break
        centers = new
    return label, centers


@given(T=st.integers(3, 30), K=st.integers(1, 6), seed=st.integers(0, 99))
@small
def test_kmeans_against_loops(T, K, seed):
    x = randn(2, T, 2, 3, seed=seed)
    weights = torch.randint(1, 5, (2, T), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    got = memory.ordered_kmeans(x, K, sizes=weights)
    assert torch.equal(got.sizes.sum(1), weights.sum(1)) and (got.sizes > 0).all()
    for b in range(2 if T > K else 0):
        label, centers = kmeans_by_loops(x[b].double().flatten(1), K, weights[b].double())
        if all((label == k).any() for k in range(K)):
            w = [weights[b][label == k].double() for k in range(K)]
            times = torch.stack([(label == k).nonzero()[:, 0].double() @ w[k] / w[k].sum() for k in range(K)])
            order = times.argsort(stable=True)
            torch.testing.assert_close(got.rows[b].flatten(1).double(), centers[order], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got.times[b], times[order])
            assert got.sizes[b].tolist() == [int(w[k].sum()) for k in order]


def test_no_cluster_is_empty():
    """A video that stands still, and one with fewer different frames than clusters."""
    x = torch.cat([randn(1, 1, 2, 3).expand(1, 20, 2, 3), randn(1, 4, 2, 3).repeat_interleave(5, 1)])
    got = memory.ordered_kmeans(x, 6)
    assert (got.sizes > 0).all() and (got.sizes.sum(1) == 20).all()
    assert (got.rows[0] - x[0, :1]).abs().max() < 1e-6 and (got.times[:, 1:] >= got.times[:, :-1]).all()
    official = memory.ordered_kmeans(x, 6, compat="official")
    assert (official.sizes == 1).all(), "all count one"


def test_flash_vstream_is_kmeans_of_what_is_there():
    """Clusters keep when their frames were; the official times are places in a list that was clustered."""
    frames, K = randn(1, 40, 3, 4), 4
    rows, sizes, times = frames[:, :0], torch.zeros(1, 0, dtype=torch.int32), torch.zeros(1, 0)
    policy = create("flash_vstream", capacity=10, clusters=K)
    bank = policy.new(1, 3, 4)
    for t in range(40):
        bank = policy.push(bank, frames[:, t])
        rows = torch.cat([rows, frames[:, t : t + 1]], 1)
        sizes = torch.cat([sizes, torch.ones(1, 1, dtype=torch.int32)], 1)
        times = torch.cat([times, torch.full((1, 1), float(t))], 1)
        if rows.shape[1] > 10 or t == 39:
            rows, sizes, times = memory.ordered_kmeans(rows, K, sizes=sizes, times=times)
    entries = policy.flush(bank).entries()
    torch.testing.assert_close(entries.rows, rows, rtol=1e-5, atol=1e-5)
    assert torch.equal(entries.sizes[..., 0], sizes) and (entries.sizes[..., 0].sum() == 40)
    assert (entries.first[0, :, 0] <= times[0]).all() and (times[0] <= entries.last[0, :, 0]).all()


def test_a_ragged_batch_is_as_long_as_its_clusters():
    policy, active = create("flash_vstream", capacity=20, clusters=3), torch.ones(2, 9, dtype=torch.bool)
    active[1, 4:] = False
    bank = policy.flush(streamed(policy, randn(2, 9, 3, 4), active))
    assert bank.length.tolist() == [3, 3] and bank.entries().rows.shape[1] == 3


def test_retrieve_finds_the_heaviest_clusters_frames():
    x = randn(2, 9, 3, 4)
    clusters = x[:, [4, 1, 7]] + 1e-3
    assert memory.retrieve(x, clusters, torch.tensor([[1, 5, 3], [2, 2, 2]]), 2).tolist() == [[1, 7], [4, 1]]


# ---- streamforest ----

SMALL = dict(now=6, short=4, tokens=2, window=3, split=3, quota=12, heads=2)


@given(data=st.data(), seed=st.integers(0, 99))
@small
def test_lists_of_unequal_lengths_merge_as_they_do_alone(data, seed):
    x = randn(3, 13, 6, seed=seed)
    count = torch.tensor([data.draw(st.integers(1, 13)) for _ in range(3)])
    target = torch.tensor([data.draw(st.integers(1, 6)) for _ in range(3)])
    sizes = torch.ones(3, 13, dtype=torch.int32)
    rows, merged = shorten(x, sizes, count, target, heads=1, width=13, ratio=13)
    for b in range(3):
        want, counts, _ = memory.reduce_tokens(x[b : b + 1, : count[b]], int(target[b]))
        n = want.shape[1]
        torch.testing.assert_close(rows[b, :n], want[0], rtol=1e-5, atol=1e-5)
        assert merged[b, :n].tolist() == counts[0].tolist() and not merged[b, n:].any() and not rows[b, n:].any()


@pytest.mark.parametrize("compat", ["paper", "official"])
def test_streamforest_stays_within_its_quota(compat):
    policy, frames = create("streamforest", **SMALL, compat=compat), randn(2, 40, 7, 4)
    bank = policy.new(2, 7, 4)
    for t in range(40):
        bank = policy.push(bank, frames[:, t])
        e, entries = bank.extra, bank.entries()
        count = (entries.sizes > 0).sum((1, 2))
        assert (2 * e["frames"].sum(1) <= max(12, 2 * 3)).all() and (e["waiting"] < 6).all()
        assert torch.equal(count, 2 * e["frames"].sum(1) + 4 * e["waiting"] + 6)
        if compat == "paper":
            assert (entries.sizes.sum((1, 2)) == 7 * (t + 1)).all(), "every token of every frame is held"
            held = (e["held"].sum(1) + e["waiting"] + 1).tolist()
            assert held == [t + 1, t + 1]
            # The mean of all there was is that of all there is.
            mean = (entries.rows * entries.sizes[..., None]).sum((1, 2)) / entries.sizes.sum((1, 2))[:, None]
            torch.testing.assert_close(mean, frames[:, : t + 1].mean((1, 2)), rtol=1e-4, atol=1e-5)
    assert (e["merges"].sum(1) >= e["frames"].sum(1)).all()


def test_streamforest_of_a_clip_merges_events_at_its_end():
    frames = randn(2, 40, 7, 4)
    roomy = create("streamforest", **SMALL | dict(quota=100))
    stream, clip = streamed(roomy, frames), roomy.clip(frames)
    for name in ("frames", "time", "likeness"):
        n = stream.extra[name].shape[1]
        assert torch.equal(clip.extra[name][:, :n], stream.extra[name]), "nothing merges within the quota"
    policy = create("streamforest", **SMALL)
    clip = policy.clip(frames)
    assert (2 * clip.extra["frames"].sum(1) <= 12).all()
    assert torch.equal(clip.extra["held"].sum(1), stream.extra["held"].sum(1))
    short = policy.clip(frames, lengths=torch.tensor([40, 25])).extra["time"][1]
    alone = policy.clip(frames[1:, :25]).extra["time"][0]
    torch.testing.assert_close(short[: len(alone)], alone)


def test_packed_tokens_say_where_they_were():
    frames = randn(2, 6, 5, 4)
    entries = streamed(create("dtd", threshold=0.1), frames).entries()
    for b, (rows, entry, place) in enumerate(memory.packed(entries)):
        assert len(rows) == entries.mask[b].sum() < 30 and torch.equal(rows, frames[b, entry, place])
        assert torch.equal(entry * 5 + place, (entry * 5 + place).sort().values)


@pytest.mark.parametrize("call, message", [
    (lambda: create("moviechat", form="mine"), "form must be"),
    (lambda: create("moviechat", fragment=0), "must be at least 1"),
    (lambda: create("moviechat", form="onevision", short=2, merged=2), "must be at least 1"),
    (lambda: memory.moviechat_consolidate(randn(1, 2, 3, 4), 1, compat="mine"), "compat must be"),
    (lambda: create("flash_vstream", capacity=4, clusters=5), "clusters must be in"),
    (lambda: create("flash_vstream", compat="mine"), "compat must be"),
    (lambda: memory.ordered_kmeans(randn(1, 5, 2, 3), 2, start=torch.zeros(1, 3)), "start must be"),
    (lambda: memory.ordered_kmeans(randn(1, 5, 2, 3), 2, start=torch.tensor([[0, 5]])), "start must be in"),
    (lambda: memory.ordered_kmeans(randn(1, 5, 2, 3), 2, sizes=torch.ones(1, 5)), "sizes must be whole"),
    (lambda: memory.retrieve(randn(1, 5, 2, 3), randn(1, 3, 2, 3), torch.ones(1, 3), 4), "count must be"),
    (lambda: memory.retrieve(randn(1, 5, 2, 3), randn(1, 3, 3, 3), torch.ones(1, 3), 1), "clusters must be"),
    (lambda: create("streamforest", anchors=1), "keeps no anchors"),
    (lambda: create("streamforest", tokens=200), "tokens <= short <= now"),
    (lambda: create("streamforest", weights=(1, 2)), "weights must be three"),
    (lambda: create("streamforest", compat="mine"), "compat must be"),
    (lambda: create("streamforest", **SMALL).new(1, 5, 4), "at least now"),
    (lambda: create("streamforest", **SMALL).new(1, 7, 5), "heads must divide"),
    (lambda: create("streamforest", **SMALL).new(1, 7, 4, attached=[2]), "attached must be"),
    (lambda: create("streamforest", **SMALL).push(create("streamforest", **SMALL).new(1, 7, 4), randn(1, 8, 4)),
     "frame must be"),
    (lambda: create("dtd", ratio=0.5), "give a threshold or a ratio"),
    (lambda: create("dtd", threshold=None, ratio=2.0), "ratio must be in"),
    (lambda: memory.dtd_pixels(randn(8, 10), (2, 1, 1)), "pixels must be"),
    (lambda: memory.dtd_pixels(randn(8, 30), (2, 1, 1)), "pixels must be"),  # 5 pixels are no square patch
    (lambda: memory.dtd_pixels(randn(8, 24), (2, 1)), "grid must be T, h, w"),
    (lambda: memory.dtd_pixels(randn(8, 24), (2, 1, 1), temporal=0), "all sizes at least 1"),
    (lambda: memory.dtd_pixels(randn(8, 24), (2, 1, 1), mean=(0.5,)), "mean and std must have 3"),
    (lambda: memory.dtd_pixels(randn(8, 24), (2, 1, 1), float("nan")), "threshold must be finite"),
    (lambda: create("fluxmem", threshold=2.5), "threshold must be in"),
    (lambda: create("fluxmem", short=0), "must be at least 1"),
    (lambda: create("fluxmem", grid=(2,)), "grid must be"),
    (lambda: create("fluxmem").new(1, 6, 4), "grid must be"),
    (lambda: create("fluxmem", grid=(2, 2)).new(1, 6, 4), "grid must be"),
])  # fmt: skip
def test_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
