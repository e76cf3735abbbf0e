"""Every op and every model under torch.compile and torch.export, with sizes that change."""

import io

import pytest
import torch
import torch.utils._pytree as pytree
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.utils.data import default_collate

from pyvidx import memory, ops
from pyvidx.models import MALMM, Encoding, TextVideo
from pyvidx.ops.memory_merge import new_state
from tests.tools import IDS, NAMES, clips, differ, model

SIZES = ((2, 4), (3, 5), (4, 7), (5, 6))  # B, T
slow = pytest.mark.slow
BACKENDS = [("eager", name) for name in NAMES] + [("aot_eager", name) for name in ("BTAdapter", "MALMM")]
BACKENDS += [pytest.param("aot_eager", name, marks=slow) for name in NAMES if name not in ("BTAdapter", "MALMM")]
BACKENDS += [pytest.param("inductor", name, marks=slow) for name in NAMES]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def whole(subject):
    """A function of pixels that gives all tensors."""
    if isinstance(subject, MALMM):
        return lambda x: [subject(x, IDS[:1].expand(len(x), -1), length=2)]
    return lambda x: [x for x in pytree.tree_leaves(subject(x)) if x is not None]


@pytest.mark.parametrize("backend, name", BACKENDS)
def test_models(backend, name):
    """One graph for the first size, one for any: it does not break, and compiles no more for others."""
    subject, compiler = whole(model(name)), CompileCounterWithBackend(backend)
    compiled = torch.compile(subject, fullgraph=True, backend=compiler)
    with torch.no_grad():
        for size in SIZES:
            pixels = clips(*size)
            assert differ(compiled(pixels), subject(pixels)) < 1e-5
    assert compiler.frame_count == 2


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=slow)])
def test_gradients(backend):
    subject = model("BTAdapter")
    compiled = torch.compile(subject, fullgraph=True, backend=backend)
    for size in SIZES[:3]:
        pixels, found = clips(*size), []
        for run in (subject, compiled):
            out = run(pixels)
            loss = out.tokens.square().mean() + out.pooled.square().mean()
            found.append(torch.autograd.grad(loss, list(subject.branch.parameters())[:8]))
        assert differ(*found) < 1e-3


@pytest.mark.parametrize("options", [None, {"dynamic": True}], ids=["as it is", "dynamic"])
def test_frame_masks(options):
    subject = model("bt_adapter")
    compiled = torch.compile(subject, fullgraph=True, backend="eager", **(options or {}))
    with torch.no_grad():
        for B, T in SIZES[:3]:
            pixels, mask = clips(B, T), torch.arange(T) < torch.randint(1, T + 1, (B, 1))
            got, want = (run(pixels, frame_mask=mask) for run in (compiled, subject))
            assert differ([got.tokens, got.pooled], [want.tokens, want.pooled]) < 1e-5


@torch.no_grad()
def test_streams():
    """A push and an answer at a time: sizes of the batch and the number of the frame change."""
    subject = model("MALMM")
    push = torch.compile(lambda m, x: subject.push(m, subject.features(x)), fullgraph=True, backend="eager")
    ask = torch.compile(subject.ask, fullgraph=True, backend="eager")
    for B in (2, 3):
        a, b = (subject.start(subject.prompt(IDS[:1].repeat(B, 1)), length=2) for _ in range(2))
        for frame in clips(5, B):
            a, b = push(a, frame), subject.push(b, subject.features(frame))
            assert differ([ask(a)], [subject.ask(b)]) < 1e-5


@pytest.mark.parametrize("name", memory.names())
def test_policies(name):
    options = {} if name in ("average", "concat", "tome") else {"capacity": 4}
    policy = memory.create(name, **options, **({"axis": "space"} if name == "tome" else {}))
    push = torch.compile(policy.push, fullgraph=True, backend="eager")
    for B in (2, 3):
        got, want = policy.new(B, 3, 8), policy.new(B, 3, 8)
        for _ in range(6):
            frame = torch.randn(B, 3, 8)
            got, want = push(got, frame), policy.push(want, frame)
        assert got.entries().rows.equal(want.entries().rows) and got.entries().sizes.equal(want.entries().sizes)


def test_texts():
    tower = TextVideo.default().text
    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    for size in ((2, 5), (3, 6), (5, 9)):
        ids = torch.randint(0, 9, size)
        assert differ([compiled(ids)], [tower(ids)]) < 1e-5


