"""MA-LMM from pixels to the language model's tokens, and its frame encoder: the reference, streams, whole clips."""

import re
from dataclasses import replace

import torch

from pyvidx.backbones.vit import EVA_G, ViT
from pyvidx.layers.patch import patch_rows, resize_positions
from pyvidx.memory.qformer import QFormerConfig
from pyvidx.models.malmm import MALMM
from pyvidx.models.malmm_config import MALMMConfig
from pyvidx.ops.memory_merge import in_order, memory_merge_
from pyvidx.reference.malmm import EVAVisionReference, ReferenceMALMM
from pyvidx.weights.malmm_keys import export, rename
from tests.golden.vectors import runner


def config_of(file) -> MALMMConfig:
    m, weights = file.meta, file.part("weights.")
    width = m["encoder_width"]
    return MALMMConfig(
        replace(
            EVA_G,
            image_size=m["img"], patch_size=m["patch"], width=width, heads=m["vit_heads"], layers=m["vit_depth"],
            mlp_width=int(width * m["mlp_ratio"]), eps=m["vit_ln_eps"], norm_eps=m["ln_vision_eps"],
        ),
        QFormerConfig(
            width=m["hidden"], heads=m["heads"], layers=m["layers"], mlp_width=m["intermediate"],
            queries=m["num_query"], cross_every=m["cross_attention_freq"], encoder_width=width, vocab=m["vocab"],
            text_length=weights["Qformer.bert.embeddings.position_embeddings.weight"].shape[0],
            eps=m["bert_layer_norm_eps"], dropout=0.0,
        ),
        llm_width=weights["llm_proj.bias"].shape[0],
        time_length=weights["image_pe.weight"].shape[0],
    )  # fmt: skip


def fast(file) -> MALMM:
    model, renamed = MALMM(config_of(file)).eval(), rename(file.part("weights."))
    assert not renamed.unexpected, renamed.unexpected
    model.load_state_dict(renamed.weights)
    return model


def inputs(file):
    t = file.tensors
    return t["in.image"].transpose(1, 2), (t["in.text_ids"], t["in.text_mask"])


def check_state(file, check, t, visual, query):
    """visual and query[i]: (rows, sizes) in time order after step t; query[i] None: not kept."""
    Q, gaps = file.meta["num_query"], file.meta["min_query_gap"]
    name = f"out.after_step{t:02d}."
    check(name + "visual_bank", visual[0])
    check.equal(name + "visual_size", visual[1])
    for i, bank in enumerate(query):
        if bank is None:
            check.excuse(name + f"layer{i}.query_bank")
            check.excuse(name + f"layer{i}.query_size")
            continue
        check(name + f"layer{i}.query_bank", bank[0])
        # Where the best two pairs are as good as equal, rounding decides which of them is merged.
        for part, rows in (("query", slice(Q)), ("text", slice(Q, None))):
            if gaps.get(f"layer{i}.{part}", 1.0) > 2e-6:
                check.equal(name + f"layer{i}.query_size", bank[1], (slice(None), slice(None), rows))
            else:
                check.excuse(name + f"layer{i}.query_size")


def after_step(memory):
    """What the public code holds after a frame: it merges at once, not when the next frame comes."""
    full = memory.length[0] > memory.similarity.shape[2]
    if full:
        memory = memory._replace(**{n: getattr(memory, n).clone() for n in memory._fields[:5]})
        memory_merge_(*memory[:5])
    return in_order(memory._replace(attached=()))


@runner("qformer_*", variants=("reference", "stream", "clip"), runs=lambda file: [""])
def malmm(file, run, variant, check):
    {"reference": reference, "stream": stream, "clip": clip}[variant](file, check)


def reference(file, check):
    model, (video, text), M = ReferenceMALMM(config_of(file)), inputs(file), file.meta["M"]
    weights = file.part("weights.")
    weights.pop("Qformer.bert.embeddings.position_ids")
    model.load_state_dict(weights)
    with torch.no_grad():
        state, rows, T = model.start(), [], video.shape[1]
        for t in range(T):
            features = model.features(video[:, t])
            check(f"out.ln_vision.{t:02d}", features)
            x, state = model.step(state, features, t, *text, M, t == T - 1)
            rows.append(x)
            if M:
                check(f"out.last_hidden_state.{t:02d}", x)
                check_state(file, check, t, state.visual, state.query)
    if not M:
        check("out.last_hidden_state.00", torch.stack(rows, dim=1).flatten(0, 1))
    tokens = model(video, *text, length=M)
    check("out.inputs_llm", tokens)
    check_gradients(file, check, tokens, lambda: {name: p.grad for name, p in model.named_parameters()})


