"""The temporal modules of pyvidx.temporal against the public code of each."""

import re

import torch
import torch.nn.functional as F

from pyvidx import temporal
from pyvidx.backbones.vit import ViT, ViTConfig
from pyvidx.layers.block import Block
from pyvidx.models import VideoEncoder
from pyvidx.models.losses import alignment
from pyvidx.models.umt import UMTConfig, UMTStudent, UnmaskedTeacher
from pyvidx.temporal.clip_vip import proxy_attention
from pyvidx.temporal.grid_pool import grid_pool, with_newlines
from pyvidx.temporal.st_adapter import Adapter
from pyvidx.temporal.st_pool import space_time_means
from pyvidx.video.sampling import sample
from pyvidx.weights.keys import THIRDS, locate, rename
from pyvidx.weights.towers import filled, tower_names
from tests.golden.vectors import runner

GRADIENT_TOLERANCE = 1e-4


def once(file):
    return [""]


def vision(weights, *, heads, image_size, prefix="encoder.layers", hidden_act="quick_gelu"):
    """Sizes from a file's weights, which have no projection."""
    patch = next(v for k, v in weights.items() if k.endswith(("patch_embedding.weight", "conv1.weight")))
    layers = {k.split(".")[prefix.count(".") + 1] for k in weights if k.startswith(prefix)}
    mlp = next(v for k, v in weights.items() if k.endswith(("fc1.bias", "c_fc.bias")) and "mlp" in k)
    return ViTConfig(
        image_size=image_size, patch_size=patch.shape[-1], width=patch.shape[0], heads=heads, layers=len(layers),
        mlp_width=len(mlp), hidden_act=hidden_act,
    )  # fmt: skip


def load_block(weights, heads):
    """A Block from the unprefixed weights of one CLIP layer; what is not of a block is left out."""
    renamed = rename({f"layers.0.{k}": v for k, v in weights.items()})
    own = {k.removeprefix("tower.blocks.0."): v for k, v in renamed.weights.items()}
    block = Block(own["out.bias"].shape[0], heads, own["fc1.bias"].shape[0])
    block.load_state_dict(own)
    return block


def block_gradient(block, name):
    """Of an original name inside a layer."""
    target, third = locate(f"layers.0.{name}")
    grad = dict(block.named_parameters())[target.removeprefix("tower.blocks.0.")].grad
    return grad.chunk(3)[THIRDS[third]] if third else grad


def clip_frames(file, tensor):
    """[B*T, ...] -> [B, T, ...]."""
    return tensor.unflatten(0, (file.meta["B"], file.meta["T"]))


# --- ST-Adapter -------------------------------------------------------------------------------------------------------


def load_adapter(adapter, weights):
    own = {"weight": weights["conv.weight"][:, 0], "bias": weights["conv.bias"]}
    for theirs, ours in (("fc1", "down"), ("fc2", "up")):
        own |= {f"{ours}.{leaf}": weights[f"{theirs}.{leaf}"] for leaf in ("weight", "bias")}
    adapter.load_state_dict(own)


def check_adapter_gradients(check, adapter, prefix):
    check(f"{prefix}conv.weight", adapter.weight.grad[:, None], GRADIENT_TOLERANCE)
    check(f"{prefix}conv.bias", adapter.bias.grad, GRADIENT_TOLERANCE)
    for theirs, ours in (("fc1", adapter.down), ("fc2", adapter.up)):
        check(f"{prefix}{theirs}.weight", ours.weight.grad, GRADIENT_TOLERANCE)
        check(f"{prefix}{theirs}.bias", ours.bias.grad, GRADIENT_TOLERANCE)


@runner("st_adapter_k*", runs=once)
def st_adapter(file, run, variant, check):
    adapter = Adapter(file.meta["C"], file.meta["Ca"], tuple(file.meta["kernel"]))
    load_adapter(adapter, file.part("weights."))
    x = file.tensors["in.x"].requires_grad_()
    y = adapter(clip_frames(file, x)).flatten(0, 1)
    check("out.y", y)
    (y * file.tensors["in.dout"]).sum().backward()
    check("out.d_x", x.grad, GRADIENT_TOLERANCE)
    check_adapter_gradients(check, adapter, "out.grad.")


