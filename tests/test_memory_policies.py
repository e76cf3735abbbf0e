"""Policies of the field: their rules against lists, and what the properties in test_memory.py do not say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvidx import memory
from pyvidx.memory import create
from tests.harness import randn

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


@pytest.mark.parametrize("call, message", [
    (lambda: create("moviechat", form="mine"), "form must be"),
    (lambda: create("moviechat", fragment=0), "must be at least 1"),
    (lambda: create("moviechat", form="onevision", short=2, merged=2), "must be at least 1"),
    (lambda: memory.moviechat_consolidate(randn(1, 2, 3, 4), 1, compat="mine"), "compat must be"),
])  # fmt: skip
def test_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
