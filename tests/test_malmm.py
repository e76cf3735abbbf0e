"""MA-LMM's fast paths against the reference in float64, and what the golden vectors do not reach."""

import dataclasses

import pytest
import torch
from torch import nn

from pyvidx.models.malmm import MALMM
from pyvidx.models.malmm_config import MALMMConfig
from pyvidx.reference.malmm import Bank, ReferenceMALMM
from pyvidx.weights.malmm import export_malmm
from pyvidx.weights.malmm_keys import rename

M = 3


def pair(**changes):
    """A random model in float64, and the reference with its weights."""
    config = MALMMConfig.tiny(**changes)
    model, reference = MALMM(config).double().eval(), ReferenceMALMM(config).double().eval()
    for name, p in model.named_parameters():
        nn.init.normal_(p, std=0.5 if "norm" in name else 0.3)
    for block in model.vision.blocks.values():  # k has no bias in LAVIS
        block.qkv.bias.data.chunk(3)[1].zero_()
    reference.load_state_dict(export_malmm(model, "lavis"))
    reference.visual_encoder.requires_grad_(False)
    return model, reference


def question(B, *lead, L=5):
    ids, mask = torch.randint(0, 50, (B, *lead, L)), torch.ones(B, *lead, L, dtype=torch.long)
    mask.flatten(0, -2)[1::2, 3:] = 0  # some padding
    return ids, mask


def expected(reference, features, text, visual=True, query=True, length=M):
    """The last frame's query tokens; a bank is switched off by emptying it after every frame."""
    state, T = reference.start(), features.shape[1]
    for t in range(T):
        x, state = reference.step(state, features[:, t], t, *text, length, t == T - 1)
        state = state._replace(visual=state.visual if visual else Bank())
        state = state._replace(query=state.query if query else reference.start().query)
    return x[:, : reference.config.qformer.queries]


def close(got, want, tolerance=1e-9):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * max(1, want.abs().max())


def streamed(model, prompt, features, *, length=M, **options):
    memories = model.start(prompt, length=length, **options)
    for t in range(features.shape[1]):
        memories = model.push(memories, features[:, t])
    return memories


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 3, 4, 5, 11])
@pytest.mark.parametrize("visual, query", [(True, True), (True, False), (False, True), (False, False)])
def test_stream_and_clip(T, visual, query):
    model, reference = pair()
    features, text = torch.randn(2, T, 10, 48, dtype=torch.float64), question(2)
    want, prompt = expected(reference, features, text, visual, query), model.prompt(*text)
    options = {"visual": visual, "query": query}
    close(model.ask(streamed(model, prompt, features, **options)), want)
    for chunk in (1, 2, 32):
        close(model.encode(features, prompt, length=M, chunk=chunk, **options), want)


@torch.no_grad()
def test_any_chunking_gives_the_same_state():
    model, _ = pair()
    features, prompt = torch.randn(2, 12, 10, 48, dtype=torch.float64), model.prompt(*question(2))
    one = streamed(model, prompt, features)
    for cuts in ([5, 1, 6], [2, 10], [12]):
        other = model.start(prompt, length=M)
        for part in features.split(cuts, dim=1):
            other = model.push(other, part)
        for a, b in zip((one.visual, *one.query[1:]), (other.visual, *other.query[1:])):
            assert torch.equal(a.order, b.order) and torch.equal(a.sizes, b.sizes)
            for x, y in zip((a.bank, *a.attached), (b.bank, *b.attached)):
                close(y, x)


@torch.no_grad()
def test_asking_changes_nothing_and_clones_go_their_own_ways():
    model, reference = pair()
    features, text = torch.randn(1, 9, 10, 48, dtype=torch.float64), question(1)
    memories = model.start(model.prompt(*text), length=M)
    for t in range(8):
        memories = model.push(memories, features[:, t])
        close(model.ask(memories), expected(reference, features[:, : t + 1], text))
    fork = memories.clone()
    other = model.push(fork, features[:, 8] + 1)
    memories = model.push(memories, features[:, 8])
    close(model.ask(memories), expected(reference, features, text))
    features[:, 8] += 1
    close(model.ask(other), expected(reference, features, text))


