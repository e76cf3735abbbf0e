"""Weights as they lie on people's disks: wrappers, entries, archives, shards, and what is broken or hostile."""

import argparse
import json
import pickle
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pyvidx.hosts.importing import importing
from pyvidx.hosts.open import open_model
from pyvidx.models import MALMM, BTAdapter, VideoEncoder
from pyvidx.weights.bt_adapter import load_official
from pyvidx.weights.malmm import export_malmm, load_malmm
from pyvidx.weights.state import read, state_of
from pyvidx.weights.text_towers import text_tower
from pyvidx.weights.towers import vision_tower
from tests.test_checkpoints import CONFIG, clip_keys, expect_backbone, mma_file, state, tower

QUICK = {"hidden_act": "quick_gelu"}
WRAPPERS = (
    "_orig_mod.", "module.", "model.", "clip.", "net.", "base_model.model.", "image_encoder.", "visual_encoder.",
    "student.", "0.", "module._orig_mod.", "net.0.module.model.", "_orig_mod.base_model.model.clip.",
    "my_wrapper.inner.",    "model.vision_tower.vision_tower.", "_fsdp_wrapped_module.", "trunk.",
)  # fmt: skip


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_wrappers(prefix):
    """Around a whole tower, around a CLIP with its text tower, around MA-LMM."""
    plain = state(*tower(6, 4))
    model, report = load_official({prefix + key: value for key, value in plain.items()})
    assert not report.unexpected and len(report.loaded) == len(list(model.parameters()))
    expect_backbone(model)
    if not prefix.startswith(("image", "visual", "trunk")) and "vision" not in prefix:
        counted = clip_keys() | {"n_averaged": torch.tensor(3)}
        clip = vision_tower({prefix + key: value for key, value in counted.items()}, **QUICK)
        assert torch.equal(clip.blocks["3"].fc1.weight, model.tower.blocks["3"].fc1.weight)
        ours = MALMM.default()
        wrapped = {prefix + key: value for key, value in export_malmm(ours, "lavis").items()}
        found, report = load_malmm(wrapped, vision_heads=4, heads=4)
        assert not report.unexpected and torch.equal(found.qformer.query_tokens, ours.qformer.query_tokens)


def test_wrappers_inside():
    inside = {k.replace("layers.0.", "layers.0._checkpoint_wrapped_module."): v for k, v in state(*tower(6, 4)).items()}
    expect_backbone(load_official(inside)[0])


def test_a_language_model_beside_the_tower():
    """Its layers, named like a bare tower's, are not taken for the tower's."""
    chat = state(*tower(6, 4), prefix="model.vision_tower.") | {
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(3, 3), "model.embed_tokens.weight": torch.zeros(3, 3),
        "model.norm.weight": torch.zeros(3), "lm_head.weight": torch.zeros(3, 3),
    }  # fmt: skip
    model, report = load_official(chat)
    expect_backbone(model)
    assert len(report.left_out) == 4 and not report.unexpected


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"model_state_dict": w, "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
        lambda w: {"module": w, "global_step": 7},
        lambda w: {"model": {"state_dict": w}, "args": argparse.Namespace(lr=1e-4, name="x")},
        lambda w: {"state_dict": w, "hyper_parameters": {"a": torch.zeros(2)}, "step": torch.tensor(3)},
        lambda w: w | {"step": 12, "args": argparse.Namespace(lr=1.0), "done": None},
        lambda w: {"ema": w, "epoch": 1},
        lambda w: {"a_name_of_its_own": w, "epoch": 1},
    ],
)
def test_entries(wrap, tmp_path):
    weights = state(*tower(6, 4))
    torch.save(wrap(weights), tmp_path / "w.pth")
    model, report = load_official(tmp_path / "w.pth")
    expect_backbone(model)
    assert not report.unexpected


