"""Memory and pruning methods of the field: what their authors' functions make of small clips."""

import torch

from pyvidx import memory
from tests.golden.vectors import runner

INPUTS = ("*.frames", "*.start", "*.start.*", "*.either.*")


def method(pattern):
    """A runner for a file in which every tensor is named after its case, one run per case."""
    return runner(pattern, runs=lambda file: list(file.meta["cases"]), inputs=INPUTS)


@method("mallm")
def mallm(file, run, variant, check):
    frames, M = file.tensors[f"{run}.frames"], file.meta["cases"][run]["target"]
    lengths = {int(name.split(".")[2]) for name in file.tensors if name.startswith(f"{run}.") and name.count(".") == 3}
    for unit, ours in (("free", "token"), ("sync", "synchronized")):
        for t in lengths:
            entries = memory.create("merge", capacity=t, unit=ours).shrink(frames)
            hard = memory.create("merge", capacity=t, unit=ours, hard=True).shrink(frames)
            check(f"{run}.{unit}.{t}.rows", entries.rows, 1e-6)
            check(f"{run}.{unit}.{t}.hard", hard.rows, 1e-6)
            if run == "identical":  # rounding says which pair merges
                check.excuse(f"{run}.{unit}.{t}.sizes")
                assert (entries.sizes.sum(1) == frames.shape[1]).all()
            else:
                check.equal(f"{run}.{unit}.{t}.sizes", entries.sizes)
    if frames.shape[0] == 1:
        for unit, ours in (("free", "token"), ("sync", "synchronized")):
            got = memory.keyframes(frames, M, unit=ours)
            check(f"{run}.{unit}.keyframe", got.rows, 0)
            check.equal(f"{run}.{unit}.peak", got.peak[0])


@method("evs")  # its vectors are not in data/, only where PYVIDX_GOLDEN has them
def evs(file, run, variant, check):
    frames, case = file.tensors[f"{run}.frames"], file.meta["cases"][run]
    T, N, merge = len(frames), case["h"] * case["w"], case["spatial_merge_size"]
    for i, options in enumerate(case["runs"]):
        assert memory.compute_retained_tokens_count(N, T, options["q"]) == options["count"]
        size = (T, case["h"] * merge, case["w"] * merge)
        keep = memory.compute_retention_mask(frames.flatten(0, 1), size, merge, options["q"]).view(T, N)
        assert keep.sum() == options["count"]
        check.equal(f"{run}.keep.{i}", keep)


@method("vidcom2_vllm")
@method("vidcom2_authors")
def vidcom2(file, run, variant, check):
    frames, case = file.tensors[f"{run}.frames"], file.meta["cases"][run]
    T, N, merge = len(frames), case["h"] * case["w"], case["spatial_merge_size"]
    for i, options in enumerate(case["runs"]):
        if "q" in options:
            size = (T, case["h"] * merge, case["w"] * merge)
            keep = memory.compute_retention_mask(frames.flatten(0, 1), size, merge, options["q"], "vidcom2").view(T, N)
            assert memory.compute_retained_tokens_count(N, T, options["q"], "vidcom2") == options["count"]
        else:
            keep = memory.vidcom2(frames[None], 1 - options["base_scale"], form="authors")[0]
        assert keep.sum() == options["count"]
        check.equal(f"{run}.keep.{i}", keep)


def level(bank, last):
    """The rows of a bank of one video: all, and the last ones."""
    rows = bank.entries().rows[0]
    return rows[: len(rows) - last], rows[len(rows) - last :]


@method("moviechat_fragments")
def moviechat_fragments(file, run, variant, check):
    frames, case = file.tensors[f"{run}.frames"], file.meta["cases"][run]
    used, short, merged = case["n_frame"], case["short_memory_length"], case["short_memory_merge"]
    policy = memory.create("moviechat", fragment=100, used=used, short=short, merged=merged)
    bank = policy.new(1, *frames.shape[1:])
    for i, (fragment, length) in enumerate(zip(frames.split(case["fragments"]), case["long_lengths"])):
        bank = policy.extend(bank, fragment[None])
        check(f"{run}.recent.{i}", level(bank, int(bank.extra["recent"]))[1], 0)
        bank = policy.flush(bank)
        rows = bank.entries().rows[0]
        check(f"{run}.long", rows, 1e-6, part=(slice(length),))
    assert bank.frames == len(frames) and len(rows) == case["long_lengths"][-1]