@torch.no_grad()
@pytest.mark.parametrize("query", [True, False])
def test_several_questions_share_the_frames(query):
    model, _ = pair()
    features, (ids, mask) = torch.randn(2, 7, 10, 48, dtype=torch.float64), question(2, 3)
    memories = streamed(model, model.prompt(ids, mask), features, query=query)
    got = model.ask(memories)
    assert got.shape == (2, 3, 8, 32) and memories.visual.bank.shape[0] == 2
    close(model.encode(features, model.prompt(ids, mask), length=M, query=query), got)
    for g in range(3):
        prompt = model.prompt(ids[:, g], mask[:, g])
        close(got[:, g], model.encode(features, prompt, length=M, query=query))


@torch.no_grad()
def test_questions_that_come_later():
    """Without a query bank the frames are stored without any question."""
    model, _ = pair()
    features, text = torch.randn(2, 7, 10, 48, dtype=torch.float64), question(2)
    memories = model.push(model.start(batch=2, length=M, query=False), features)
    for prompt in (model.prompt(*text), model.prompt(batch=2)):
        close(model.ask(memories, prompt), model.encode(features, prompt, length=M, query=False))
    with pytest.raises(ValueError, match="needs a prompt"):
        model.ask(memories)
    with pytest.raises(ValueError, match="query=False for others"):
        model.ask(model.push(model.start(model.prompt(*text)), features), model.prompt(batch=2))


@torch.no_grad()
def test_batch_rows_are_independent():
    model, _ = pair()
    features, (ids, mask) = torch.randn(3, 6, 10, 48, dtype=torch.float64), question(3)
    got = model.encode(features, model.prompt(ids, mask), length=M)
    for b in range(3):
        one = model.encode(features[b : b + 1], model.prompt(ids[b : b + 1], mask[b : b + 1]), length=M)
        close(one, got[b : b + 1])


@pytest.mark.parametrize("T", [1, 3, 4, 8])
@pytest.mark.parametrize("kind", ["stream", "clip", "pixels"])
def test_gradients(T, kind):
    """All parameters, against the reference, which has a graph through every frame's own pass."""
    model, reference = pair()
    pixels, text = torch.randn(2, T, 3, 42, 42, dtype=torch.float64), question(2)
    weight = torch.randn(2, 8, 24, dtype=torch.float64)
    want = reference(pixels, *text, length=M)
    (want * weight).sum().backward()
    if kind == "pixels":
        got = model(pixels, *text, length=M)
    else:
        chunk = 1 if kind == "stream" else 32
        got = model.project(model.encode(model.features(pixels), model.prompt(*text), length=M, chunk=chunk))
    close(got.detach(), want.detach())
    (got * weight).sum().backward()
    mine = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    theirs = rename({name: p.grad for name, p in reference.named_parameters() if p.grad is not None}).weights
    unused = {name for name in theirs if "layers.3.feed_text" in name}  # zeros there, never run here
    assert {*mine} == {*theirs} - unused and not any(theirs[name].any() for name in unused)
    for name, gradient in mine.items():
        close(gradient, theirs[name], 1e-8)
    assert (model.time.grad.abs().sum(1) > 0).nonzero().flatten().tolist() == [T - 1]


def test_gradients_without_a_query_bank():
    model, reference = pair()
    pixels, text = torch.randn(1, 6, 3, 42, 42, dtype=torch.float64), question(1)
    features = torch.stack([reference.features(pixels[:, t]) for t in range(6)], dim=1)
    expected(reference, features, text, query=False).square().sum().backward()
    model.encode(model.features(pixels), model.prompt(*text), length=M, query=False).square().sum().backward()
    theirs = rename({name: p.grad for name, p in reference.named_parameters() if p.grad is not None}).weights
    for name, p in model.named_parameters():
        if p.grad is not None:
            close(p.grad, theirs[name], 1e-8)


