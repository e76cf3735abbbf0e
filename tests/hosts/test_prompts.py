"""What the hosts share, without a model: tokens that are replaced, times, what is kept of chunks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvidx import memory
from pyvidx.hosts.compress import times_of
from pyvidx.hosts.language import Place, Prompt
from pyvidx.hosts.language.host import Host
from pyvidx.hosts.language.kept import method
from pyvidx.hosts.language.registry import host_of
from pyvidx.hosts.language.tokens import Edit, edited
from tests.harness import randn

VIDEO, PAD = 90, 3
small = settings(deadline=None, max_examples=20, derandomize=True)
rows = st.lists(st.lists(st.one_of(st.integers(10, 14), st.integers(-4, -1)), min_size=1, max_size=6), min_size=1,
                max_size=4)  # fmt: skip


def written(rows, length_of):
    """Ids, types and labels of rows of words and, by negative numbers, videos."""
    ids = [[t for x in row for t in ([x] if x > 0 else [80, *[VIDEO] * length_of(-x), 81])] for row in rows]
    return (
        ids,
        [[2 * (t == VIDEO) for t in row] for row in ids],
        [[t if 10 <= t < 15 else -100 for t in row] for row in ids],
    )


def padded(lists, fill, side):
    length = max(map(len, lists))
    return torch.tensor(
        [[fill] * (length - len(x)) + x if side == "left" else x + [fill] * (length - len(x)) for x in lists]
    )


@given(rows=rows, side=st.sampled_from(["left", "right"]), masked=st.booleans(), dtype=st.sampled_from(
    [torch.int64, torch.int32, torch.bool, torch.float32]))  # fmt: skip
@small
def test_tokens_are_what_they_would_be_for_shorter_videos(rows, side, masked, dtype):
    def inputs(length_of, side):
        ids, types, labels = (padded(x, fill, side) for x, fill in zip(written(rows, length_of), (PAD, 0, -100)))
        mask = padded([[1] * len(x) for x in written(rows, length_of)[0]], 0, side).to(dtype)
        return {"input_ids": ids, "mm_token_type_ids": types, "labels": labels, "attention_mask": mask}

    long = inputs(lambda n: n + 3, side)
    alike = bool(long["attention_mask"].all())
    if alike and not masked:
        del long["attention_mask"]
    prompt, edits = Prompt.of(long), []
    for b, row in enumerate(rows):
        starts = (long["input_ids"][b] == 80).nonzero()[:, 0].tolist()
        for start, n in zip(starts, (-x for x in row if x < 0)):
            edits.append(Edit(b, start, start + n + 5, [80, *[VIDEO] * n, 81]))
    found = edited(long, prompt, edits[::-1], PAD)
    ends_left = side == "left" or alike  # where nothing was padded, it is on the left
    want = inputs(lambda n: n, "left" if ends_left else "right")
    if "attention_mask" not in long and want["attention_mask"].all():
        assert "attention_mask" not in found
    for name, x in found.items():
        assert torch.equal(x, want[name].to(x.dtype)), name
        assert x.dtype == (long[name].dtype if name in long else torch.int64)


def test_blocks():
    prompt = Prompt.of({"input_ids": torch.tensor([[1, 9, 9, 9, 2], [9, 9, 4, 9, 5]])})
    assert prompt.blocks(9, [1, 2, 2, 1]) == [(0, 1, 2), (0, 2, 4), (1, 0, 2), (1, 3, 4)]
    for counts, message in (
        ([3, 2], "hold 6 placeholders of videos .token 9., the pixels ask for 5"),
        ([3, 3], "the 3 placeholders of video 1 must stand together"),
        ([4, 2], "the 4 placeholders of video 0 must stand together in one row"),
        ([], "no pixels of any"),
    ):
        with pytest.raises(ValueError, match=message):
            prompt.blocks(9, counts)
    assert prompt.blocks(8, []) == []


PLACE = Place(0, 0, 1, 7, steps=3, positions=2, frames_per_step=2)


class Words(Host):
    def __init__(self):
        pass


def test_times():
    def of(inputs=None, seconds=None, place=PLACE):
        return times_of(Words(), inputs or {}, [place], seconds)[0].tolist()

    assert of() == [0, 1, 2]
    assert of(seconds=[[1, 2, 4]]) == [1, 2, 4]
    assert of(seconds=torch.tensor([[0.0, 1, 2, 3, 4, 6]])) == [0.5, 2.5, 5]
    assert of(seconds=[[0.0, 1, 2, 3, 4]]) == [0.5, 2.5, 4], "the last frame fills its step"
    metadata = {"fps": 2.0, "frames_indices": [0, 2, 4, 6, 8, 10]}
    assert of({"video_metadata": [metadata]}) == [0.5, 2.5, 4.5]
    for unknown in (metadata | {"fps": None}, {"fps": 2.0}, {"frames_indices": [0, 2, 4]}):
        assert of({"video_metadata": [unknown]}) == [0, 1, 2]
    for seconds, message in (
        ([["a", "b"]], "must be numbers"),
        ([[0.0, 1]], "3 steps of 2 frames"),
        ([], "of 1 videos"),
    ):
        with pytest.raises(ValueError, match=message):
            of(seconds=seconds)
    for wrong in ([], metadata, [None], [[metadata]], 3):
        with pytest.raises(ValueError, match="video_metadata must be of every video"):
            of({"video_metadata": wrong})
    with pytest.raises(ValueError, match="must be numbers, for video 0"):
        of({"video_metadata": [metadata | {"fps": "fast"}]})


@pytest.mark.parametrize("name, options", [
    ("merge", {}), ("merge", {"unit": "token"}), ("merge", {"anchors": 1}), ("uniform", {}), ("flash_vstream", {}),
    ("keyframes", {}), ("keyframes", {"unit": "token"}), ("dtd", {"threshold": 0.3}), ("evs", {"q": 0.4}),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_videos_together_in_chunks_are_kept_as_each_alone(name, options, dtype):
    """Of two levels, of different lengths and grids, in the order of the places."""
    lengths, sizes = (7, 3, 7, 5, 1), (4, 4, 6, 4, 6)
    places = [Place(i, 0, 0, 0, T, P) for i, (T, P) in enumerate(zip(lengths, sizes))]
    levels = [[randn(T, P, C, seed=i).to(dtype) for C in (8, 6)] for i, (T, P) in enumerate(zip(lengths, sizes))]
    seconds = [torch.arange(T, dtype=torch.float64) / (i + 1) for i, T in enumerate(lengths)]
    how = method(name, None if name in ("dtd", "evs") else 3, options)
    found = how.of(places, seconds, lambda p, a, b: [x[a:b] for x in levels[p.number]], chunk=2)
    for place, slots in zip(places, found):
        alone = how.of([place], seconds, lambda p, a, b: [x[a:b] for x in levels[p.number]], chunk=100)[0]
        for x, y in zip(slots.levels, alone.levels):
            assert x.dtype == dtype
            torch.testing.assert_close(x, y)
        assert torch.equal(slots.seconds, alone.seconds)
        assert slots.ragged == (name in ("dtd", "evs"))
        assert bool((slots.first <= slots.seconds).all()) and bool((slots.seconds <= slots.last).all())
        if slots.ragged:
            rows = levels[place.number][1][slots.entry, slots.position]
            assert torch.equal(slots.rows[1], rows) and torch.equal(slots.seconds, seconds[place.number][slots.entry])
        else:
            assert len(slots) == min(place.steps, 3) and slots.tokens == len(slots) * place.positions
            assert name == "flash_vstream" or bool((slots.seconds.diff() > 0).all())  # its clusters overlap


def test_slots_are_those_of_the_policy():
    frames, seconds = randn(9, 4, 8), torch.arange(9, dtype=torch.float64) / 2
    place = Place(0, 0, 0, 0, 9, 4)
    slots = method("merge", 4, {}).of([place], [seconds], lambda p, a, b: [frames[a:b]], chunk=4)[0]
    policy = memory.create("merge", capacity=4, unit="frame")
    bank = policy.new(1, 4, 8)
    for t in range(9):
        bank = policy.push(bank, frames[t][None], seconds[t : t + 1])
    e = bank.entries()
    torch.testing.assert_close(slots.levels[0], e.rows[0])
    assert torch.equal(slots.first, e.first[0, :, 0]) and torch.equal(slots.last, e.last[0, :, 0])
    assert torch.equal(slots.seconds, (e.first + e.last)[0, :, 0] / 2)


def test_hosts_are_found_in_what_wraps_a_model():
    pytest.importorskip("transformers", minversion="5.20.2", reason="pip install 'pyvidx[hosts]'")

    class Model(torch.nn.Module):
        config = type("Config", (), {"model_type": "video_llava"})

    class Peft:
        def get_base_model(self):
            return Model()

    compiled = type("Compiled", (), {"_orig_mod": Peft()})()
    parallel = torch.nn.DataParallel(Model())
    for wrapped in (compiled, parallel, type("Compiled", (), {"_orig_mod": parallel})()):
        assert type(host_of(wrapped)).__name__ == "VideoLlava" and type(host_of(wrapped).model) is Model
