"""What no call may do, through whatever door it comes: leave a tensor, end the process, change what autograd saved."""

import pytest
import torch

from pyvidx import ops
from pyvidx.ops._library import TELLS_NO_TYPES
from pyvidx.ops.memory_merge import new_state
from pyvidx.ops.token_gather import source_table
from tests.harness import needs_kernels, randn

raw = torch.ops.pyvidx
# Below the public functions, torch tells what the library throws: from 2.15 on as another type.
REFUSED = (ValueError, RuntimeError) if TELLS_NO_TYPES else ValueError
INDICES = [5000, 500_000_000, -1, -(2**31), 2**62]


def gather_inputs(index):
    return randn(1, 2, 5, 8, sliced=False), torch.tensor([[0, index, 2]])


def exported(function, *args):
    class Program(torch.nn.Module):
        def forward(self, *inputs):
            return function(*inputs)

    return torch.export.export(Program(), args, strict=False).module()


DOORS = {
    "public": lambda function, good: function,
    "compiled": lambda function, good: torch.compile(function, backend="aot_eager", fullgraph=True),
    "exported": lambda function, good: exported(function, *good),
}


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("door", DOORS)
def test_token_gather_stays_in_x(door, index):
    run = DOORS[door](lambda x, keep: ops.token_gather(x, keep), gather_inputs(1))
    with pytest.raises(IndexError, match=r"token_gather: keep must be in \[0, 5\)"):
        run(*gather_inputs(index))


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("door", DOORS)
def test_fusion_input_stays_in_x(door, index):
    def inputs(index):
        x, keep = gather_inputs(index)
        return torch.cat([x, x[:, :, :1]], 2), randn(6, 8), randn(2, 8), randn(8), keep

    run = DOORS[door](lambda x, p, t, s, keep: ops.fusion_input(x, p, t, s, keep=keep)[0], inputs(1))
    with pytest.raises(IndexError, match=r"gated_fusion: keep must be in \[0, 5\)"):
        run(*inputs(index))


@pytest.mark.parametrize("slot", [4, 5000, 500_000_000, 2**31 - 1])
@pytest.mark.parametrize("door", DOORS)
def test_bank_attention_stays_in_its_rows(door, slot):
    def inputs(slot):
        table = torch.zeros(1, 1, 3, 2, dtype=torch.int32)
        table[0, 0, 1, 1] = slot
        return randn(1, 1, 2, 16), randn(1, 4, 3, 32), table

    run = DOORS[door](lambda q, rows, table: ops.bank_attention(q, rows, table, 2), inputs(1))
    with pytest.raises(IndexError, match=f"table must name slots below 4, got {slot}"):
        run(*inputs(slot))


def fusion_gradients(keep, source, B=1, T=2, P=5, C=8):
    S, K = T, keep.shape[-1]
    args = (randn(B, S, K, C), randn(B, C), *(None,) * 6, keep, source, None, None, T, P)
    return raw.gated_fusion_backward(*args, 1.0, False, False, False, True, True, False)


@needs_kernels
@pytest.mark.parametrize("index", INDICES)
def test_gated_fusion_backward_writes_in_grad_x_alone(index):
    good = torch.tensor([[0, 1, 2]])
    assert fusion_gradients(good, source_table(good, 1, 2, 5))[0].shape == (1, 2, 6, 8)
    with pytest.raises(IndexError, match=r"keep must be in \[0, 5\)"):
        fusion_gradients(torch.tensor([[0, index, 2]]), source_table(good, 1, 2, 5))


@needs_kernels
def test_gated_fusion_backward_asks_for_the_inverse():
    """A token named twice would be written by two threads; one that no row writes would keep what lay in memory."""
    keep = torch.tensor([[0, 1, 2]])
    source = source_table(keep, 1, 2, 5)
    for wrong in (source.clone().fill_(0), source.flip(2), source + 1, source.clone().fill_(5000)):
        with pytest.raises(IndexError, match="source must be"):
            fusion_gradients(keep, wrong)
    with pytest.raises(IndexError, match="source must be"):
        fusion_gradients(torch.tensor([[1, 1, 2]]), source_table(torch.tensor([[1, 1, 2]]), 1, 2, 5))