@method("moviechat_onevision")
def moviechat_onevision(file, run, variant, check):
    frames, case = file.tensors[f"{run}.frames"], file.meta["cases"][run]
    options = dict(short=case["short_memory_length"], merged=case["merge_frame_length"])
    policy = memory.create("moviechat", form="onevision", **options)
    bank = policy.new(1, *frames.shape[1:])
    for window, long, short in zip(frames.split(case["window"]), case["long_lengths"], case["short_lengths"]):
        bank = policy.extend(bank, window[None])
        old, new = level(bank, short)
        check(f"{run}.long", old, 1e-6, part=(slice(long),))
    check(f"{run}.short", new, 1e-6)


@method("moviechat_consolidate")
def moviechat_consolidate(file, run, variant, check):
    frames, L = file.tensors[f"{run}.frames"][None], file.meta["cases"][run]["long_memory_length"]
    check(f"{run}.long", memory.moviechat_consolidate(frames, L, compat="official").rows[0], 1e-6)


def tokens(policy, frames):
    """What a ragged policy keeps of frames [T, N, C]: mask [T, N] and rows [T, N, C], 0 where nothing is."""
    bank = policy.extend(policy.new(1, *frames.shape[1:]), frames[None])
    entries = bank.entries()
    return entries.mask[0], entries.rows[0]


def rule(options):
    absolute = options["absolute"]
    return {
        "threshold": options["threshold"] if absolute else None,
        "ratio": None if absolute else options["threshold"],
    }


@method("dtd_feature")
def dtd_feature(file, run, variant, check):
    frames = file.tensors[f"{run}.frames"]
    for i, options in enumerate(file.meta["cases"][run]["runs"]):
        keep, rows = tokens(memory.create("dtd", **rule(options)), frames)
        check.equal(f"{run}.keep.{i}", keep)
        assert rows.equal(frames.where(keep[..., None], 0))


@method("dtd_pixel")
def dtd_pixel(file, run, variant, check):
    case = file.meta["cases"][run]
    grid, norm = [case[n] for n in "Thw"], {"mean": case["mean"], "std": case["std"]}
    for i, options in enumerate(case["runs"]):
        check.equal(f"{run}.keep.{i}", memory.dtd_pixels(file.tensors["pixels"], grid, **rule(options), **norm))


@method("fluxmem_*")
def fluxmem(file, run, variant, check):
    case = file.meta["cases"][run]
    policy = memory.create(
        "fluxmem",
        short=case["short_frames"] // case["temporal_patch_size"],
        medium=case["medium_frames"] // case["temporal_patch_size"],
        drop=case["direct_drop"],
        threshold=case["pair_distance_threshold"],
        grid=(case["h"], case["w"]),
    )
    for n in case["prefixes"]:
        frames = file.tensors[f"{run}.frames"][:n]
        keep, rows = tokens(policy, frames)
        want = file.tensors[f"{run}.keep.{n}"]
        for t, a, b in file.tensors[f"{run}.either.{n}"].tolist():  # the mean of a and b stands in either place
            if want[t, a] != keep[t, a]:
                keep[t, [a, b]], rows[t, [a, b]] = keep[t, [b, a]], rows[t, [b, a]]
        certain = [t for t in range(n) if t not in case["rounding_decides"]]
        check.equal(f"{run}.keep.{n}", keep, part=(certain,))
        dense = torch.zeros_like(frames)
        dense[want] = file.tensors[f"{run}.rows.{n}"]
        torch.testing.assert_close(rows[certain], dense[certain], rtol=1e-5, atol=1e-5)
        check.excuse(f"{run}.rows.{n}")


