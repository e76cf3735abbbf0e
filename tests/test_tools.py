"""Models under other people's tools: what these do to a layer is never passed by."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.nn.utils import parametrizations, parametrize, prune

from pyvidx.layers.linear import dense
from pyvidx.layers.plain import plain
from tests.tools import NAMES, clips, differ, layers, model, outputs
from tests.torchvision_shim import mend_torchvision

mend_torchvision()  # accelerate and peft import transformers, which imports it

FEW = ("BTAdapter", "clip_vip", "separate", "st_adapter", "MALMM")


@pytest.fixture(params=NAMES)
def subject(request):
    return model(request.param)


@pytest.fixture(params=FEW)
def some(request):
    return model(request.param)


@pytest.mark.parametrize("grad", [False, True])
def test_replaced_forward(subject, grad):
    """Each layer's own forward runs, and what it gives counts: kohya's LoRA, quantizers and profilers work so."""
    pixels, called, factor = clips(), set(), 1.0

    def around(name, forward):
        def replaced(x):
            called.add(name)
            return factor * forward(x)

        return replaced

    with torch.set_grad_enabled(grad):
        want = outputs(subject, pixels)
        for name, layer in layers(subject).items():
            layer.forward = around(name, layer.forward)
        assert differ(outputs(subject, pixels), want) < 1e-5
        assert called == layers(subject).keys()
        factor = 1.5
        assert differ(outputs(subject, pixels), want) > 1e-3


@pytest.mark.parametrize("grad", [False, True])
def test_global_hooks(subject, grad):
    pixels, names, called = clips(), {id(layer): name for name, layer in layers(subject).items()}, set()
    with torch.set_grad_enabled(grad):
        want = outputs(subject, pixels)
        handle = register_module_forward_hook(lambda module, x, y: called.add(names.get(id(module))))
        try:
            got = outputs(subject, pixels)
        finally:
            handle.remove()
    assert differ(got, want) < 1e-5 and called - {None} == set(names.values())
    called.clear()
    outputs(subject, pixels)
    assert not called


def test_what_is_plain():
    layer = nn.Linear(4, 4)
    assert plain(layer) and plain(nn.LayerNorm(4)) and plain(nn.Linear(4, 4, bias=False))
    for register in (register_module_forward_hook, register_module_full_backward_hook):
        handle = register(lambda *args: None)
        assert not plain(layer)
        handle.remove()
    assert plain(layer)
    for change in (
        lambda m: setattr(m, "forward", m.forward),
        lambda m: m.register_forward_pre_hook(lambda *args: None),
        lambda m: m.register_full_backward_hook(lambda *args: None),
        lambda m: parametrize.register_parametrization(m, "weight", nn.Identity()),
        lambda m: prune.identity(m, "weight"),
    ):
        other = copy.deepcopy(layer)
        change(other)
        assert not plain(other)
        x = torch.randn(2, 4)
        assert dense(x, other).equal(layer(x))


def test_hooks_keep_what_they_were_given(some):
    """Nothing is written into what a layer has given away."""
    kept = []
    for layer in layers(some).values():
        layer.register_forward_hook(lambda module, x, y: kept.append((y, y.clone())))
    with torch.no_grad():
        outputs(some, clips())
    assert kept and all(y.equal(seen) for y, seen in kept)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["weight norm", "pruned", "parametrized"])
def test_weights_that_are_computed(some, kind):
    pixels = clips()
    want = outputs(some, pixels)
    for layer in layers(some).values():
        if kind == "weight norm" and isinstance(layer, nn.Linear):
            parametrizations.weight_norm(layer)
        elif kind == "pruned":
            prune.identity(layer, "weight")
        elif kind == "parametrized":
            parametrize.register_parametrization(layer, "weight", nn.Identity())
    assert differ(outputs(some, pixels), want) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("how", ["cpu", "disk", "dispatched"])
def test_accelerate(subject, how, tmp_path):
    """Weights that are elsewhere between calls."""
    accelerate = pytest.importorskip("accelerate")
    pixels = clips()
    want = outputs(subject, pixels)
    if how == "cpu":
        moved = accelerate.cpu_offload(subject, execution_device="cpu")
    elif how == "disk":
        moved = accelerate.disk_offload(subject, tmp_path, execution_device="cpu")
    else:
        names = [name for name, _ in subject.named_children()]
        places = {name: "disk" if i == 0 else "cpu" for i, name in enumerate(names)}
        places |= {name: "cpu" for name, _ in subject.named_parameters(recurse=False)}
        moved = accelerate.dispatch_model(subject, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert any(p.is_meta for p in moved.parameters())
    for _ in range(2):
        assert differ(outputs(moved, pixels), want) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["weights", "both", "torch"])
def test_int8(subject, kind):
    """torchao's two and torch's own: all linear layers in 8 bits, close to what they were."""
    pixels = clips()
    want, count = outputs(subject, pixels), sum(isinstance(m, nn.Linear) for m in subject.modules())
    quantized, replaced = in_8_bits(subject, kind)
    assert replaced == count > 0
    assert 0 < differ(outputs(quantized, pixels), want) < 0.2


def in_8_bits(model, kind):
    """The model, and how many of its linear layers are quantized."""
    if kind == "torch":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        return model, sum(isinstance(m, torch.ao.nn.quantized.dynamic.Linear) for m in model.modules())
    torchao = pytest.importorskip("torchao.quantization")
    config = {"weights": torchao.Int8WeightOnlyConfig, "both": torchao.Int8DynamicActivationInt8WeightConfig}[kind]
    torchao.quantize_(model, config())
    return model, sum(type(p) not in (torch.Tensor, nn.Parameter) for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["weights", "both", "torch"])
def test_int8_folded(kind):
    """Folded first it works; the other way round is refused."""
    subject, pixels = model("BTAdapter"), clips()
    want = outputs(subject, pixels)
    folded, _ = in_8_bits(subject.fold(), kind)
    assert differ(outputs(folded, pixels), want) < 0.05
    quantized, _ = in_8_bits(subject, kind)
    with pytest.raises(ValueError, match="fold: every layer.*quantize the folded copy"):
        quantized.fold()


def with_lora(subject):
    peft = pytest.importorskip("peft")
    names = [name for name, m in subject.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    wrapped = peft.get_peft_model(subject, peft.LoraConfig(r=2, target_modules=names))
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return wrapped.eval(), len(names)


@pytest.mark.parametrize("grad", [False, True])
def test_lora(subject, grad):
    """An adapter at every layer gives what its merged weights give."""
    pixels = clips()
    with torch.set_grad_enabled(grad):
        want = outputs(subject, pixels)
        wrapped, count = with_lora(subject)
        assert sum(hasattr(m, "base_layer") for m in wrapped.modules()) == count
        got = outputs(wrapped.base_model.model, pixels)
        merged = outputs(wrapped.merge_and_unload(), pixels)
    assert differ(got, merged) < 1e-5 and differ(got, want) > 0.01


@torch.no_grad()
def test_lora_and_fold():
    wrapped, _ = with_lora(model("BTAdapter"))
    pixels = clips()
    want = outputs(wrapped.base_model.model, pixels)
    with pytest.raises(ValueError, match="got a peft.*merge adapters"):
        wrapped.fold()
    assert differ(outputs(wrapped.merge_and_unload().fold(), pixels), want) < 1e-5


@pytest.mark.parametrize("kind", ["forward", "hook", "parametrized"])
def test_fold_refuses(kind):
    subject = model("BTAdapter")
    layer = subject.temporal.branch.temporal[0].qkv
    if kind == "forward":
        layer.forward = layer.forward
    elif kind == "hook":
        layer.register_forward_hook(lambda *args: None)
    else:
        parametrizations.weight_norm(layer)
    with pytest.raises(ValueError, match=r"fold: every layer.*branch.temporal.0.qkv"):
        subject.fold()
