"""What tests/test_no_sync.py runs: fake tensors that say they are on a GPU, under a mode that refuses to read them."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyvidx import graphs, memory, temporal
from pyvidx.backbones.text import TextConfig, TextTower
from pyvidx.backbones.vit import EVA_G, ViT, ViTConfig
from pyvidx.layers import plain
from pyvidx.memory.qformer import QFormerConfig
from pyvidx.models import MALMM, BTAdapter, BTAdapterConfig, MALMMConfig, VideoEncoder
from pyvidx.models.pretraining import Pretraining
from pyvidx.ops.memory_merge import in_order, new_state
from tests.op_calls import op_calls

VISION = ViTConfig(image_size=12, patch_size=4, width=16, heads=2, layers=5, mlp_width=24, embed_dim=6)
CONFIG = BTAdapterConfig(VISION, depth=3, time_length=8)
SMALL = MALMMConfig(
    replace(EVA_G, image_size=12, patch_size=4, width=48, heads=2, layers=1),
    QFormerConfig(width=16, heads=2, layers=4, mlp_width=32, encoder_width=48, vocab=30),
    llm_width=8,
    time_length=30,
)
B, T, M = 2, 4, 3
P, C = 1 + SMALL.vision.patches, SMALL.vision.width

# Results whose values the host needs, or whose sizes depend on values.
READS = (
    "_local_scalar_dense", "is_nonzero", "item", "equal", "allclose", "nonzero", "nonzero_static", "argwhere",
    "masked_select", "unique_consecutive", "unique_dim", "_unique", "_unique2", "bincount", "repeat_interleave",
)  # fmt: skip


class NoTraffic(TorchDispatchMode):
    """Fails where a value or a tensor goes from the GPU to the host, or (a stream's graph would not know) back."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = any(x.is_cuda for x in tensors)
        if on_gpu and name in READS and not (name == "repeat_interleave" and kwargs.get("output_size") is not None):
            raise AssertionError(f"{func} reads what a CUDA tensor holds")
        if on_gpu and name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{func} by a mask has a size that depends on values"
        out = func(*args, **kwargs)
        devices = {x.device.type for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        if name in ("_to_copy", "copy_", "_copy_from", "lift_fresh", "pin_memory", "_pin_memory"):
            devices |= {x.device.type for x in tensors}
            assert len(devices) <= 1, f"{func} copies between {' and '.join(sorted(devices))}"
        return out


@contextmanager
def gpu():
    """New tensors are fake ones on a GPU, and as plain as any other: the fast paths, which read weights, take them."""
    with plain_fakes(), FakeTensorMode(), torch.device("cuda:0"):
        yield


@contextmanager
def plain_fakes():
    kinds = (plain.TENSORS, plain.BIASES)
    for known in kinds:
        known.add(FakeTensor)
    try:
        yield
    finally:
        for known in kinds:
            known.discard(FakeTensor)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        lambda x: torch.equal(x, x),
        lambda x: x.cpu(),
        lambda x: x.add_(x.to("cpu")),
        lambda x: x + torch.tensor([1.0, 2.0], device="cpu").to(x.device),
        lambda x: torch.nonzero(x),
        lambda x: x[x > 0],
        lambda x: torch.masked_select(x, x > 0),
        lambda x: torch.unique(x),
        lambda x: x.repeat_interleave((x > 0).long().flatten()),
    ],
)
def test_reading_is_caught(read):
    with gpu():
        x = torch.randn(3, 2)
        # RuntimeError: a CPU build of torch refuses some of these by itself.
        with NoTraffic(), pytest.raises((AssertionError, RuntimeError)):
            read(x)


@pytest.mark.parametrize("name", op_calls("cpu"))
def test_ops(name):
    with gpu():
        call = op_calls("cuda:0", torch.float16)[name]
        with NoTraffic():
            call.run(*call.inputs)


# ---- memories ----


MEMORIES = [{"name": name} for name in memory.names() if name not in ("fluxmem", "moviechat", "streamforest")] + [
    {"name": "merge", "capacity": M},
    {"name": "streamforest", "now": 6, "short": 4, "tokens": 2, "window": 1, "split": 1, "quota": 4, "heads": 2},
    {"name": "flash_vstream", "capacity": M, "clusters": 2},
    {"name": "flash_vstream", "capacity": M, "clusters": 2, "compat": "official"},
    {"name": "moviechat", "fragment": 2, "merged": 1},
    {"name": "moviechat", "form": "onevision", "short": 3, "merged": 1},
    {"name": "fluxmem", "short": 1, "medium": 1, "grid": (2, 3)},
    {"name": "dtd", "threshold": None, "ratio": 0.5},
    {"name": "merge", "capacity": M, "unit": "synchronized"},
    {"name": "merge", "capacity": M, "hard": True},
    {"name": "fifo", "capacity": M, "anchors": 1},
    {"name": "tome", "capacity": M},
    {"name": "uniform", "capacity": M},
]


