"""Weight files that are broken or that someone made to break a reader: one error each, which names the file."""

import json
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pyvidx import memory
from pyvidx.models import BTAdapter, TextVideo
from pyvidx.weights.bt_adapter import load_official
from pyvidx.weights.state import read
from pyvidx.weights.towers import vision_tower
from tests.test_checkpoints import CONFIG, clip_keys, state, tower

NOT_WEIGHTS = {
    "is empty": b"",
    "is a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
    "is a web page": b"<!DOCTYPE html><html>",
    "is a compressed archive": b"\x1f\x8b" + bytes(40),
    "is damaged or truncated": b"PK\x03\x04" + bytes(40),
    "is no safetensors file, or is damaged": (1 << 60).to_bytes(8, "little") + b"{}",
    "is not a pickle of plain tensors": b"\x80\x02" + bytes(40),
}


@pytest.mark.parametrize("said", NOT_WEIGHTS)
def test_files_that_are_no_weights(said, tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(NOT_WEIGHTS[said])
    with pytest.raises(ValueError, match=rf"w\.pth {said}"):
        load_official(path)


def test_wrong_tensors(tmp_path):
    """Refused by name before anything of their size is made."""
    weights = state(*tower(6, 4))
    wrong = {
        "must be floating": {"class_embedding": torch.zeros(64, dtype=torch.int64)},
        "must have 2 axes": {"position_embedding.weight": torch.zeros(5)},
        "must have 4 axes": {"patch_embedding.weight": torch.zeros(0)},
        "only plain tensors": {"class_embedding": torch.zeros(64).to_sparse()},
        "meta device": {"class_embedding": torch.zeros(64, device="meta")},
        "claim .* bytes, its storages hold": {"class_embedding": torch.zeros(1).expand(1 << 40)},
        "needs parts of one shape": {"layers.0.self_attn.k_proj.weight": torch.zeros(())},
        "shapes differ": {"position_embedding.weight": torch.zeros(5, 128)},
    }
    for said, change in wrong.items():
        with pytest.raises(ValueError, match=said):
            load_official(weights | change)
    far = {key.replace("layers.3", "layers.99999999"): value for key, value in clip_keys().items()}
    with pytest.raises(ValueError, match="must be numbered from 0"):
        vision_tower(far, hidden_act="quick_gelu")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(10_000_000))
    with pytest.raises(ValueError, match="compressed archive"):
        read(tmp_path / "bomb.pt")


HEADERS = [
    {"config": None}, {"config": {"vision": 3}}, {"compat": "neither"}, {"compat": ["paper"]}, {"variant": 7},
    {"is_random": "no"}, {"config.depth": 10**9}, {"config.depth": "4"}, {"config.depth": 0}, {"config.gated": 1},
    {"config.time_length": 10**9}, {"config.time_length": -1}, {"config.gate_scale": float("nan")},
    {"config.vision.width": 10**9}, {"config.vision.layers": 10**9}, {"config.vision.heads": 0},
    {"config.vision.image_size": 2**31}, {"config.vision.patch_size": True}, {"config.vision.eps": 1e999},
    {"config.vision.unknown": 1}, {"config.part": "whole"}, {"config.vision.mlp_width": 97},
]  # fmt: skip


@pytest.mark.parametrize("change", HEADERS, ids=str)
def test_headers_are_checked_before_a_model_is_built(change, tmp_path):
    path = BTAdapter(CONFIG).save(tmp_path / "w.safetensors")
    header, weights = header_of(path)
    for where, value in change.items():
        *above, last = where.split(".")
        place = header
        for name in above:
            place = place[name]
        place[last] = value
    save_file(weights, path, {"pyvidx": json.dumps(header)})
    with pytest.raises(ValueError, match=r"w\.safetensors"):
        BTAdapter.from_pretrained(path)


def header_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["pyvidx"]), {name: file.get_tensor(name) for name in file.keys()}


