"""BT-Adapter: the official towers, by our eager reference, the fast path and its folded copy."""

from contextlib import nullcontext

import pytest
import torch

from pyvidx.backbones.vit import ViTConfig
from pyvidx.models.bt_adapter import BTAdapter
from pyvidx.models.config import BTAdapterConfig
from pyvidx.models.pretraining import Pretraining
from pyvidx.reference.bt_adapter import ReferenceBTAdapter
from pyvidx.reference.pretraining import ReferencePretraining
from pyvidx.temporal.branch import fused_tokens
from pyvidx.temporal.bt_adapter import split_rows
from pyvidx.weights import text_towers
from pyvidx.weights.bt_adapter import load_official, load_weights
from pyvidx.weights.keys import THIRDS, locate
from tests.golden.vectors import Check, runner

BOTH = ("reference", "fast", "folded")
GRADIENT_TOLERANCE = 1e-4
TRAINED = ("model.temporal.branch.", "model.temporal.output_gate", "head.")


def config(meta, gates=None, **changes):
    """Sizes from a file's metadata; gates: where it says how they are scaled (None there: plain sums)."""
    v, gates = meta["clip"]["vision"], meta if gates is None else gates
    scales = [gates.get("middle_norm"), gates.get("out_norm")]
    if None not in scales:
        changes |= {"gate_scale": scales[0], "output_gate_scale": scales[1]}
    vision = ViTConfig(
        image_size=v["image_size"],
        patch_size=v["patch_size"],
        width=v["hidden_size"],
        heads=v["num_attention_heads"],
        layers=v["num_hidden_layers"],
        mlp_width=v["intermediate_size"],
        embed_dim=changes.pop("embed_dim", None),
        hidden_act=v["hidden_act"],
        eps=v["layer_norm_eps"],
    )
    return BTAdapterConfig(vision, time_length=meta["time_embed"], gated=None not in scales, **changes)


def fast_model(config, tower, weights, variant):
    model = BTAdapter(config, compat="official", variant=tower)
    report = load_weights(model, weights)
    assert not report.unexpected and not report.missing
    return model.fold() if variant == "folded" else model


def reference_model(config, tower, weights):
    model = ReferenceBTAdapter(config, tower).eval()
    own = model.state_dict()
    model.load_state_dict({k.replace("STAN_", "btadapter_"): v for k, v in weights.items() if keeps(k, own)})
    return model


def keeps(key, own):
    """All but the gates, which an ungated tower drops."""
    return key.replace("STAN_", "btadapter_") in own or not key.startswith("balance")


def branch_states(model, pixels, mask=None):
    """Backbone outputs, every branch state as the official flat Z [B, 1 + n, C], and the frame vectors."""
    xs = model.tower(model.read_pixels(pixels), range(model.config.fork, model.config.vision.layers))
    states = model.temporal.branch(xs, model.tower.position, grouping(model, xs[0], mask))
    return (
        xs,
        [official_order(*state) for state in states],
        model.temporal.frame_vectors(xs[-1], states[-1][1], model.tower),
    )


def grouping(model, x, mask=None):
    return model.temporal.grouping(x.shape[1], x.shape[2] - 1, mask=mask, device=x.device)


def official_order(z, cls):
    """[B, S, K, C] and [B, C] -> class first, then group by group (patch-major): [B, 1 + K*S, C]."""
    return torch.cat([cls[:, None], z.transpose(1, 2).flatten(1, 2)], dim=1)


@runner("mma_eval*", variants=BOTH)
def mma_eval(file, run, variant, check):
    video, weights = file.tensors[f"in.{run}.video"], file.part("weights.")
    for gates in ("gated", "ungated"):
        sizes = config(file.meta, file.meta[gates], embed_dim=projection_width(weights), depth=file.meta["depth"])
        mma_video(sizes, "mma", weights, variant, video, f"out.{run}.{gates}.", check)


def projection_width(weights):
    return weights["visual_projection.weight"].shape[0]


@runner("stan_eval*", variants=BOTH)
def stan_eval(file, run, variant, check):
    weights = file.part("weights.")
    sizes = config(file.meta, embed_dim=projection_width(weights), depth=file.meta["depth"])
    mma_video(sizes, "stan", weights, variant, file.tensors[f"in.{run}.video"], f"out.{run}.", check)


@torch.no_grad()
def mma_video(sizes, tower, weights, variant, video, out, check, mask=None, embed="embed"):
    if variant == "reference":
        trace = {}
        check(out + embed, reference_model(sizes, tower, weights)(video, mask, trace))
        for name, value in trace.items():
            check(out + name, value)
        check(f"{out}backbone_last", trace[f"backbone.{sizes.vision.layers - 1}"])
        return
    model = fast_model(sizes, "mma", weights, variant)
    check(out + embed, model(video, outputs=("pooled",), mask=mask).pooled)
    xs, states, frames = branch_states(model, video, mask)
    for j, state in enumerate(states):
        check(f"{out}S.{j}", state)
        check(f"{out}backbone.{sizes.fork + j}", xs[j].flatten(0, 1))
    check(f"{out}backbone_last", xs[-1].flatten(0, 1))
    check(f"{out}post_ln_cls", frames.flatten(0, 1))
    check(f"{out}per_frame", model.tower.projection(frames))
    if mask is None and sizes.depth > 1:
        both = model(video)  # with the tokens computed beside it
        check(out + embed, both.pooled)


