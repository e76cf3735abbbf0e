"""pyvidx plan pretrain: counted work against closed counts, and what becomes of it."""

import pytest
import torch

from pyvidx.cli import plan as cli
from pyvidx.models.config import BTAdapterConfig
from pyvidx.reference.bt_adapter import ReferenceBTAdapter
from pyvidx.train.cost import Cost, Plan, Shares, cards, count, parts, reduce_seconds, seconds

GIGA = 1e9


@pytest.fixture(scope="module")
def masked():
    return parts(Plan(batch=2))


@pytest.fixture(scope="module")
def unmasked():
    return parts(Plan(batch=2, mask_rate=0.0))


def per_video(cost: Cost) -> float:
    return cost.flops / GIGA / 2


def test_a_product_is_counted_exactly():
    a, b = torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta")
    product = Cost(2 * 3 * 5 * 7, 4 * (15 + 35 + 21), 0)
    assert count(lambda: a @ b) == count(lambda: a[None] @ b) == product
    assert count(lambda: a + 1) == Cost(0, 0, 4 * 30)
    assert count(lambda: a.T[1:].view(4, 3)) == Cost()


@pytest.mark.parametrize("size, want", [("clip-l-14", 1597.5), ("clip-b-16", 411.0)])
@torch.no_grad()
def test_the_official_forward(size, want):
    """Counted op by op on the public code, T = 8."""
    with torch.device("meta"):
        model = ReferenceBTAdapter(BTAdapterConfig.named(size)).half()
        cost = count(lambda: model(torch.empty(1, 8, 3, 224, 224).half()))
    assert cost.flops / GIGA == pytest.approx(want, abs=0.1)


def test_branch(masked, unmasked):
    """The closed counts of a layer: T n (10 D^2 + 4 T D), S 8 D^2 (n + T) + 16 D^2 (n + 1) + 4 D (P + 1)^2 T."""
    D, T = 1024, 8
    for found, P, want in ((unmasked, 256, 301.4), (masked, 77, 89)):
        n = P * T
        layer = n * (10 * D * D + 4 * T * D) + 8 * D * D * (n + T) + 16 * D * D * (n + 1) + 4 * D * (P + 1) ** 2 * T
        assert 4 * layer / GIGA == pytest.approx(want, abs=0.5)
        # Every frame's copy of the class token goes through the MLP: T rows instead of one.
        assert per_video(found["branch forward"]) == pytest.approx(4 * (layer + 16 * D * D * (T - 1)) / GIGA, rel=1e-4)
        # Twice the forward, and attention's scores once more.
        assert per_video(found["backward"]) == pytest.approx(2 * per_video(found["branch forward"]), rel=0.03)


def test_whole_step(masked, unmasked):
    """A mask of 0.7 saves 70 % of the branch and 34 % of a step: backbone and four branch passes."""
    names = ("backbone", "branch forward", "branch forward again", "backward")
    step = [sum(per_video(found[n]) for n in names) for found in (unmasked, masked)]
    assert per_video(masked["backbone"]) == pytest.approx(1296.2, abs=0.1)
    assert step == pytest.approx([2500, 1652], rel=0.01)
    assert step[1] / step[0] - 1 == pytest.approx(-0.34, abs=0.01)
    assert masked["branch forward"].flops / unmasked["branch forward"].flops == pytest.approx(0.3, abs=0.01)


def test_bytes_of_the_branch(masked):
    """The rest moves at least one pass per fused step of a layer, and little more."""
    N = 2 * 8 * 77 * 1024 * 2  # bytes of one pass over two videos' patch tokens
    least = 4 * (4 + 4 + 4 + 4 + 4 + 8 + 3) * N
    assert least < masked["branch forward"].other_bytes < 1.2 * least


def test_options_change_the_parts():
    small = Plan(size="tiny", batch=2)
    assert set(parts(small)) - set(parts(Plan(size="tiny", batch=2, checkpoint=False))) == {"branch forward again"}
    assert set(parts(small)) - set(parts(Plan(size="tiny", batch=2, cached=True))) == {"backbone", "text tower"}
    v = small.config.vision
    assert Plan(size="tiny").cached_bytes == 2 * (3 * 8 * (1 + v.patches) * v.width + v.embed_dim)


def test_seconds():
    card, shares = {"tflops": 100, "gbps": 1000, "link_gbps": 100}, Shares(0.5, 0.8, 0.5)
    assert seconds(Cost(10**14, 10**9, 8 * 10**9), card, shares) == pytest.approx((2, 0.01))
    assert seconds(Cost(10**12, 8 * 10**11, 0), card, shares) == pytest.approx((1, 0))  # a product bound by its bytes
    assert reduce_seconds(10**9, 1, card, shares) == 0
    assert reduce_seconds(10**9, 8, card, shares) == pytest.approx(4 * 2 * 7 / 8 / 50)
    with pytest.raises(ValueError, match="share of memory"):
        Shares(memory=1.5)


def test_command(capsys):
    options = "pretrain --size tiny --batch 2 --cards 4 --card h100 --decode-seconds 0.1".split()
    cli.main([*options, "--decode-cores", "10"])
    text = capsys.readouterr().out
    assert cards()["cards"]["h100"]["name"] in text and "assumed, not measured" in text and "slides: 3 hours" in text
    assert "69 core hours: 6.9 hours on 10 cores" in text
    cli.main([*options[:-2], "--cached-features", "--no-mask"])
    text = capsys.readouterr().out
    assert "stored outputs" in text and "mask 0," in text and "decoding" not in text
    for bad, message in {
        "--products-share 2": "share of products",
        "--cards 0": "at least 1",
        "--mask-rate 1": "mask rate",
        "--frames 65": "frames must be",
        "--decode-video /nowhere.mp4": "/nowhere.mp4",
    }.items():
        with pytest.raises(SystemExit):
            cli.main([*options[:7], *bad.split()])
        assert message in capsys.readouterr().err


def test_decoding_is_measured(tmp_path):
    pytest.importorskip("av", reason="reading video needs PyAV: pip install 'pyvidx[video]'")
    from pyvidx.video import write
    from tests.drawn import drawn_clip

    write(tmp_path / "v.mp4", drawn_clip(0.6, (96, 128)), fps=25)
    assert cli.decode_seconds(tmp_path / "v.mp4", 4) > 0