def test_backward_indices_stay_in_the_gradient():
    with pytest.raises(IndexError, match="source must be below 6, got 6"):
        raw.token_gather_backward(randn(1, 2, 3, 8), torch.full((1, 2, 5), 6))
    for k in (-1, 3, 5000):
        with pytest.raises(IndexError, match=r"index must be in \[0, 3\)"):
            index = torch.full((1, 2), k, dtype=torch.int32)
            raw.memory_merge_backward(randn(1, 3, 2, 8), torch.ones(1, 4, 2), index, True)


@needs_kernels
def test_nothing_divides_by_zero():
    """SIGFPE before: no patches, no frames, no rows that were kept."""
    with pytest.raises(IndexError, match=r"in \[0, 0\)"):
        raw.token_gather(randn(1, 2, 0, 8), torch.zeros(1, 2, 3, dtype=torch.int64), None, None)
    with pytest.raises(IndexError, match="below 0"):
        raw.token_gather_backward(randn(1, 2, 0, 8), torch.zeros(1, 2, 3, dtype=torch.int64))
    with pytest.raises(REFUSED, match="T, P > 0"):
        raw.st_pool(randn(1, 0, 3, 8), None)
    assert raw.st_pool_backward(randn(1, 3, 8), randn(1, 0, 8), None).shape == (1, 0, 3, 8)
    with pytest.raises(REFUSED, match="heads at least 1"):
        raw.bank_attention(randn(1, 1, 2, 16), randn(1, 4, 3, 32), None, None, None, 0, 1.0)
    with pytest.raises(REFUSED, match="t >= 1"):
        rows, order = randn(1, 4, 3, 8), torch.arange(4, dtype=torch.int32).expand(1, 3, 4)
        plan = [torch.zeros(1, 0, 3, n, dtype=torch.int32) for n in (4, 2, 2)]
        raw.memory_replay_(rows, rows[:, :0], *plan, order, True, rows.clone())


def test_tables_without_a_key_are_not_absent_tables():
    y, lse = raw.bank_attention(
        randn(1, 1, 2, 16), randn(1, 4, 3, 32), torch.zeros(1, 1, 3, 0, dtype=torch.int32), None, None, 2, 1.0
    )
    assert not y.any() and not lse.any()


RAW_CASES = {
    "x": (lambda x, k, p, t: (x.int(), k, p, t), "x .*must be float32, float16, bfloat16 or float64"),
    "dims": (lambda x, k, p, t: (x[0], k, p, t), r"x \[B, T, P, C\] must be"),
    "keep": (lambda x, k, p, t: (x, k.int(), p, t), "token_gather: keep .* must be .* int64 on cpu, got .* int32"),
    "videos": (lambda x, k, p, t: (x, k.expand(3, -1), p, t), "token_gather: keep"),
    "position": (
        lambda x, k, p, t: (x, k, p[1:], t),
        r"position \[P, C\] must be \(5, 8\) float32 on cpu, got \(4, 8\)",
    ),
    "dtype": (lambda x, k, p, t: (x, k, p.double(), t), "float32 on cpu, got .* float64"),
    "time": (lambda x, k, p, t: (x, k, p, t[:1]), r"time must be \[T or more, C\]"),
    "device": (lambda x, k, p, t: (x, k.to("meta"), p, t), "one device"),
}


@needs_kernels
@pytest.mark.parametrize("case", RAW_CASES)
def test_raw_calls_are_checked(case):
    change, message = RAW_CASES[case]
    x, keep = gather_inputs(1)
    with pytest.raises(REFUSED, match=message):
        raw.token_gather(*change(x, keep, randn(5, 8), randn(2, 8)))


# --- memory banks under autocast


def memory_calls(frame_dtype):
    frame = randn(1, 3, 8).to(frame_dtype)
    plan = [torch.full((1, 2, 3, n), -1, dtype=torch.int32) for n in (4, 2, 2)]
    rows, order = torch.zeros(1, 4, 3, 8), torch.arange(4, dtype=torch.int32).expand(1, 3, 4)
    frames, active = frame[:, None].expand(1, 2, 3, 8), None
    state = lambda: new_state(1, 3, 3, 8)[:5]  # noqa: E731
    return {
        "memory_merge_": (
            lambda: ops.memory_merge_(*state(), frame),
            lambda: raw.memory_merge_(*state(), frame, [], [], True, active),
        ),
        "memory_scan_": (
            lambda: ops.memory_scan_(*state(), frames),
            lambda: raw.memory_scan_(*state(), frames, True, active),
        ),
        "memory_replay_": (
            lambda: ops.memory_replay_(rows, frames, ops.MergePlan(*plan), order),
            lambda: raw.memory_replay_(rows, frames, *plan, order, True, torch.zeros(1, 8, 3, 8)),
        ),
    }