def test_bodies_are_checked(tmp_path):
    path = BTAdapter(CONFIG).save(tmp_path / "w.safetensors")
    header, weights = header_of(path)
    changes = {
        "lacks temporal.branch.time": {k: v for k, v in weights.items() if k != "temporal.branch.time"},
        "has more that is no part": weights | {"more": torch.zeros(1)},
        "temporal.branch.time must be floating": weights
        | {"temporal.branch.time": weights["temporal.branch.time"].int()},
        "temporal.branch.time is .* in the model, .* in the file": weights | {"temporal.branch.time": torch.zeros(3)},
    }
    for said, body in changes.items():
        save_file(body, path, {"pyvidx": json.dumps(header)})
        with pytest.raises(ValueError, match=said):
            BTAdapter.from_pretrained(path)
    for text in ("[]", "{" * 10, "[" * 100_000):
        save_file(weights, path, {"pyvidx": text})
        with pytest.raises(ValueError, match=r"w\.safetensors"):
            BTAdapter.from_pretrained(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"w\.safetensors is no safetensors file, or is damaged"):
        BTAdapter.from_pretrained(path)


def test_text_video_header(tmp_path):
    path = TextVideo.default().save(tmp_path / "w.safetensors")
    header, weights = header_of(path)
    words = header["vocabulary"]
    for change in ({"vocabulary": 3}, {"vocabulary": [1, 2]}, {"vocabulary": [*words, "extra"]}, {"about": []},
                   {"text": {**header["text"], "layers": 10**6}}, {"text": {**header["text"], "odd": 1}}):  # fmt: skip
        save_file(weights, path, {"pyvidx": json.dumps(header | change)})
        with pytest.raises(ValueError, match=r"w\.safetensors"):
            TextVideo.load(path)


BANK = [
    {"order": torch.full((2, 3, 5), 4, dtype=torch.int32)}, {"order": torch.full((2, 3, 5), -1, dtype=torch.int32)},
    {"length": torch.tensor([99, 4], dtype=torch.int32)}, {"length": torch.tensor([-1, 4], dtype=torch.int32)},
    {"length": torch.tensor([4, 4])}, {"sizes": torch.zeros(2, 3, 5, dtype=torch.int32)},
    {"sizes": torch.full((2, 3, 5), -7, dtype=torch.int32)}, {"host": torch.tensor([0, 4, 0])},
    {"host": torch.tensor([3, 400, 0])}, {"host": torch.tensor([3.0, 4.0, 0.0])}, {"host": torch.tensor([3])},
    {"seen": torch.tensor([-5, 20])}, {"rows": torch.zeros(2, 5, 3, 4, dtype=torch.int32)},
    {"rows": torch.full((2, 5, 3, 4), torch.nan)}, {"first": torch.full((2, 3, 5), torch.inf, dtype=torch.float64)},
    {"rows": torch.zeros(2, 5, 3)}, {"last": torch.full((2, 3, 5), -9.0, dtype=torch.float64)},
    {"similarity": torch.zeros(2, 3, 9)}, {"attached.0": torch.zeros(2, 5, 3, 0)}, {"odd": torch.zeros(1)},
]  # fmt: skip


@pytest.mark.parametrize("change", range(len(BANK)))
def test_memory_load_checks_values(change, tmp_path):
    policy = memory.create("merge", capacity=4)
    bank = policy.extend(policy.new(2, 3, 4), torch.randn(2, 20, 3, 4))
    path = memory.save(tmp_path / "m.safetensors", policy, bank)
    tensors, about = bank.state_dict(), {"pyvidx.memory": json.dumps(policy.spec())}
    save_file(tensors | BANK[change], path, about)
    with pytest.raises(ValueError, match=r"memory\.load: .*m\.safetensors holds no bank that can go on"):
        memory.load(path)


def test_memory_load_checks_options(tmp_path):
    policy = memory.create("merge", capacity=4)
    path = memory.save(tmp_path / "m.safetensors", policy, policy.new(1, 2, 3))
    tensors = policy.new(1, 2, 3).state_dict()
    for about in ({}, {"name": "pickle"}, {"name": "merge", "capacity": "4"}, {"name": "merge", "capacity": 10**12},
                  {"name": "merge", "capacity": 4.0}, {"name": "merge", "odd": 1}, {"name": ["merge"]},
                  {"name": "fifo", "capacity": 4}, {"name": "merge", "capacity": 4, "anchors": -1}):  # fmt: skip
        save_file(tensors, path, {"pyvidx.memory": json.dumps(about)})
        with pytest.raises(ValueError, match=r"m\.safetensors"):
            memory.load(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        memory.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="it is a folder"):
        memory.load(tmp_path)


def test_mutated_files():
    """A sample of tests/fuzz/weights.py, whose full run is in tests/fuzz/results."""
    command = [sys.executable, "-m", "tests.fuzz.weights", "--count", "63", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