@runner("st_adapter_block", runs=once)
def st_adapter_block(file, run, variant, check):
    weights, meta = file.part("weights."), file.meta
    block = load_block({k: v for k, v in weights.items() if "adapter" not in k}, meta["heads"])
    sizes = ViTConfig(meta["H"], 1, meta["C"], meta["heads"], 2, block.fc1.out_features)
    module = temporal.create("st_adapter", sizes, layers=1, width=meta["Ca"], kernel=meta["kernel"])
    adapters = {"adapter_pre_attn.": module.attention[0], "adapter_pre_mlp.": module.mlp[0]}
    for prefix, adapter in adapters.items():
        load_adapter(adapter, file.part("weights." + prefix))
    x = file.tensors["in.x"].requires_grad_()
    y = module.block(1, block, clip_frames(file, x)).flatten(0, 1)
    check("out.y", y)
    (y * file.tensors["in.dout"]).sum().backward()
    check("out.d_x", x.grad, GRADIENT_TOLERANCE)
    for prefix, adapter in adapters.items():
        check_adapter_gradients(check, adapter, f"out.grad.{prefix}")
    for name in file.part("out.grad."):
        if "adapter" not in name:
            check(f"out.grad.{name}", block_gradient(block, name), GRADIENT_TOLERANCE)


@runner("st_adapter_vit*", runs=once)
@torch.no_grad()
def st_adapter_vit(file, run, variant, check):
    weights, video = file.part("weights."), file.tensors["in.video"].transpose(1, 2)
    sizes = vision(weights, heads=file.meta["heads"], image_size=video.shape[-1], prefix="transformer.resblocks")
    tower = {k: v for k, v in weights.items() if "adapter" not in k and not k.startswith("fc.")}
    with_adapters = {k.split(".")[2] for k in weights if "adapter" in k}
    options = {"layers": len(with_adapters), "width": file.meta["Ca"]}
    model = VideoEncoder(filled(sizes, tower_names(tower)), temporal.create("st_adapter", sizes, **options))
    for i in with_adapters:
        j = int(i) - model.temporal.first
        for place, adapters in (("attn", model.temporal.attention), ("mlp", model.temporal.mlp)):
            load_adapter(adapters[j], file.part(f"weights.transformer.resblocks.{i}.adapter_pre_{place}."))
    check("out.logits", F.linear(model(video).pooled, weights["fc.weight"], weights["fc.bias"]))


# --- STAN -------------------------------------------------------------------------------------------------------------


@runner("stan_branch*", runs=once)
def stan_branch(file, run, variant, check):
    weights, meta = file.part("weights."), file.meta
    own = rename(weights).weights
    side = int((meta["tokens"] - 1) ** 0.5)
    mlp = own["tower.blocks.0.fc1.bias"].shape[0]
    sizes = ViTConfig(side, 1, meta["C"], meta["heads"], meta["backbone_layers"], mlp)
    tower = ViT(sizes)
    loaded = tower.load_state_dict(
        {k.removeprefix("tower."): v for k, v in own.items() if k.startswith("tower.")}, strict=False
    )
    assert loaded.missing_keys == ["patch"] and not loaded.unexpected_keys
    module = temporal.create("stan", sizes, depth=meta["depth"], per_frame=True)
    module.load_state_dict(
        {k.removeprefix("temporal."): v for k, v in own.items() if k.startswith("temporal.") and not k.endswith("seed")}
    )
    x = file.tensors["in.x"].requires_grad_()
    xs = tower.run(tower.norm_pre(clip_frames(file, x)), module.reads)
    check("out.backbone", xs[-1].flatten(0, 1))
    cls = module.encode(xs, tower).pooled.flatten(0, 1)
    check("out.cls", cls)
    (cls * file.tensors["in.dout"]).sum().backward()
    z, z_cls = module.branch(
        xs, tower.position, module.grouping(meta["T"], meta["tokens"] - 1), seed=tower.class_token
    )[-1]
    check("out.branch", torch.cat([z_cls[:, None], z.transpose(1, 2).flatten(1, 2)], dim=1))
    check("out.d_x", x.grad, GRADIENT_TOLERANCE)
    for name in file.part("out.grad."):
        target, third = locate(name.replace("STAN_", "btadapter_"))
        grad = dict(module.named_parameters())[target.removeprefix("temporal.")].grad
        check(f"out.grad.{name}", grad.chunk(3)[THIRDS[third]] if third else grad, GRADIENT_TOLERANCE)