@needs_kernels
@pytest.mark.parametrize("name", ["memory_merge_", "memory_scan_", "memory_replay_"])
def test_autocast_does_not_mix_dtypes(name):
    """But for a frame of 16 bits, which memory_merge_ takes."""
    for call in memory_calls(torch.float32)[name]:
        with torch.autocast("cpu", torch.bfloat16):
            call()
    public, direct = memory_calls(torch.float64 if name == "memory_merge_" else torch.bfloat16)[name]
    for call, error in ((public, ValueError), (direct, REFUSED)):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(error, match=f"{name}: frames? .*must "):
            call()


# --- what is written


def writing_calls():
    """op -> (call, the tensors it writes)"""
    x, keep = gather_inputs(1)
    tokens, row, weight, gate = randn(1, 2, 6, 8), randn(1, 8), torch.ones(8), torch.zeros(8)
    like = torch.zeros_like
    state = new_state(1, 3, 5, 8, attached_widths=[4])
    q, qkv = randn(1, 1, 2, 16), randn(1, 2, 3, 3, 2, 8)
    rows, plan = torch.zeros(1, 4, 5, 8), ops.memory_scan_(*new_state(1, 3, 5, 8)[:5], x)
    order = torch.arange(4, dtype=torch.int32).repeat(1, 5, 1)
    frames, pixels = torch.zeros(1, 6, 7, 3, dtype=torch.uint8), torch.zeros(1, 3, 4, 5)
    gathered, fused, pooled = (
        torch.zeros(1, 2, 3, 8),
        torch.zeros(1, 2, 5, 8),
        (torch.zeros(1, 5, 8), torch.zeros(1, 2, 8)),
    )
    return {
        "token_gather": (lambda: ops.token_gather(x, keep, out=gathered), [gathered]),
        "st_pool": (lambda: ops.st_pool(x, out=pooled), pooled),
        "temporal_attention": (lambda: ops.temporal_attention(qkv, out=qkv_out), [qkv_out := torch.zeros(1, 2, 3, 16)]),
        "temporal_scale": (lambda: ops.temporal_scale(x, torch.ones(8, 3), out=scaled), [scaled := like(x)]),
        "resize_normalize": (lambda: ops.resize_normalize(frames, (4, 5), out=pixels), [pixels]),
        "residual_norm": (
            lambda: ops.residual_norm(x, x, (weight, gate), out=(summed, normed)),
            [summed := like(x), normed := like(x)],
        ),
        "fusion_input": (
            lambda: ops.fusion_input(tokens, randn(6, 8), randn(2, 8), row[0], out=(fused, out_cls)),
            [fused, out_cls := like(row)],
        ),
        "gated_fusion": (
            lambda: ops.gated_fusion(tokens, mixed, cls, gate, out=(mixed, cls)),
            [mixed := randn(1, 2, 5, 8), cls := randn(1, 8)],
        ),
        "output_gate": (
            lambda: ops.output_gate(tokens[:, :, 0], row, gate, out=gated),
            [gated := torch.zeros(1, 2, 8)],
        ),
        "bank_attention": (lambda: ops.bank_attention(q, randn(1, 4, 5, 32), None, 2, out=read), [read := like(q)]),
        "memory_merge_": (
            lambda: ops.memory_merge_(*state[:5], x[:, 0], state.attached, [randn(1, 5, 4)]),
            [*state[:5], *state.attached],
        ),
        "memory_scan_": (lambda: ops.memory_scan_(*scanned[:5], x), [*(scanned := new_state(1, 3, 5, 8))[:5]]),
        "memory_replay_": (
            lambda: ops.memory_replay_(rows, x, plan, order, out=extended),
            [rows, extended := torch.zeros(1, 8, 5, 8)],
        ),
    }


@pytest.mark.parametrize("name", writing_calls())
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_versions_count_up(name, mode):
    call, written = writing_calls()[name]
    before = [t._version for t in written]
    with mode():
        call()
    assert all(t._version > version for t, version in zip(written, before))