def test_which_entry(tmp_path):
    torch.save({"model": {"a": torch.zeros(2)}, "ema": {"a": torch.ones(2)}}, tmp_path / "w.pt")
    with pytest.warns(UserWarning, match="holds model, ema; model is read"):
        assert not read(tmp_path / "w.pt")["a"].any()
    assert read(tmp_path / "w.pt", entry="ema")["a"].all()
    with pytest.raises(ValueError, match="must have an entry 'teacher', it has 'model', 'ema'"):
        read(tmp_path / "w.pt", entry="teacher")
    torch.save({"a": {"x": torch.ones(1)}, "b": {"x": torch.ones(1)}}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match="must hold a state dict .* it holds 'a', 'b'"):
        read(tmp_path / "two.pt")


def scripted(weights):
    """A TorchScript program whose state dict is this."""
    root = nn.Module()
    for key, value in weights.items():
        *parts, leaf = key.split(".")
        module = root
        for part in parts:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    return torch.jit.script(root)


def test_torchscript(tmp_path):
    """OpenAI's files: their tensors are read, their program is not run."""
    weights = {f"visual.{k}": v.half() for k, v in state(*tower(6, 4)).items()}
    weights |= {"visual.part": torch.arange(6.0).view(2, 3).t(), "logit_scale": torch.tensor(2.0)}
    program = scripted(weights)
    program.save(tmp_path / "clip.pt")
    found, want = read(tmp_path / "clip.pt"), program.state_dict()
    assert found.keys() == want.keys()
    assert all(torch.equal(found[k], want[k]) and found[k].dtype == want[k].dtype for k in want)
    model, report = load_official(tmp_path / "clip.pt")
    assert report.unexpected == ["visual.part"] and report.left_out == ["logit_scale"]
    assert torch.equal(state_of(program)["visual.part"], want["visual.part"])