@pytest.mark.parametrize("options", MEMORIES, ids=lambda o: "_".join(map(str, o.values())))
def test_memory_policies(options):
    """Push to an empty and a full bank, all videos and some of them, one frame and several; compress; read."""
    with gpu():
        policy = memory.create(**options)
        widths = [] if policy.name == "streamforest" else [8]
        bank = policy.new(B, 6, 16, device="cuda:0", attached=widths)
        active, seconds = torch.ones(B, dtype=torch.bool), torch.zeros(B)
        with NoTraffic():
            for step in range(M + 2):
                frame, rows = torch.randn(B, 6, 16), [torch.randn(B, 6, width) for width in widths]
                bank = policy.push(bank, frame, seconds, None if step % 2 else active, rows)
            bank = policy.compress(policy.append(bank, frame, attached=rows))
            clip, rows = torch.randn(B, 2, 6, 16), [torch.randn(B, 2, 6, width) for width in widths]
            bank = policy.flush(policy.extend(bank, clip, attached=rows))
            bank.entries()
            bank.slots()


@pytest.mark.parametrize(
    "call",
    [
        lambda x, n: memory.evs(x, 0.5, n),
        lambda x, n: memory.vidcom2(x, 0.5, n),
        lambda x, n: memory.vidcom2(x, 0.5, n, form="authors"),
        lambda x, n: memory.keyframes(x, 2, lengths=n),
        lambda x, n: memory.ordered_kmeans(x, 2),
        lambda x, n: memory.retrieve(x, x, x[..., 0, 0], 2),
        lambda x, n: memory.moviechat_consolidate(x, 2, n),
        lambda x, n: memory.create("merge", capacity=2).shrink(x, lengths=n),
    ],
)
def test_functions_of_a_clip(call):
    with gpu():
        clip, lengths = torch.randn(B, 5, 6, 16), torch.ones(B, dtype=torch.int64)
        with NoTraffic():
            call(clip, None)
            call(clip, lengths)


@pytest.mark.parametrize("name, capacity, options", [("merge", M, {}), ("keyframes", M, {}), ("evs", None, {"q": 0.5})])
@pytest.mark.parametrize("lengths", [(5, 5), (5, 2)])
def test_what_hosts_keep(name, capacity, options, lengths):
    """Encoded chunks to features for the language model; where the placeholders are was asked for before."""
    pytest.importorskip("transformers", minversion="5.20.2", reason="pip install 'pyvidx[hosts]'")
    from pyvidx.hosts.compress import kept
    from pyvidx.hosts.language import Place, host_of
    from pyvidx.hosts.language.kept import method
    from tests.torchvision_shim import mend_torchvision

    mend_torchvision()
    from tests.hosts.tiny_llava_next_video import ENTRY

    with gpu(), torch.no_grad():
        host, how = host_of(ENTRY.model()), method(name, capacity, options)
        places = [Place(i, i, 0, 4 * T, T, 4, (2, 2)) for i, T in enumerate(lengths)]
        inputs = {"pixel_values_videos": [torch.randn(T, 3, 32, 32) for T in lengths]}
        times = [torch.arange(T).double() for T in lengths]
        with NoTraffic():
            slots = kept(host, inputs, places, how, times, chunk=2)
            host.encoded(inputs, places, slots)


# ---- models ----


@pytest.mark.parametrize("compat, variant", [("paper", "mma"), ("official", "mma"), ("official", "llava")])
def test_bt_adapter_forward(compat, variant):
    with gpu(), torch.no_grad():
        model = BTAdapter(CONFIG, compat=compat, variant=variant).eval()
        with NoTraffic():
            for encoder in (model, model.fold()):
                encoder(torch.randn(B, T, 3, 12, 12))
                encoder(torch.randn(B, T, 3, 12, 12), outputs=("pooled",))
                encoder(torch.randn(B, T, 3, 12, 12), outputs=("tokens",))