def test_autocast():
    model, text = MALMM.default(), question(1)
    features = torch.randn(1, 5, 10, 48)
    with torch.no_grad():
        want = model.encode(features, model.prompt(*text), length=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model.encode(features, model.prompt(*text), length=5)
        got.float().sum().backward()
        with torch.no_grad():
            stream = model.ask(streamed(model, model.prompt(*text), features, length=5))
    assert (got.float() - want).abs().max() < 0.15 and (stream.float() - want).abs().max() < 0.15
    assert model.qformer.query_tokens.grad.isfinite().all()


def test_dropout_is_for_training():
    model, _ = pair()
    features, text = torch.randn(1, 6, 10, 48, dtype=torch.float64), question(1)
    model.train()
    assert model.prompt(*text).attended is None
    a, b = (model.encode(features, model.prompt(*text), length=M) for _ in range(2))
    assert not torch.allclose(a, b) and a.requires_grad
    memories = model.push(model.start(model.prompt(*text), length=M), features)
    assert all(bank is not None for bank in memories.query)
    still, _ = pair(qformer=dataclasses.replace(model.config.qformer, dropout=0.0))
    still.train()
    c, d = (still.encode(features, still.prompt(*text), length=M) for _ in range(2))
    assert torch.equal(c, d)


@torch.no_grad()
def test_memory_off():
    model, reference = pair()
    pixels, text = torch.randn(2, 4, 3, 42, 42, dtype=torch.float64), question(2)
    close(model(pixels, *text, length=0), reference(pixels, *text, length=0))


@torch.no_grad()
def test_constant_memory():
    model = MALMM.default()
    model.time = None

    def size(memories):
        tensors = [x for m in (memories.visual, *memories.query[1:]) for x in (*m[:5], *m.attached)]
        return sum(x.untyped_storage().nbytes() for x in [*tensors, memories.rows])

    memories = model.push(model.start(model.prompt(batch=1), length=M), torch.randn(1, 1, 10, 48))
    before = size(memories)
    for _ in range(40):
        memories = model.push(memories, torch.randn(1, 10, 48))
    assert size(memories) == before and memories.visual.sizes.sum(2).unique().tolist() == [41]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """A bank of float32 whose keys and values are in the model's dtype; no merge, so that no choice is at stake."""
    model = MALMM.default()
    features, text = torch.randn(1, 4, 10, 48), question(1)
    want = model.encode(features, model.prompt(*text), length=4)
    model.to(dtype)
    memories = model.push(model.start(model.prompt(*text), length=4), features.to(dtype))
    assert memories.visual.bank.dtype == torch.float32 and memories.visual.attached[0].dtype == dtype
    got = model.ask(memories)
    assert got.dtype == dtype
    assert (got.float() - want).abs().max() < (0.02 if dtype == torch.float16 else 0.15)


@torch.no_grad()
def test_temporal_table():
    model, _ = pair(time_length=4)
    features, prompt = torch.zeros(1, 6, 10, 48, dtype=torch.float64), model.prompt(batch=1)
    with pytest.raises(ValueError, match="temporal table has 4 rows, got frame 6"):
        model.encode(features, prompt)
    with pytest.raises(ValueError, match="temporal table has 4 rows, got frame 5"):
        model.push(model.push(model.start(prompt), features[:, :4]), features[:, 4])
    with pytest.raises(ValueError, match=r"each in \[0, 3\]"):
        model.push(model.start(prompt), features[:, 0], positions=[3.5])
    model.compat = "paper"
    memories = model.start(prompt)
    for t in range(6):
        memories = model.push(memories, features[:, t], positions=torch.tensor([t * 3 / 5]))
    close(memories.visual.bank[0, 1, 0], 0.4 * model.time[0] + 0.6 * model.time[1], 1e-6)
    close(model.ask(memories), model.encode(features, prompt), 1e-6)


@torch.no_grad()
def test_save_and_load(tmp_path):
    model = MALMM.default().half()
    model.compat = "paper"
    model.save(tmp_path / "a")
    found = MALMM.from_pretrained(tmp_path / "a")
    assert found.compat == "paper" and found.is_random and found.config == model.config and not found.training
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found.parameters(), model.parameters()))
    grads = {name for name, p in found.named_parameters() if not p.requires_grad}
    assert grads == {n for n, _ in model.named_parameters() if n.startswith("vision.") and "norm_post" not in n}
    with pytest.raises(FileNotFoundError, match="malmm: there is no"):
        MALMM.from_pretrained(tmp_path / "b")


