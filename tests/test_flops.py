"""Counts against closed formulas, and against the published costs of the whole encoders."""

import json

import pytest
import torch
import torch.nn.functional as F

from pyvidx.__main__ import main
from pyvidx.models import BTAdapterConfig
from pyvidx.models.flops import FAMILY, count, meta_encoder, peak_bytes
from pyvidx.ops import bank_attention, temporal_attention
from pyvidx.reference.bt_adapter import ReferenceBTAdapter
from pyvidx.temporal.grouping import grouping

LARGE = BTAdapterConfig.named("clip-l-14").vision
N, P, C, L = 1 + LARGE.patches, LARGE.patches, LARGE.width, LARGE.layers


def meta(*shape):
    return torch.empty(*shape, device="meta")


@torch.no_grad()
def forward(name, options, T, vision=LARGE, outputs=None):
    encoder = meta_encoder(vision, name, options)
    return count(lambda: encoder(meta(1, T, 3, vision.image_size, vision.image_size), outputs=outputs))


def block(tokens):  # one CLIP block
    return 24 * tokens * C**2 + 4 * tokens**2 * C


def tower(T):
    patches, projection = 2 * P * 3 * LARGE.patch_size**2 * C, 2 * C * LARGE.embed_dim
    return T * (L * block(N) + patches + projection)


@pytest.mark.parametrize("T", [1, 8])
@torch.no_grad()
def test_the_tower(T):
    """The last layer works for the class token alone: a block of one token, and a weight of every head for each."""
    encoder, pixels = meta_encoder(LARGE, "mean", {}), meta(1, T, 3, LARGE.image_size, LARGE.image_size)
    assert count(lambda: encoder.from_layers(encoder.layers(pixels))) == tower(T)
    alone = 24 * C**2 + 4 * N * LARGE.heads * C
    assert forward("mean", {}, T) == tower(T) - T * (block(N) - alone)


def test_closed_formulas():
    """Per layer, as in the papers; what runs once (patches, projections) is the same in all."""
    T, once = 8, tower(8) - 8 * (L * block(N) + 2 * C * LARGE.embed_dim)
    final = 2 * C * LARGE.embed_dim
    assert forward("joint", {}, T) == once + final + L * block(1 + T * P)
    time = 8 * T * N * C**2 + 4 * N * T**2 * C
    assert forward("separate", {"fc": False}, T) == tower(T) + L * time
    assert forward("separate", {"layers": 4}, T) == tower(T) + 4 * (time + 2 * T * N * C**2)
    adapters = T * 4 * P * C * 384  # the convolution over time is elementwise
    assert forward("st_adapter", {"places": "mlp"}, T) == tower(T) + L * adapters - (T - 1) * final
    M = 4
    mlp_and_linear, attention = 24 * (M + T * P) * C**2, 4 * C * (M * (M + T * P) + T * P * (M + P))
    assert forward("clip_vip", {}, T) == once + final + L * (mlp_and_linear + attention)


@pytest.mark.parametrize("T", [8, 64])
@torch.no_grad()
def test_branch_layers(T):
    """Every branch layer in full: 10 C^2 + 4 T C per patch in time; a block of every frame in space."""
    branch = meta_encoder(LARGE, "bt_adapter", {}).temporal.branch
    xs = [meta(1, T, N, C) for _ in range(4)]
    time, space = T * P * (10 * C**2 + 4 * T * C), T * block(N)
    assert count(lambda: branch(xs, meta(N, C), grouping(T, P))) == 4 * (time + space)


@pytest.mark.parametrize(
    "tower_name, T, gflop",
    [("mma", 8, 1597.5), ("mma", 16, 3195.5), ("mma", 64, 12794.7), ("llava", 64, 12853.7), ("llava", 100, 18094.1)],
)
@torch.no_grad()
def test_official_towers(tower_name, T, gflop):
    """What was counted op by op on the official code."""
    with torch.device("meta"):
        model = ReferenceBTAdapter(BTAdapterConfig.named("clip-l-14"), tower_name)
    assert count(lambda: model(meta(1, T, 3, 224, 224))) == pytest.approx(gflop * 1e9, abs=0.06e9)