@pytest.mark.parametrize("name", temporal.names())
def test_temporal_modules(name):
    """Whole and folded, and a training step."""
    with gpu():
        model = VideoEncoder(ViT(VISION), temporal.create(name, VISION)).requires_grad_(True)
        pixels = torch.randn(B, T, 3, 12, 12)
        with NoTraffic():
            out = model(pixels)
            (out.tokens.sum() + out.pooled.sum()).backward()
            with torch.no_grad():
                model.eval()(pixels)
        folded = model.fold()
        with NoTraffic():
            folded(pixels, outputs=("pooled",))


def test_bt_adapter_training_step():
    with gpu():
        model = BTAdapter(CONFIG)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        with NoTraffic():
            with torch.autocast("cuda", torch.bfloat16):
                out = model(torch.randn(B, T, 3, 12, 12))
            (out.tokens.float().sum() + out.pooled.float().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()


def test_pretraining_step():
    text = TextConfig(width=16, heads=2, layers=2, mlp_width=24, vocab=30, context=7, embed_dim=6)
    with gpu():
        model = Pretraining(BTAdapter(CONFIG), TextTower(text)).train()
        ids = torch.zeros(B, 7, dtype=torch.int64)
        with NoTraffic():
            model(torch.randn(B, T, 3, 12, 12), ids).total.backward()


def test_malmm_stream():
    """Frames one by one into memories that are full, chunks, and an answer."""
    with gpu(), torch.no_grad():
        model = MALMM(SMALL).eval()
        ids = torch.zeros(B, 5, dtype=torch.int64)
        with NoTraffic():
            memories = model.start(model.prompt(ids), length=M)
            for _ in range(M + 2):
                memories = model.push(memories, model.features(torch.randn(B, 3, 12, 12)))
            memories = model.push(memories, torch.randn(B, 3, P, C))
            model.project(model.ask(memories))


@pytest.mark.parametrize("query", [True, False])
def test_malmm_training_step(query):
    with gpu():
        model = MALMM(SMALL)
        ids = torch.zeros(B, 5, dtype=torch.int64)
        with NoTraffic():
            model(torch.randn(B, T + 2, 3, 12, 12), ids, length=M, query=query).sum().backward()


# ---- what graphs record ----


@pytest.mark.parametrize("query", [True, False])
def test_a_push_can_be_recorded(query):
    """No traffic, and what it changes lies where it lay."""
    with gpu(), torch.no_grad():
        model = MALMM(SMALL).eval()
        prompt = model.prompt(torch.zeros(B, 5, dtype=torch.int64))
        before = model.start(prompt, length=M, query=query)._replace(seen=M + 1)
        with NoTraffic():
            after = model._push(before, torch.randn(B, 1, P, C))
    kept = (before.visual, before.query)
    assert all(a is b for a, b in zip(tree_leaves(kept), tree_leaves((after.visual, after.query)), strict=True))


@pytest.mark.parametrize("name", temporal.names())
def test_padded_clips_can_be_recorded(name):
    with gpu(), torch.no_grad():
        model = VideoEncoder(ViT(VISION), temporal.create(name, VISION)).eval()
        clips = graphs.Clips(model, (T,))
        pixels = torch.randn(B, T - 1, 3, 12, 12)
        with NoTraffic():
            clips.encode(*graphs.padded(pixels, T))


# ---- what does read back, and why ----


def _frame_mask():
    BTAdapter(CONFIG).eval()(torch.randn(B, T, 3, 12, 12), frame_mask=torch.ones(B, T, dtype=torch.bool))


def _patch_mask():
    mask = torch.zeros(B, CONFIG.vision.patches, dtype=torch.bool)
    BTAdapter(CONFIG).eval()(torch.randn(B, T, 3, 12, 12), mask=mask, outputs=("pooled",))


def _text_mask():
    MALMM(SMALL).prompt(torch.zeros(B, 5, dtype=torch.int64), torch.ones(B, 5, dtype=torch.int64))


READ_BACK = {  # what it is: why it may; a call of it
    "frames that are real": (
        "a batch without padding takes the faster path, and the padding of others no work",
        _frame_mask,
    ),
    "patches left out": ("their number is a size; pretraining, which knows it, says so and does not wait", _patch_mask),
    "padding of an instruction": ("once a stream; without padding no attention takes a mask", _text_mask),
    "the length of the longest memory": (
        "it is a size; who knows it says so",
        lambda: in_order(new_state(B, M, P, C, device="cuda:0")),
    ),
}


@pytest.mark.parametrize("name", READ_BACK)
def test_what_reads_back_is_named(name):
    """The list is true: these do, and tests above show that nothing else does."""
    why, call = READ_BACK[name]
    with gpu(), torch.no_grad(), NoTraffic(), pytest.raises(AssertionError, match="reads what|depends on values"):
        call()