@pytest.mark.parametrize("compiled", [False, True])
def test_autograd_notices(compiled):
    weight, x = torch.ones(8, requires_grad=True), randn(1, 2, 3, 8, sliced=False)
    loss, normed, norm = (weight * x).sum(), torch.zeros_like(x), (torch.ones(8), torch.zeros(8))  # the loss keeps x
    call = lambda: ops.residual_norm(x, x, norm, out=(x, normed))  # noqa: E731
    with torch.no_grad():
        (torch.compile(call, backend="aot_eager") if compiled else call)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["memory_merge_", "memory_scan_"])
def test_state_is_not_saved_and_changed(name):
    state, frame = new_state(1, 3, 5, 8), randn(1, 5, 8)
    weight = torch.ones((), requires_grad=True)
    loss = (weight * state.bank).sum()
    with torch.no_grad():
        getattr(ops, name)(*state[:5], frame if name == "memory_merge_" else frame[:, None])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_out_of_an_inference_tensor():
    with torch.inference_mode():
        x, y = randn(1, 2, 3, 8, sliced=False), torch.zeros(1, 2, 3, 8)
        assert ops.residual_norm(x, x, (torch.ones(8), torch.zeros(8)), out=(x, y))[0] is x


@needs_kernels
def test_out_must_not_share_memory():
    """Refused where the kernel would read what it has written."""
    room = torch.randn(4, 2, 5, 8)
    x, keep = room[:1], torch.tensor([[0, 1, 2, 3, 4]])
    with pytest.raises(ValueError, match="out is written and must not share memory with x"):
        ops.token_gather(x, keep, out=x)
    with pytest.raises(ValueError, match="out is written and must not share memory with x"):
        ops.temporal_scale(x, torch.ones(8, 3), out=room.flatten()[40 : 40 + x.numel()].view(x.shape))
    with pytest.raises(ValueError, match="no two of its elements"):
        ops.temporal_scale(x, torch.ones(8, 3), out=torch.zeros(8).expand(x.shape))
    with pytest.raises(ValueError, match="out is written and must not share memory with normed|with out"):
        ops.residual_norm(x, x.clone(), (torch.ones(8), torch.zeros(8)), out=(room[1:2], room[1:2]))
    with pytest.raises(ValueError, match="unless it is the same tensor"):
        flat = torch.randn(100)
        x, ahead, normed = flat[:90].view(1, 1, 9, 10), flat[10:].view(1, 1, 9, 10), torch.zeros(1, 1, 9, 10)
        ops.residual_norm(x, torch.zeros_like(x), (torch.ones(10), torch.zeros(10)), out=(ahead, normed))
    state = new_state(1, 3, 5, 8)
    with pytest.raises(ValueError, match="must not share memory with frame"):
        ops.memory_merge_(*state[:5], state.bank[:, 0])
    with pytest.raises(ValueError, match="must not share memory with sizes"):
        ops.memory_merge_(state.bank, state.sizes, state.sizes, *state[3:5])


def test_out_may_lie_between_what_is_read():
    """Slices of one tensor have memory of their own; and one tensor may be both where each row is read before it is
    written."""
    tokens = torch.randn(2, 4, 6, 8)
    want = ops.temporal_scale(tokens[:, :, 2:4], torch.ones(8, 3))
    ops.temporal_scale(tokens[:, :, 2:4], torch.ones(8, 3), out=tokens[:, :, :2])
    assert torch.equal(tokens[:, :, :2], want)
    x, y, norm = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), (torch.ones(8), torch.zeros(8))
    want = ops.residual_norm(x, y, norm)
    got = ops.residual_norm(x, y, norm, out=(x, y))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    z, cls, gate = torch.randn(1, 2, 5, 8), torch.randn(1, 8), torch.randn(8)
    want = ops.gated_fusion(torch.ones(1, 2, 6, 8), z, cls, gate)
    got = ops.gated_fusion(torch.ones(1, 2, 6, 8), z, cls, gate, out=(z, cls))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    packed = torch.randn(1, 2, 6, 8)
    want = ops.gated_fusion(torch.ones(1, 2, 6, 8), packed, None, gate)
    got = ops.gated_fusion(torch.ones(1, 2, 6, 8), packed, None, gate, out=(packed[:, :, 1:], packed[:, 0, 0]))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_out_of_memory_is_torchs():
    keep = torch.zeros(1, 1, dtype=torch.int64).expand(1, 2**44)
    with pytest.raises(RuntimeError, match="can't allocate memory|is it out of memory"):
        ops.token_gather(randn(1, 2, 5, 8), keep)