def test_a_torchscript_archive_calls_nothing(tmp_path):
    class Writes:
        def __reduce__(self):
            return open, (str(tmp_path / "pwned"), "w")

    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/constants.pkl", pickle.dumps(()))
        archive.writestr("evil/data.pkl", pickle.dumps({"weight": Writes()}, protocol=2))
    with pytest.raises(ValueError, match="must hold a state dict"):
        read(tmp_path / "evil.pt")
    torch.save({"weight": torch.zeros(1), "extra": Writes()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"holds objects of .*open.* weights_only=True"):
        read(tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(suffix, tmp_path):
    weights = state(*tower(6, 4))
    names, stem = list(weights), {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    places = {}
    for i in (1, 2):
        part = {name: weights[name] for name in names[i - 1 :: 2]}
        file = f"{stem}-0000{i}-of-00002.{suffix}"
        (save_file if suffix == "safetensors" else torch.save)(part, tmp_path / file)
        places |= dict.fromkeys(part, file)
    expect_backbone(load_official(tmp_path)[0])  # the folder without an index
    index = tmp_path / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for path in (index, tmp_path):
        expect_backbone(load_official(path)[0])

    index.write_text(json.dumps({"weight_map": places | {"a": "../../etc/passwd"}}))
    with pytest.raises(ValueError, match="must name files beside it"):
        load_official(index)
    index.write_text(json.dumps({"weight_map": places | {"lost": file}}))
    with pytest.raises(ValueError, match="lack 1 weights, e.g. lost"):
        load_official(index)
    index.write_text("{" * 100000)
    with pytest.raises(ValueError, match="is no index of shards"):
        load_official(index)
    index.unlink()
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"lack {file}"):
        load_official(tmp_path)


def test_activation_is_told_or_warned_of(tmp_path):
    tuned = state(*tower(0, 3, head=False, embeddings=False, gates=False))
    with pytest.warns(UserWarning, match="hidden_act='gelu'"):
        load_official(clip_keys(), tuned, part="tokens")
    with pytest.warns(UserWarning, match="hidden_act='gelu'"):
        vision_tower(clip_keys())
    torch.save(clip_keys(), tmp_path / "pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"vision_cfg": {"width": 64, "head_width": 32}}}')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_official(mma_file())[0].config.vision.hidden_act == "quick_gelu"  # the authors' own
        vision = load_official(tmp_path, tuned, part="tokens")[0].config.vision
        assert (vision.hidden_act, vision.heads) == ("gelu", 2)
    (tmp_path / "config.json").write_text('{"vision_config": {"num_attention_heads": 2, "hidden_act": "mish"}}')
    with pytest.raises(ValueError, match="hidden_act must be one of quick_gelu, gelu.*mish"):
        load_official(tmp_path, tuned, part="tokens")


def test_errors_name_the_keys_and_the_door(tmp_path):
    expected = {
        "give the branch after it": clip_keys(),
        "give its CLIP before it": state(*tower(0, 3, head=False, embeddings=False, gates=False)),
        "load_malmm reads those": export_malmm(MALMM.default(), "lavis"),
        "from_pretrained": BTAdapter(CONFIG).state_dict(),
        r"the keys are blocks.\*.w \(2\); none of them is understood": {f"blocks.{i}.w": torch.ones(1) for i in (0, 1)},
    }
    for said, weights in expected.items():
        with pytest.raises(ValueError, match=said):
            load_official(weights)
    with pytest.raises(ValueError, match="the keys are .*load_official reads those"):
        load_malmm(mma_file())
    with pytest.raises(ValueError, match="the keys are w; none of them"):
        load_malmm({"w": torch.zeros(1)})
    with pytest.raises(ValueError, match="the keys are w"):
        vision_tower({"w": torch.zeros(1)})
    with pytest.raises(ValueError, match="is of an adapter: merge it first"):
        vision_tower(clip_keys() | {"vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="w is not understood; the keys are w"):
        text_tower({"w": torch.zeros(1)})


DOORS = {BTAdapter: "bt_adapter.load_official", MALMM: "malmm.load_malmm", VideoEncoder: "pyvidx.weights"}


@pytest.mark.parametrize("kind", DOORS)
def test_from_pretrained_names_the_right_door(kind, tmp_path):
    torch.save({}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=rf"x\.pth is no file of save.*{DOORS[kind]}"):
        kind.from_pretrained(tmp_path / "x.pth")
    for path in (tmp_path / "none.pth", "openai/clip-vit-large-patch14"):
        with pytest.raises(FileNotFoundError, match=rf"there is no {path}.*nothing is downloaded.*{DOORS[kind]}"):
            kind.from_pretrained(path)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=rf"holds weights that pyvidx did not write; .*{DOORS[kind]}"):
        kind.from_pretrained(tmp_path / "other.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ValueError, match="it is a folder"):
        kind.from_pretrained(tmp_path / "folder.safetensors")


def test_one_door(tmp_path):
    """One door for both kinds of files, as the command line has it."""
    torch.save(mma_file(), tmp_path / "pretrain.pth")
    official = open_model(tmp_path / "pretrain.pth", gated=False)[0]
    assert (official.compat, official.config.gated) == ("official", False)
    assert open_model(tmp_path / "pretrain.pth", compat="paper")[0].compat == "paper"
    official.save(tmp_path / "ours")
    for path in (tmp_path / "ours", tmp_path / "ours/model.safetensors"):
        assert open_model(path)[0].compat == "official" and open_model(path, compat="paper")[0].compat == "paper"
    with pytest.raises(ValueError, match="gated must not be given"):
        open_model(tmp_path / "ours", gated=True)[0]
    with pytest.raises(FileNotFoundError, match="there is no"):
        open_model(tmp_path / "none")[0]


def test_a_torchvision_of_another_torch_is_named():
    def fails(error):
        with importing("tokenizer", "open_clip"):
            raise error

    with pytest.raises(RuntimeError, match="tokenizer: open_clip .* torchvision .* --force-reinstall"):
        fails(RuntimeError("operator torchvision::nms does not exist"))
    lazy = ModuleNotFoundError("Could not import module 'CLIPModel'. Are this object's requirements defined correctly?")
    lazy.__cause__ = RuntimeError("operator torchvision::nms does not exist")
    with pytest.raises(RuntimeError, match="--force-reinstall"):
        fails(lazy)
    with pytest.raises(RuntimeError, match=r"needs open_clip \(No module named 'open_clip'\): pip install 'pyvidx"):
        fails(ModuleNotFoundError("No module named 'open_clip'"))
    with pytest.raises(RuntimeError, match="^something else$"):
        fails(RuntimeError("something else"))
