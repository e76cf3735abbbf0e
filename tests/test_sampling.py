"""The named sampling rules, against indices taken from the public systems and against their formulas."""

import numpy as np
import pytest
import torch

from pyvidx.video import sampling

COUNTING = ["uniform", "midpoint", "arange", "linspace", "linspace_round"]
RANDOM = ["random_segment", "random_interval"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("midpoint", [18, 56, 93, 131, 168, 205, 243, 280]),
        ("uniform", [18, 55, 93, 130, 168, 205, 242, 280]),
        ("arange", [0, 37, 75, 112, 150, 187, 225, 262]),
        ("linspace", [0, 42, 85, 128, 170, 213, 256, 299]),
        ("linspace_round", [0, 43, 85, 128, 171, 214, 256, 299]),
    ],
)
def test_eight_of_300_frames(name, expected):
    assert sampling.sample(name, 300, 8).tolist() == expected
    for alias in sampling.RULES[name].aliases:
        assert sampling.sample(alias, 300, 8).tolist() == expected


def test_eight_uniform_frames_are_the_default():
    assert sampling.names()[0] == "uniform"
    assert sampling.sample("uniform", 300).tolist() == sampling.sample("bt_adapter_retrieval", 300, 8).tolist()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform", [0, 0, 0, 1, 1, 1, 2, 2]),
        ("midpoint", [0, 1, 1]),
        ("arange", [0, 1, 2]),
        ("linspace", [0, 0, 0, 0, 1, 1, 1, 2]),
        ("linspace_round", [0, 0, 1, 1, 1, 1, 2, 2]),
    ],
)
def test_short_videos_go_as_in_the_source(name, expected):
    assert sampling.sample(name, 3, 8).tolist() == expected
    assert set(sampling.sample(name, 1, 8).tolist()) == {0}


@pytest.mark.parametrize("wanted", [1, 2, 7, 8, 64, 100])
def test_counting_rules_are_their_formulas(wanted):
    for n in range(1, 400):
        segment = float(n - 1) / wanted
        assert sampling.uniform(n, wanted).tolist() == [
            int(np.round(segment * i)) + int(segment / 2) for i in range(wanted)
        ]
        fewer = min(n, wanted)
        segment = float(n - 1) / fewer
        edges = [int(np.round(segment * i)) for i in range(fewer + 1)]
        assert sampling.midpoint(n, wanted).tolist() == [(edges[i] + edges[i + 1]) // 2 for i in range(fewer)]
        assert sampling.arange(n, wanted).tolist() == np.arange(0, n, n / fewer).astype(int).tolist()[:fewer]
        for name in COUNTING:
            indices = sampling.sample(name, n, wanted)
            assert indices.dtype == torch.int64 and len(indices) == (
                fewer if name in ("midpoint", "arange") else wanted
            )
            assert (indices.diff() >= 0).all() and 0 <= indices[0] and indices[-1] < n


def test_arange_never_gives_one_frame_too_many():
    assert len(np.arange(0, 113, 113 / 100)) == 101  # the source's own slip
    assert all(len(sampling.arange(n, 100)) == 100 for n in range(100, 3000))


@pytest.mark.parametrize("wanted", [1, 3, 8])
@pytest.mark.parametrize("num_frames", [1, 5, 8, 9, 100])
def test_random_rules_stay_in_their_segments_and_reach_both_ends(num_frames, wanted):
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.stack([sampling.sample(name, num_frames, wanted, generator=generator) for _ in range(2000)])
        for name in RANDOM
    }
    edges = np.round((num_frames - 1) / wanted * np.arange(wanted + 1))
    low, high = torch.from_numpy(edges[:-1]).long(), torch.from_numpy(edges[1:]).long()
    assert torch.equal(drawn["random_segment"].amin(0), low) and torch.equal(drawn["random_segment"].amax(0), high)
    edges = [i * num_frames // wanted for i in range(wanted + 1)]
    assert drawn["random_interval"].amin(0).tolist() == edges[:-1]
    assert drawn["random_interval"].amax(0).tolist() == [max(b - 1, a) for a, b in zip(edges[:-1], edges[1:])]


def test_random_rules_draw_evenly_and_repeat_with_the_generator():
    counts = torch.zeros(10)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20000):
        counts[sampling.random_interval(10, 1, 0.0, generator)] += 1
    assert (counts / 2000 - 1).abs().max() < 0.1
    again = [sampling.sample("bt_adapter_train", 500, 8, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*again)
    with pytest.raises(ValueError, match="needs a torch.Generator"):
        sampling.sample("ma_lmm_train", 300, 8)


@pytest.mark.parametrize(
    ("num_frames", "fps", "wanted", "count"),
    [
        (300, 30.0, None, 20),
        (300, 29.97, None, 20),
        (310, 30.0, None, 20),
        (45000, 30.0, None, 768),
        (30, 30.0, None, 4),
        (3, 30.0, None, 2),
        (300, 30.0, 7, 6),
    ],
)
def test_two_per_second(num_frames, fps, wanted, count):
    indices = sampling.sample("qwen2_vl", num_frames, wanted, fps)
    assert len(indices) == count
    assert torch.equal(indices, torch.linspace(0, num_frames - 1, count).round().long())


def test_one_per_second():
    assert sampling.sample("llava_video", 300, fps=30.0).tolist() == list(range(0, 300, 30))
    assert sampling.sample("llava_video", 300, fps=2.5).tolist() == np.linspace(0, 299, 64, dtype=int).tolist()
    assert sampling.sample("llava_video", 100, fps=2.5).tolist() == list(range(0, 100, 2))
    assert sampling.sample("llava_video", 3, fps=30.0).tolist() == [0]
    assert sampling.sample("llava_video", 3, fps=0.2).tolist() == [0, 1, 2]
    assert sampling.sample("llava_video", 300, 4, fps=30.0).tolist() == [0, 99, 199, 299]


def test_names_and_errors():
    assert sampling.names() == [*COUNTING, *RANDOM, "fps2_even", "fps1"]
    everything = sampling.names(aliases=True)
    assert len(set(everything)) == len(everything) > len(sampling.names())
    with pytest.raises(ValueError, match="sampler must be one of .*uniform.*got 'every'"):
        sampling.sample("every", 300)
    for arguments in ((0, 8), (300, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            sampling.sample("uniform", *arguments)
    for name in ("fps1", "fps2_even"):
        with pytest.raises(ValueError, match=f"{name}: fps must be above 0"):
            sampling.sample(name, 300)
    with pytest.raises(ValueError, match="fps2_even: .*at least 2"):
        sampling.sample("fps2_even", 1, fps=30.0)
    for bad in (torch.tensor([300]), torch.tensor([-1])):
        with pytest.raises(ValueError, match=r"indices must be in \[0, 300\)"):
            sampling.sample(lambda *_, bad=bad: bad, 300)
    for bad in (torch.tensor([0.5]), torch.zeros(0, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="integers"):
            sampling.sample(lambda *_, bad=bad: bad, 300)
    assert sampling.sample(lambda n, wanted, fps, generator: [0, wanted, n - 1], 300, 5).tolist() == [0, 5, 299]