def start_of(rows, start):
    """The numbers of the rows that the authors' random start picked."""
    return torch.cdist(start.flatten(1)[None].double(), rows.flatten(1)[None].double()).argmin(2)


@method("flashvstream_kmeans")
def flash_vstream(file, run, variant, check):
    frames, case = file.tensors[f"{run}.frames"], file.meta["cases"][run]
    start = start_of(frames, file.tensors[f"{run}.start"])
    start = torch.cat([start, start[:, :1].expand(-1, case["clusters"] - start.shape[1])], 1)  # too few rows differ
    got = memory.ordered_kmeans(frames[None], case["clusters"], start=start, compat="official")
    check(f"{run}.rows", got.rows[0], 1e-6)
    check.equal(f"{run}.weights", got.sizes[0])
    check(f"{run}.times", got.times[0], 1e-6)


@method("flashvstream_chunks")
def flash_vstream_chunks(file, run, variant, check):
    frames, case = file.tensors[f"{run}.frames"], file.meta["cases"][run]
    rows, sizes = frames[None, :0], torch.zeros(1, 0, dtype=torch.int32)
    for begin, end in zip([0, *case["ends"]], case["ends"]):
        rows = torch.cat([rows, frames[None, begin:end]], 1)
        sizes = torch.cat([sizes, torch.ones(1, end - begin, dtype=torch.int32)], 1)
        start = start_of(rows[0], file.tensors[f"{run}.start.{end}"])
        got = memory.ordered_kmeans(rows, case["clusters"], start=start, sizes=sizes, compat="official")
        rows, sizes = got.rows, got.sizes
        check(f"{run}.rows.{end}", rows[0], 1e-6)
        check.equal(f"{run}.weights.{end}", sizes[0])
        check(f"{run}.times.{end}", got.times[0], 1e-6)


@runner("flashvstream_retrieve", runs=lambda file: [""], inputs=("x", "pooled", "centroids", "weights"))
def flash_vstream_retrieve(file, run, variant, check):
    x, pooled, centroids, weights = (file.tensors[name][None] for name in ("x", "pooled", "centroids", "weights"))
    places = memory.retrieve(pooled, centroids, weights, file.meta["cases"]["retrieve"]["spatial_length"])[0]
    check.equal("places", places)
    check("rows", x[0, places], 0)


@method("streamforest_*")
def streamforest(file, run, variant, check):
    frames, case = file.tensors[f"{run}.frames"][None], file.meta["cases"][run]
    (newest, window), (now, short) = case["st_memory_windows"], case["st_memory_tokens"]
    assert newest == 1
    policy = memory.create(
        "streamforest",
        now=now,
        short=short,
        tokens=case["long_memory_tokens_per_frame"],
        window=window,
        split=case["event_split_window"],
        quota=case["long_memory_tokens_quota"],
        heads=case["num_attention_heads"],
        weights=(case["sim_weight_g"], case["time_weight_a"], case["merge_weight_b"]),
        compat="official",
    )
    for n in case["prefixes"]:
        if case["read"] == "after every frame":
            bank = policy.extend(policy.new(1, *frames.shape[2:]), frames[:, :n])
        else:
            bank = policy.clip(frames[:, :n])
        entries, events = bank.entries(), bank.extra
        there = events["frames"][0] > 0
        check.equal(f"{run}.{n}.event_frames", events["frames"][0, there])
        check(f"{run}.{n}.event_time", events["time"][0, there], 1e-6)
        check.equal(f"{run}.{n}.event_merges", events["merges"][0, there])
        check(f"{run}.{n}.event_similarity", events["likeness"][0, there][1:], 1e-5)
        check(f"{run}.{n}.tokens", entries.rows[0, :, 0][entries.mask[0, :, 0]], 1e-5)
        check.equal(f"{run}.{n}.levels", torch.tensor([events["frames"].sum(), events["waiting"].sum(), 1]))