# --- CLIP-ViP ---------------------------------------------------------------------------------------------------------


@runner("clipvip_attention*", runs=once)
def clipvip_attention(file, run, variant, check):
    meta, leaves = file.meta, {k: v.requires_grad_() for k, v in file.part("weights.").items()}
    weight, bias = (torch.cat([leaves[f"{third}_proj.{leaf}"] for third in "qkv"]) for leaf in ("weight", "bias"))
    x = file.tensors["in.x"].requires_grad_()
    qkv = F.linear(x, weight, bias).unflatten(2, (3, meta["heads"], -1))
    y = F.linear(proxy_attention(qkv, meta["M"], meta["N_frames"]), leaves["out_proj.weight"], leaves["out_proj.bias"])
    check("out.y", y)
    (y * file.tensors["in.dout"]).sum().backward()
    check("out.d_x", x.grad, GRADIENT_TOLERANCE)
    for name, leaf in leaves.items():
        check(f"out.grad.{name}", leaf.grad, GRADIENT_TOLERANCE)


@runner("clipvip_vision*", runs=once)
@torch.no_grad()
def clipvip_vision(file, run, variant, check):
    weights, meta, video = file.part("weights."), file.meta, file.tensors["in.video"]
    sizes = vision(weights, heads=meta["heads"], image_size=meta["image"])
    tower = {k: v for k, v in weights.items() if not k.endswith(("added_cls", "temporal_embedding"))}
    options = {"proxies": 1 + meta["add_cls_num"], "time_length": meta["temporal_size"]}
    model = VideoEncoder(filled(sizes, tower_names(tower)), temporal.create("clip_vip", sizes, **options))
    model.temporal.added.copy_(weights["embeddings.added_cls"])
    model.temporal.time.copy_(weights["embeddings.temporal_embedding"][0])
    check("out.embeddings", model.temporal.embed(model.tower.tokens(video), model.tower))
    check("out.last_hidden_state", model._run_inside(video, None, model.temporal.reads)[-1])
    check("out.pooled", model(video).pooled)


# --- the others -------------------------------------------------------------------------------------------------------


@runner("separate_st_languagebind_layer*", runs=once)
def separate(file, run, variant, check):
    meta, weights = file.meta, file.part("weights.")
    block = load_block({k: v for k, v in weights.items() if not k.startswith("temporal")}, meta["heads"])
    side = int((meta["tokens"] - 1) ** 0.5)
    sizes = ViTConfig(side, 1, meta["C"], meta["heads"], 2, block.fc1.out_features)
    rows = weights["temporal_embedding"].shape[1]
    module = temporal.create("separate", sizes, layers=1, time_length=rows, every=True, fc=False)

    def ours(name):  # -> our parameter, and which third of it
        if name == "temporal_embedding":
            return "time", None
        name = re.sub("temporal_attn", "self_attn", name).replace("temporal_layer_norm1", "layer_norm1")
        target, third = locate(f"btadapter_T_layers.0.{name}")
        return target.removeprefix("temporal.branch."), third

    parameters = dict(module.named_parameters())
    for name, value in weights.items():
        if name.startswith("temporal"):
            target, third = ours(name)
            part = parameters[target].data
            (part.chunk(3)[THIRDS[third]] if third else part).copy_(value)
    x = file.tensors["in.x"].requires_grad_()
    y = module.block(1, block, clip_frames(file, x)).flatten(0, 1)
    check("out.y", y)
    (y * file.tensors["in.dout"]).sum().backward()
    check("out.d_x", x.grad, GRADIENT_TOLERANCE)
    for name in file.part("out.grad."):
        if name.startswith("temporal"):
            target, third = ours(name)
            grad = parameters[target].grad
            grad = grad.chunk(3)[THIRDS[third]] if third else grad
        else:
            grad = block_gradient(block, name)
        check(f"out.grad.{name}", grad, GRADIENT_TOLERANCE)


@runner("videochatgpt_stpool*", runs=once)
def st_pool(file, run, variant, check):
    tokens = space_time_means(file.tensors["in.features"][None], rows=file.meta["temporal_slots"])[0]
    check("out.tokens", tokens, 1e-6)
    check("out.tokens_f16", tokens.half(), 1e-3)