def op_inputs(B, T):
    """Of every public op: the call, and what of its inputs wants a gradient."""
    P, C, H = 6, 16, 2
    x, z, cls = torch.randn(B, T, 1 + P, C), torch.randn(B, T, P, C), torch.randn(B, C)
    c, norm = torch.randn(C), (torch.rand(C), torch.randn(C), 1e-5)
    tube = torch.stack([torch.randperm(P)[:3] for _ in range(B)])
    share, factor = torch.rand(B, T), torch.rand(B, T)
    q, rows = torch.randn(B, T, 3, C), torch.randn(B, 5, P, 2 * C)
    table = torch.randint(0, 5, (B, T, P, 4), dtype=torch.int32)
    real = torch.arange(T).expand(B, T) < T - 1
    return {
        "token_gather": (lambda z: ops.token_gather(z, tube), z),
        "fusion_input": (lambda x: ops.fusion_input(x, x.new_ones(1 + P, C), torch.ones(9, C), c, norm=norm), x),
        "gated_fusion": (lambda x: ops.gated_fusion(x, z, cls, c, norm=norm), x),
        "gated_fusion tube": (lambda x: ops.gated_fusion(x, z[:, :, :3], cls, c, keep=tube), x),
        "output_gate": (lambda x: ops.output_gate(x[:, :, 0], cls, c, norm=norm), x),
        "residual_norm": (lambda x: ops.residual_norm(x, x + 1, norm, bias=c, factor=factor, share=share), x),
        "residual_norm class": (lambda z: ops.residual_norm(z, z * 2, norm, constant=c, cls=cls), z),
        "temporal_attention": (lambda x: ops.temporal_attention(x.expand(3, H, *x.shape).permute(2, 3, 4, 0, 1, 5)), x),
        "temporal_scale": (lambda x: ops.temporal_scale(x, torch.ones(C, 3), c, mask=real, residual=x), x),
        "st_pool": (lambda z: ops.st_pool(z, mask=real), z),
        "quick_gelu": (lambda x: ops.quick_gelu(x, c), x),
        "bank_attention": (lambda q: ops.bank_attention(q, rows, table, H), q),
        "bank_attention slots": (lambda q: ops.bank_attention(q, rows, None, H), q),
        "memory_merge": (lambda z: ops.memory_merge(z, torch.ones(z.shape[:3]))[0], z),
        "memory_merge_": (lambda z: _stepped(z), z.clone()),
        "memory_scan_": (lambda z: _scanned(z), z.clone()),
    }


def _stepped(frames):
    state = new_state(frames.shape[0], 2, *frames.shape[2:])
    for t in range(4):
        ops.memory_merge_(*state[:5], frames[:, t].detach())
    return state.bank


def _scanned(frames):
    state = new_state(frames.shape[0], 2, *frames.shape[2:], attached_widths=(8,))
    plan = ops.memory_scan_(*state[:5], frames.detach())
    kept = frames[..., :8].detach().contiguous()
    ops.memory_replay_(state.attached[0], kept, plan, state.order)
    return state.bank, state.attached[0], plan.table


@pytest.mark.parametrize("name", op_inputs(2, 4))
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=slow)])
def test_ops(name, backend):
    """With a second batch size and number of frames, and gradients where there are any."""
    compiler = CompileCounterWithBackend(backend)
    for size in SIZES[:3]:
        call, x = op_inputs(*size)[name]
        found = []
        for run in (call, torch.compile(call, fullgraph=True, backend=compiler, dynamic=True)):
            leaf = x.clone().requires_grad_()
            out = [y for y in pytree.tree_leaves(run(leaf)) if y.is_floating_point()]
            loss = sum(y.square().sum() for y in out)
            grads = torch.autograd.grad(loss, leaf) if loss.requires_grad else ()
            found.append([*(y.detach() for y in out), *grads])
        assert differ(found[1], found[0]) < 1e-5
        torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_export(name):
    """Saved, loaded, and called with another batch size: the same numbers, and an Encoding as before."""
    subject = model(name)
    args, batch = (clips(),), {"pixels": {0: Dim.DYNAMIC}}
    if name == "MALMM":
        args, batch = (*args, IDS), batch | {"text_ids": {0: Dim.DYNAMIC}}
    program, file = torch.export.export(subject, args, dynamic_shapes=batch), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    args = [torch.cat([x, x])[:3] for x in args]
    got, want = loaded(*args), subject(*args)
    assert type(got) is type(want)
    assert differ(*(pytree.tree_leaves([y]) if name == "MALMM" else [y.tokens, y.pooled] for y in (got, want))) < 1e-5


def test_encodings_go_through_tools():
    accelerate = pytest.importorskip("accelerate.utils.operations")
    one = Encoding(torch.ones(2, 3, dtype=torch.bfloat16), None, torch.ones(2))
    wide = accelerate.convert_outputs_to_fp32(lambda: one)()
    assert type(wide) is Encoding and wide.tokens.dtype == torch.float32 and wide.pooled is None
    both = default_collate([one, one])
    assert type(both) is Encoding and both.tokens.shape == (2, 2, 3) and both.pooled is None
    twice = pytree.tree_map(lambda x: x * 2, one)
    assert type(twice) is Encoding and twice.times.equal(one.times * 2)
    assert dict(one).keys() == {"tokens", "times"} and "pooled" not in one and len(one) == 2
    with pytest.raises(KeyError):
        one["pooled"]
    with pytest.raises(ValueError, match="unknown"):
        Encoding({"rows": one.times})