@runner("mma_train*", variants=("reference", "fast"))
def mma_train(file, run, variant, check):
    """The training step: forward pass, losses, and the gradients of their sum and of each."""
    case, tensors = file.meta["runs"][run], file.part(f"in.{run}.")
    weights = file.part("weights.backbone.")
    sizes = config(file.meta, embed_dim=projection_width(weights), depth=file.meta["depth"])
    mask, out, text = tensors["mask"].bool(), f"out.{run}.", text_tower(file)
    check(out + "text_embed", text(tensors["text"]))
    if not case["drop_rates"]:
        for v in ("fast", "folded") if variant == "fast" else (variant,):
            mma_video(sizes, "mma", weights, v, tensors["imgs"], out, check, mask, "video_embed")
    drops, trace = keeps_to_drops(case, tensors, sizes.depth), {}
    batch = tensors["imgs"], tensors["text"]
    if variant == "reference":
        step = ReferencePretraining(reference_model(sizes, "mma", weights), text)
    else:
        step = Pretraining(fast_model(sizes, "mma", weights, "fast"), text, mask_order="official", gradient="official")
        trace = fast_states(step, tensors["imgs"], mask, drops)
    step.head.load_state_dict(file.part("weights.extra_proj."))
    losses = step(*batch, mask, drops, trace) if variant == "reference" else step(*batch, mask=mask, drops=drops)
    for name, value in trace.items():
        check(out + name, value)
    check(f"{out}backbone_last", trace[f"backbone.{sizes.vision.layers - 1}"])
    named = dict(zip(("NCE_loss", "branch_text_nce_loss", "clip_branch_mask_mse_loss"), losses))
    for name, loss in [*named.items(), ("total", sum(losses))]:
        check(f"{out}loss.{name}", loss[None])
        step.zero_grad()
        loss.backward(retain_graph=True)
        prefix = f"grad.{run}." if name == "total" else f"grad_of.{name}.{run}."
        for parameter in file.part(prefix):
            check(prefix + parameter, training_gradient(step, parameter, variant), GRADIENT_TOLERANCE)
    if variant == "fast":
        trained = [name for name, p in step.named_parameters() if p.grad is not None]
        assert trained == [name for name in dict(step.named_parameters()) if name.startswith(TRAINED)]


def text_tower(file):
    sizes, weights = file.meta["clip"]["text"], file.part("weights.")
    options = {"hidden_act": sizes["hidden_act"], "eps": sizes["layer_norm_eps"]}
    return text_towers.text_tower(weights, heads=sizes["num_attention_heads"], **options)


def keeps_to_drops(case, tensors, depth):
    """The 0/1 draws of a run as factors per layer."""
    rates = case["drop_rates"]

    def factor(kind, j):
        return tensors[f"keep.{kind}.{j}"].view(case["B"], -1) / (1 - rates[f"{kind}.{j}"])

    return [(factor("T", j), factor("S", j)) if f"T.{j}" in rates else None for j in range(depth)]


def fast_states(step, pixels, mask, drops):
    """Backbone outputs and the branch's states after time attention (T.j) and after the layer (S.j)."""
    model, trace, rows = step.model, {}, None
    xs = model.tower(model.read_pixels(pixels), range(model.config.fork, model.config.vision.layers))
    group = step.grouping(xs[0], mask)
    for j, following in enumerate(step.rows(xs, group, drops)):
        time = drops[j][0] if drops[j] else None
        mixed = model.temporal.branch.mix(j, xs[j], rows, model.tower.position, group, time)
        tokens = mixed.z + mixed.added
        trace[f"T.{j}"], trace[f"S.{j}"] = official_order(tokens, mixed.cls), official_order(*split_rows(following))
        trace[f"backbone.{model.config.fork + j}"] = xs[j].flatten(0, 1)
        rows = following
    return trace


def training_gradient(step, name, variant):
    if name.startswith("extra_proj."):
        return dict(step.head.named_parameters())[name.removeprefix("extra_proj.")].grad
    return gradient(step.model, name.removeprefix("backbone."), variant)