@torch.no_grad()
def test_paper_mode_merges_by_plain_means():
    model, _ = pair()
    features, prompt = torch.randn(1, 5, 10, 48, dtype=torch.float64), model.prompt(batch=1)
    model.time.zero_()
    merged = {}
    for model.compat in ("official", "paper"):
        memories = model.push(model.start(prompt, length=1, query=False), features)
        slot = memories.visual.order[0, :, 0].long()
        merged[model.compat] = memories.visual.bank[0, slot, torch.arange(10)]
    close(merged["official"], features[0, :4].mean(0))
    a, b, c, d = features[0, :4]
    close(merged["paper"], (((a + b) / 2 + c) / 2 + d) / 2)


def test_inputs_are_checked():
    model = MALMM.default()
    ids = torch.zeros(1, 3, dtype=torch.long)
    for call, message in (
        (lambda: MALMM(MALMMConfig.tiny(), compat="best"), "compat must be one of official, paper"),
        (lambda: model(torch.zeros(1, 3, 42, 42)), r"pixels must be \[B, T, 3, h, w\]"),
        (lambda: model(torch.zeros(1, 2, 3, 28, 28)), "images must be 42x42, got 28x28"),
        (lambda: model(torch.zeros(0, 2, 3, 42, 42)), "at least one clip .* got 0 of 2 frames"),
        (lambda: model.encode(torch.zeros(0, 2, 10, 48)), "at least one clip .* got 0 of 2 frames"),
        (lambda: model.start(), "start needs a prompt"),
        (lambda: model.start(model.prompt(batch=1), length=0), "length must be at least 1"),
        (lambda: model.start(model.prompt(batch=1), length=1.5), "length must be at least 1 and whole"),
        (lambda: model.encode(torch.zeros(1, 2, 10, 48), chunk=0), "chunk must be a whole number"),
        (lambda: model.ask(model.start(model.prompt(batch=1))), "ask needs a frame"),
        (lambda: model.push(model.start(model.prompt(batch=1)), torch.zeros(1, 9, 48)), r"\[B, t, 10, 48\]"),
        (lambda: model.push(model.start(model.prompt(batch=2)), torch.zeros(1, 10, 48)), "of 2 videos"),
        (lambda: model.push(model.start(batch=2, query=False), torch.zeros(1, 10, 48)), "of 2 videos"),
        (lambda: model.encode(torch.zeros(1, 0, 10, 48)), "at least one frame"),
        (lambda: model.prompt(ids.float()), r"text_ids must be int \[B, L\]"),
        (lambda: model.prompt(ids, torch.ones(1, 4)), "text_mask must be like text_ids"),
        (lambda: model.prompt(text_mask=ids), "text_mask needs text_ids"),
        (lambda: MALMM(MALMMConfig.tiny(llm_width=None)).project(torch.zeros(1, 8, 32)), "without a projection"),
        (lambda: MALMMConfig.from_dict(MALMMConfig.tiny().to_dict() | {"mode": 1}), "unknown fields mode"),
        (lambda: MALMMConfig(qformer=MALMMConfig.tiny().qformer), "encoder_width must be vision.width"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_configs():
    config = MALMMConfig.tiny()
    assert MALMMConfig.from_dict(config.to_dict()) == config
    with torch.device("meta"):
        model = MALMM(MALMMConfig())
    count = (
        sum(p.numel() for p in model.vision.parameters()) - 2 * 1408 - 39 * 1408
    )  # without ln_vision, without k biases
    assert count == 985_894_528
    assert sum(p.numel() for p in model.qformer.parameters()) - 32 * 768 == 185_660_160
    assert (
        not any(p.requires_grad for p in model.vision.blocks.parameters())
        and model.vision.norm_post.weight.requires_grad
    )
