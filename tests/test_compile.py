"""Every op and every model under torch.compile and torch.export, with sizes that change."""

import io

import pytest
import torch
import torch.utils._pytree as pytree
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import detect_fake_mode
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.virtualized import V
from torch.export import Dim
from torch.utils.data import default_collate

from pyvidx import memory, ops, temporal
from pyvidx.backbones import ViT
from pyvidx.models import MALMM, Encoding, TextVideo, VideoEncoder
from pyvidx.ops.memory_merge import new_state
from tests.test_memory import ALL as POLICIES
from tests.test_memory import N
from tests.test_models import randomized
from tests.test_pretraining import SIGLIP
from tests.tools import IDS, NAMES, clips, differ, model

SIZES = ((2, 4), (3, 5), (4, 7), (5, 6))  # B, T
slow = pytest.mark.slow
FEW = ("BTAdapter", "clip_vip", "st_adapter", "MALMM")
BACKENDS = [("aot_eager", name) for name in FEW]
BACKENDS += [pytest.param("aot_eager", name, marks=slow) for name in NAMES if name not in FEW]
BACKENDS += [pytest.param(backend, name, marks=slow) for name in NAMES for backend in ("eager", "inductor")]


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
    for size in SIZES[:2]:
        pixels, found = clips(*size), []
        for run in (subject, compiled):
            out = run(pixels)
            loss = out.tokens.square().mean() + out.pooled.square().mean()
            found.append(torch.autograd.grad(loss, list(subject.temporal.branch.parameters())[:8]))
        assert differ(*found) < 1e-3


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=slow)])
def test_frame_masks(dynamic):
    subject = model("bt_adapter")
    compiled = torch.compile(subject, fullgraph=True, backend="eager", dynamic=dynamic)
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
    policy = memory.create(**POLICIES[name](2))
    push = torch.compile(policy.push, fullgraph=True, backend="eager")
    for B in (2, 3):
        got, want = policy.new(B, N, 8), policy.new(B, N, 8)
        for _ in range(4):
            frame = torch.randn(B, N, 8)
            got, want = push(got, frame), policy.push(want, frame)
        assert got.entries().rows.equal(want.entries().rows) and got.entries().sizes.equal(want.entries().sizes)


def test_texts():
    tower = TextVideo.default().text
    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    for size in ((2, 5), (3, 6), (5, 9)):
        ids = torch.randint(0, 9, size)
        assert differ([compiled(ids)], [tower(ids)]) < 1e-5


def op_inputs(B, T):
    P, C = 6, 16
    return {
        "x": torch.randn(B, T, 1 + P, C),
        "z": torch.randn(B, T, P, C),
        "cls": torch.randn(B, C),
        "c": torch.randn(C),
        "position": torch.randn(1 + P, C),
        "time": torch.randn(9, C),
        "taps": torch.randn(C, 3),
        "tube": torch.stack([torch.randperm(P)[:3] for _ in range(B)]),
        "share": torch.rand(B, T),
        "qkv": torch.randn(B, T, P, 3, 2, 8),
        "rows": torch.randn(B, 5, P, 2 * C),
        "table": torch.randint(0, 5, (B, T, P, 4), dtype=torch.int32),
        "real": torch.arange(T).expand(B, T) < T - 1,
    }


def _stepped(frames):
    state = new_state(frames.shape[0], 2, *frames.shape[2:])
    for _ in range(3):
        ops.memory_merge_(*state[:5], frames[:, 0].detach())
    return state.bank


def _scanned(frames):
    state = new_state(frames.shape[0], 2, *frames.shape[2:], attached_widths=(8,))
    plan = ops.memory_scan_(*state[:5], frames.detach())
    ops.memory_replay_(state.attached[0], frames[..., :8].detach().contiguous(), plan, state.order)
    return state.bank, state.attached[0], plan.table


def _resized(x):
    frames = (x.detach()[..., :3].abs() * 40).to(torch.uint8)
    return ops.resize_normalize(frames, (4, 5), crop=(1, 0, 3, 4))