@runner("llava_infer*", variants=BOTH, runs=lambda file: [*file.meta["runs"], "other_T"])
@torch.no_grad()
def llava_infer(file, run, variant, check):
    sizes, weights, out = config(file.meta, depth=file.meta["depth"]), file.part("weights."), f"out.{run}."
    reference = variant == "reference"
    model = reference_model(sizes, "llava", weights) if reference else fast_model(sizes, "llava", weights, variant)
    if run == "other_T":
        size = sizes.vision.image_size
        for T, outcome in file.meta.get("other_T_outcome", {}).items():
            rejects = pytest.raises(ValueError, match=rf"got (T = )?{T}\b")
            with rejects if "Error" in outcome else nullcontext():
                model(torch.zeros(int(T), 3, size, size))
        return
    pixels = file.tensors[f"in.{run}.pixels"]
    if reference:
        hidden, pooler = model(pixels)
        x, z = hidden.pop()
        llm_tokens = hidden[-1]
    else:
        _, states, frames = branch_states(model, pixels)
        clip = model.read_pixels(pixels)
        xs = [model.tower.embed(clip), *model.tower(clip, range(sizes.vision.layers))]
        hidden = [x.flatten(0, 1) for x in xs[: sizes.fork + 1]]
        group = grouping(model, xs[0])
        branch = model.temporal.branch(xs[sizes.fork + 1 :], model.tower.position, group)
        hidden += [fused_tokens(x, group.patch_mean(z), cls) for x, (z, cls) in zip(xs[sizes.fork + 1 : -1], branch)]
        x, z, pooler = xs[-1].flatten(0, 1), states[-1], frames.flatten(0, 1)
        llm_tokens = model(pixels, outputs=("tokens",)).tokens
        both = model(pixels)
        check(out + "llm_tokens", both.tokens)
        last = model.layers(pixels, outputs=("pooled",))
        each = model.temporal.encode(last, model.tower, outputs=("pooled",), per_frame=True).pooled
        check(out + "pooler", each.flatten(0, 1))
        want = file.tensors[out + "pooler"].view(clip.shape[0], clip.shape[1], -1).mean(dim=1)
        assert (both.pooled - want).abs().max() <= 2e-5 * max(1.0, want.abs().max())
    for i, state in enumerate(hidden):
        check(f"{out}hidden.{i}", state)
    check(out + "final.x", x)
    check(out + "final.x2", z)
    check(out + "pooler", pooler)
    check(out + "llm_tokens", llm_tokens)
    check(out + "video_tokens", llm_tokens.mean(dim=0))


@runner("llava_features*", variants=BOTH)
def llava_features(file, run, variant, check):
    sizes = config(file.meta, depth=file.meta["reserve_layers"], part="features")
    assert list(sizes.backbone_layers) == file.meta["backbone_layers_used"]
    features, out = file.tensors[f"in.{run}.features"], f"out.{run}."
    weights = file.part("weights.")
    if variant == "reference":
        model = reference_model(sizes, "llava", weights)
        hidden, _ = model(features)
        for i, state in enumerate(hidden):
            check(f"{out}hidden.{i}", state)
        tokens = hidden[-1]
    else:
        model = fast_model(sizes, "llava", weights, variant)
        tokens = model(features).tokens
        xs = model.tower.run(features if features.dim() == 4 else features[None], sizes.backbone_layers)
        group = grouping(model, xs[0])
        check(f"{out}hidden.0", features.reshape(-1, *features.shape[-2:]))
        for j, (z, cls) in enumerate(model.temporal.branch(xs, model.tower.position, group)):
            check(f"{out}hidden.{j + 1}", fused_tokens(xs[j], group.patch_mean(z), cls))
    check(out + "llm_tokens", tokens)
    gradients = file.part(f"grad.{run}.")
    if not gradients:
        return
    if variant == "folded":  # an inference copy has none
        for name in gradients:
            check.excuse(f"grad.{run}.{name}")
        return
    (file.tensors[f"in.{run}.cotangent"] * tokens).sum().backward()
    for name in gradients:
        check(f"grad.{run}.{name}", gradient(model, name, variant), GRADIENT_TOLERANCE)


@runner("llava_sft*", variants=("fast", "folded"), runs=lambda file: ["8", "100"])
@torch.no_grad()
def llava_sft(file, run, variant, check):
    """What an integrator has: a CLIP and the tuned branch as published, and nothing told but what no weight tells."""
    clip, tuned = file.part("clip."), file.part("sft.")
    model, report = load_official(clip, tuned, part="tokens", heads=2, hidden_act="quick_gelu")
    assert "temporal.branch.gate" in report.assumed and not report.unexpected
    model = model.fold() if variant == "folded" else model
    name = f"tokens_{run}"
    Check({name: file.tensors[name]})(name, model(file.tensors[f"pixels_{run}"]).tokens)


def gradient(model, name, variant):
    parameters = dict(model.named_parameters())
    if variant == "reference":
        return parameters[name].grad
    target, third = locate(name)
    grad = parameters[target].grad
    if third:
        grad = grad.chunk(3)[THIRDS[third]]
    return grad[None, None] if name == "btadapter_cls_token" else grad