@runner("videochatgpt_frame_index*", runs=once)
def frame_index(file, run, variant, check):
    for name in file.part("out."):
        total, wanted = map(int, name.removeprefix("idx_").split("_"))
        if wanted <= total:
            check.equal(f"out.{name}", sample("video_chatgpt", total, wanted))
        else:  # the function alone; its callers never ask for more frames than there are, nor do we
            check.excuse(f"out.{name}")


@runner("llava_next_video_pool*", runs=once)
def llava_next_pool(file, run, variant, check):
    odd, even, newline = (file.tensors[k] for k in ("in.features7", "in.features6", "weights.image_newline"))
    for mode in ("average", "max", "bilinear"):
        check(f"out.{mode}", grid_pool(odd, mode, file.meta["stride"]), 1e-6)
        check(f"out.{mode}_6", grid_pool(even, mode, file.meta["stride"]), 1e-6)
    check("out.frame_newline", with_newlines(grid_pool(even, "bilinear"), newline), 1e-6)
    check("out.grid_newline", with_newlines(grid_pool(even, "bilinear"), newline, "row"), 1e-6)


# --- UMT --------------------------------------------------------------------------------------------------------------


def umt_student(weights, heads, image_size):
    """The student of these weights; keys have no bias there."""
    patch = weights["encoder.patch_embed.proj.weight"]
    C, layers = patch.shape[0], 1 + max(int(k.split(".")[2]) for k in weights if k.startswith("encoder.blocks."))
    mlp = weights["encoder.blocks.0.mlp.fc1.bias"].shape[0]
    student = UMTStudent(UMTConfig(image_size, patch.shape[-1], C, heads, layers, mlp))
    own = {"patch": patch[:, :, 0], "patch_bias": weights["encoder.patch_embed.proj.bias"]}
    for i in range(layers):
        theirs = {k: v for k, v in weights.items() if k.startswith(f"encoder.blocks.{i}.")}
        theirs = {k.removeprefix(f"encoder.blocks.{i}."): v for k, v in theirs.items()}
        q, v = theirs.pop("attn.q_bias"), theirs.pop("attn.v_bias")
        theirs["attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
        own |= {f"blocks.{i}.{re.sub('^(attn|mlp).', '', k).replace('proj', 'out')}": v for k, v in theirs.items()}
    for leaf in ("weight", "bias"):
        own |= {f"norm.{leaf}": weights[f"encoder.norm.{leaf}"], f"norm_pool.{leaf}": weights[f"pool_norm.{leaf}"]}
    student.load_state_dict(own)
    return student


@runner("joint_st_umt*", runs=once)
@torch.no_grad()
def umt(file, run, variant, check):
    weights, pixels, meta = file.part("weights."), file.tensors["in.video"].transpose(1, 2), file.meta
    student = umt_student(weights, meta["heads"], meta["img"])
    full, per_frame = student(pixels), student(pixels, per_frame=True)
    check("out.x_full", full.tokens)
    check("out.pool_full", full.pooled[:, None])
    check("out.pool_keep_temporal", per_frame.pooled)
    E = file.tensors["in.teacher"].shape[-1]
    teacher = ViT(ViTConfig(meta["img"], meta["patch"], 8, 2, 2, 8, embed_dim=E))
    step = UnmaskedTeacher(student, teacher, taps=2, mask_ratio=meta["mask_ratio"])
    for i, head in enumerate(step.heads):
        for leaf in ("weight", "bias"):
            getattr(head[0], leaf).copy_(weights[f"clip_decoder.{i}.head.{leaf}"])
            getattr(head[1], leaf).copy_(weights[f"clip_decoder.{i}.norm.{leaf}"])
    mask = file.tensors["in.mask"]
    visible = (~mask).nonzero()[:, 1].view(len(mask), meta["T"], -1)
    (last,) = student.run(pixels, visible)
    x = student.norm(last).flatten(1, 2)
    check("out.x_vis", x)
    check("out.pool_vis", student.norm_pool(x.mean(dim=1, keepdim=True)))
    predicted = step.predict(pixels, visible).flatten(2, 3)
    check("out.x_clip", predicted)
    check("out.uta_loss", alignment(predicted, file.tensors["in.teacher"]))