@pytest.mark.parametrize(
    "T, joint, separate, last4",
    [(8, 1.28, 1.32, 1.067), pytest.param(64, 3.53, 1.33, 1.068, marks=pytest.mark.slow)],
)
def test_whole_encoders(T, joint, separate, last4):
    """Over the tower alone, within 1 %; a branch costs less than its layers in full, since what nobody reads is not
    computed."""
    base = tower(T)
    assert forward("joint", {}, T) / base == pytest.approx(joint, rel=0.01)
    assert forward("separate", {"fc": False}, T) / base == pytest.approx(separate, rel=0.01)
    assert forward("separate", {"layers": 4}, T) / base == pytest.approx(last4, rel=0.01)
    assert forward("clip_vip", {}, T) / base == pytest.approx(1.0, rel=0.01)
    assert forward("st_adapter", {"places": "mlp"}, T) / base == pytest.approx(1.06, rel=0.01)
    assert 1.15 < forward("stan", {}, T) / base < 1.235
    assert forward("bt_adapter", {}, T, outputs=("tokens",)) < forward("bt_adapter", {}, T)


@pytest.mark.parametrize(
    "size, name, options, millions",
    [
        ("clip-l-14", "bt_adapter", {}, 71.453696),
        ("clip-l-14", "st_adapter", {"places": "mlp"}, 18.9),
        ("clip-b-16", "st_adapter", {"places": "mlp"}, 7.11),
        ("clip-l-14", "clip_vip", {}, 0.01536),  # 3 proxies, 12 rows of time
    ],
)
def test_trained_parameters(size, name, options, millions):
    encoder = meta_encoder(BTAdapterConfig.named(size).vision, name, options)
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    assert trained == pytest.approx(millions * 1e6, rel=0.003)


def test_own_ops():
    B, T, K, H, D, M, n = 2, 5, 3, 4, 8, 7, 6
    qkv = torch.randn(B, T, K, 3, H, D, requires_grad=True)
    forwards = 4 * B * K * H * T * T * D
    assert count(lambda: temporal_attention(qkv)) == forwards
    assert count(lambda: temporal_attention(qkv.detach(), out=torch.empty(B, T, K, H * D))) == forwards
    y = temporal_attention(qkv)
    assert count(lambda: y.sum().backward()) == 5 * forwards // 2
    q, rows = torch.randn(B, 1, n, H * D), torch.randn(B, M, K, 2 * H * D)
    assert count(lambda: bank_attention(q, rows, None, H)) == 4 * B * n * M * K * H * D


def test_attention_on_the_cpu_is_counted():
    """As much as on a device where torch knows the kernel."""
    q = torch.randn(2, 3, 16, 8, requires_grad=True)
    want = 4 * 2 * 3 * 16 * 16 * 8
    with torch.no_grad():
        assert count(lambda: F.scaled_dot_product_attention(q, q, q)) == want
        assert count(lambda: F.scaled_dot_product_attention(q.to("meta"), q.to("meta"), q.to("meta"))) == want
    y = F.scaled_dot_product_attention(q, q, q)
    assert count(lambda: y.sum().backward()) == 5 * want // 2


def test_peak_bytes():
    """What dies before does not count; views are not new; what was there before is not counted."""
    x = meta(1000)

    def run():
        a = x + 1  # 4000
        b = a.view(10, 100) * 2  # 8000
        del a
        c = b[:5] + 1  # 6000
        return c

    assert peak_bytes(run) == 8000
    q = meta(1, 2, 1000, 8)
    assert peak_bytes(lambda: F.scaled_dot_product_attention(q, q, q)) == 4 * 2 * 1000 * 8, "no scores"


def test_command(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "costs.json", tmp_path / "costs.png"
    arguments = ["pyvidx", "flops", "--size", "tiny", "--json", str(path), "--plot", str(picture), "--frames"]
    monkeypatch.setattr("sys.argv", [*arguments, "2"])
    assert main() == 0
    text = capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["about"] == {"size": "tiny", "dtype": "float16", "torch": torch.__version__}
    assert [c["module"] for c in written["costs"]] == [label for label, _, _ in FAMILY]
    for cost in written["costs"]:
        assert cost["frames"] == 2 and cost["ratio"] > 0.9 and cost["activation_bytes"] > 0
        assert f"{cost['module']:18} {cost['trained'] / 1e6:10.2f} {cost['flops'] / 1e9:10.1f}" in text
    mean = written["costs"][0]
    assert mean["ratio"] == 1 and mean["trained"] == 0 and mean["weight_bytes"] == 2 * mean["parameters"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("sys.argv", [*arguments, "2"])
    with pytest.raises(SystemExit):
        main()
    assert "costs.json exists" in capsys.readouterr().err