def stream(file, check):
    model, (video, text), M = fast(file), inputs(file), file.meta["M"]
    Q = file.meta["num_query"]
    if M == 0:
        return concat(file, check, model, video, text)
    with torch.no_grad():
        prompt = model.prompt(*text)
        memories = model.start(prompt, length=M)
        for t in range(video.shape[1]):
            features = model.features(video[:, t])
            check(f"out.ln_vision.{t:02d}", features)
            memories = model.push(memories, features)
            check(f"out.last_hidden_state.{t:02d}", model.ask(memories), part=(slice(None), slice(Q)))
            query = [None if m is None else after_step(m) for m in memories.query]
            check_state(file, check, t, after_step(memories.visual), query)
        check("out.inputs_llm", model.project(model.ask(memories)))
    tokens = model.project(model.encode(model.features(video), model.prompt(*text), length=M, chunk=1))
    check("out.inputs_llm", tokens)
    check_gradients(file, check, tokens, lambda: gradients(model, file))


def clip(file, check):
    """Every recorded step as the last of a clip: a prefix of the video."""
    model, (video, text), M = fast(file), inputs(file), file.meta["M"]
    Q, T = file.meta["num_query"], video.shape[1]
    if M == 0:
        return concat(file, check, model, video, text)
    with torch.no_grad():
        features, prompt = model.features(video), model.prompt(*text)
        for t in range(T):
            check(f"out.ln_vision.{t:02d}", features[:, t])
            if f"out.last_hidden_state.{t:02d}" not in file.tensors:
                continue
            start = features[:, : t + 1]
            check(f"out.last_hidden_state.{t:02d}", model.encode(start, prompt, length=M), part=(slice(None), slice(Q)))
            memories = model.push(model.start(prompt, length=M), start)
            query = [None if m is None else after_step(m) for m in memories.query]
            check_state(file, check, t, after_step(memories.visual), query)
        check("out.inputs_llm", model(video, *text, length=M))
    tokens = model(video, *text, length=M)
    check("out.inputs_llm", tokens)
    check_gradients(file, check, tokens, lambda: gradients(model, file))


@torch.no_grad()
def concat(file, check, model, video, text):
    Q, T = file.meta["num_query"], video.shape[1]
    tokens = model.encode(model.features(video), model.prompt(*text), length=0)
    check("out.last_hidden_state.00", tokens.view(-1, Q, tokens.shape[2]), part=(slice(None), slice(Q)))
    check("out.inputs_llm", model(video, *text, length=0))
    assert tokens.shape[1] == T * Q


def check_gradients(file, check, tokens, collect):
    if "in.loss_weight" not in file.tensors:
        return
    loss = (tokens * file.tensors["in.loss_weight"]).sum()
    loss.backward()
    check("out.loss", loss[None])
    for name, gradient in collect().items():
        if gradient is not None:
            check(f"out.grad.{name}", gradient, 1e-4)


def gradients(model, file):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert not [name for name in found if re.match(r"vision\.(?!norm_post)", name)], "the image tower is frozen"
    return export(found, "lavis", cross_every=file.meta["cross_attention_freq"])


@runner("eva*", variants=("reference", "fast"), runs=lambda file: [""])
@torch.no_grad()
def eva(file, run, variant, check):
    m, t = file.meta, file.tensors
    config = replace(
        EVA_G,
        image_size=m["img"], patch_size=m["patch"], width=m["embed_dim"], heads=m["heads"], layers=m["depth"],
        mlp_width=m["mlp_hidden"], eps=m["block_ln_eps"], norm_eps=m["ln_vision_eps"],
    )  # fmt: skip
    weights, trace = file.part("weights."), {}
    if variant == "reference":
        model = EVAVisionReference(config)
        model.load_state_dict(file.part("weights.visual_encoder."))
        x = model(t["in.image"], trace)
        trace["features"] = x
        norm = torch.nn.LayerNorm(config.width, eps=config.norm_eps)
        norm.load_state_dict(file.part("weights.ln_vision."))
        trace["ln_vision"] = norm(x)
    else:
        model = ViT(config)
        model.load_state_dict({n.removeprefix("vision."): v for n, v in rename(weights).weights.items()})
        trace["patch_embed"] = patch_rows("ViT", t["in.image"], model.patch, model.patch_bias)[0]
        x = model.embed(t["in.image"])
        for i, block in enumerate(model.blocks.values()):
            trace[f"block{i}"] = x = block(x)
        trace |= {"features": model(t["in.image"])[0], "ln_vision": model.norm(x)}
    for name, value in trace.items():
        check(f"out.{name}", value)
    check("out.pos_embed_3x3", resize_positions(t["in.pos_embed_5x5"][0], 3, 3)[None])