OPS = {  # of the tensors above by their letters; the first wants a gradient
    "token_gather": ("z tube", ops.token_gather),
    "fusion_input": (
        "x position time c",
        lambda x, position, time, c: ops.fusion_input(x, position, time, c, norm=(c, c)),
    ),
    "gated_fusion": ("x z cls c", lambda x, z, cls, c: ops.gated_fusion(x, z, cls, c, norm=(c, c))),
    "gated_fusion tube": (
        "x z cls c tube",
        lambda x, z, cls, c, tube: ops.gated_fusion(x, z[:, :, :3], cls, c, keep=tube),
    ),
    "output_gate": ("x cls c", lambda x, cls, c: ops.output_gate(x[:, :, 0], cls, c, norm=(c, c))),
    "residual_norm": (
        "x share c",
        lambda x, share, c: ops.residual_norm(x, x + 1, (c, c), factor=share, share=share),
    ),
    "residual_norm class": ("z cls c", lambda z, cls, c: ops.residual_norm(z, z * 2, (c, c), cls=cls)),
    "temporal_attention": ("qkv", ops.temporal_attention),
    "temporal_scale": ("z taps c real", lambda z, taps, c, real: ops.temporal_scale(z, taps, c, mask=real, residual=z)),
    "st_pool": ("z real", lambda z, real: ops.st_pool(z, mask=real)),
    "quick_gelu": ("x", ops.quick_gelu),
    "resize_normalize": ("x", _resized),
    "bank_attention": ("z rows table", lambda z, rows, table: ops.bank_attention(z, rows, table, 2)),
    "bank_attention slots": ("z rows", lambda z, rows: ops.bank_attention(z, rows, None, 2)),
    "memory_merge": ("z", lambda z: ops.memory_merge(z, torch.ones(z.shape[:3]))[0]),
    "memory_merge_": ("z", _stepped),
    "memory_scan_": ("z", _scanned),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=slow)])
def test_ops(name, backend):
    """With a second batch size and number of frames, and gradients where there are any."""
    names, call = OPS[name]
    compiler = CompileCounterWithBackend(backend)
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    for size in SIZES[:3]:
        tensors, found = op_inputs(*size), []
        for run in (compiled, call):
            leaf, *others = (tensors[n].clone() for n in names.split())
            out = [y for y in pytree.tree_leaves(run(leaf.requires_grad_(), *others)) if y.is_floating_point()]
            loss = sum(y.square().sum() for y in out)
            grads = torch.autograd.grad(loss, leaf) if loss.requires_grad else ()
            found.append([*(y.detach() for y in out), *grads])
        assert differ(*found) < 1e-5
    assert compiler.frame_count == 2


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


@torch.no_grad()
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ("stan", *FEW) else slow) for n in temporal.names()])
def test_export_of_another_tower(name):
    """SigLIP's, folded, with another batch size."""
    torch.manual_seed(1)
    subject = randomized(VideoEncoder(ViT(SIGLIP), temporal.create(name, SIGLIP))).fold()
    program = torch.export.export(subject, (clips(),), dynamic_shapes={"pixels": {0: Dim.DYNAMIC}}).module()
    pixels = clips(3)
    got, want = program(pixels), subject(pixels)
    assert differ([got.tokens, got.pooled], [want.tokens, want.pooled]) < 1e-5


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


def inductor_graphs(function, *args):
    """What Inductor makes code of: its graphs after all passes, those that put ops back in place among them."""
    found = []

    def stop(graph, inputs, **_):
        with V.set_fake_mode(detect_fake_mode(inputs)):
            post_grad_passes(graph, True)
        found.append(graph.graph)
        return make_boxed_func(graph.forward)

    torch.compile(function, fullgraph=True, backend=lambda g, inputs: compile_fx(g, inputs, inner_compile=stop))(*args)
    return found


@torch.no_grad()
@pytest.mark.parametrize("name, clones", [("BTAdapter", 3), ("a frame", 0), ("a chunk", 0)])
def test_ops_in_place_cost_no_copies(name, clones):
    """None is left to auto_functionalize, and what is copied to itself is no copy. BT-Adapter's clones are torch's: the
    patches of the pixels, and two small layouts of the last attention."""
    if name == "BTAdapter":
        graphs = inductor_graphs(model(name), clips())
    else:
        subject, t = model("MALMM").eval(), 1 if name == "a frame" else 3
        memories = subject.start(subject.prompt(IDS), length=2)
        memories = subject.push(memories, subject.features(clips(2, 4)))
        graphs = inductor_graphs(subject.push, memories, subject.features(clips(2, t)))
    nodes = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    assert any("pyvidx" in str(node.target) for node in nodes)
    assert not [node for node in nodes if "auto_functionalized" in str(node.target)]
    assert not [node for node in nodes if "copy_" in str(node.target) and node.args[0] is not node.args[1]]
    assert sum("clone" in str(node.target) for node in nodes) <= clones
