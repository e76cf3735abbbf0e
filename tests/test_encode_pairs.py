"""pyvidx encode FOLDER --model M --module X --out DIR: every temporal module on every family of towers."""

import pytest
import torch

from pyvidx import temporal
from pyvidx.cli.encode import main as encode
from pyvidx.corpus import embeddings
from pyvidx.corpus.encode import sized
from pyvidx.hosts.open import open_model
from pyvidx.preprocess import preprocess
from pyvidx.video import read, write
from tests.drawn import drawn_clip
from tests.test_backbones import SIZES, hf_clip, randomized
from tests.test_malmm_checkpoints import host
from tests.test_siglip import of_transformers

pytest.importorskip("av", reason="reading video needs PyAV: pip install 'pyvidx[video]'")
pytest.importorskip("pyarrow", reason="a folder is Parquet: pip install 'pyvidx[cli]'")
TOWERS = {"clip": lambda: randomized(hf_clip(SIZES)), "siglip": of_transformers, "eva": lambda: host("blip2")}
OPTIONS = {"stan": ":depth=2", "branch": ":depth=2", "bt_adapter": ":depth=2", "st_adapter": ":width=4"}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Two clips and a broken file, and a folder of transformers for each tower."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, size in (("a", (48, 64)), ("b", (40, 40))):
        write(folder / f"videos/{name}.mp4", drawn_clip(0.3, size), fps=10)
    (folder / "videos/broken.mp4").write_bytes(b"no video" * 100)
    for name, build in TOWERS.items():
        torch.manual_seed(0)
        build().save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("module", temporal.names())
@pytest.mark.parametrize("tower", TOWERS)
def test_a_pair(given, tower, module, tmp_path, capsys):
    named = module + OPTIONS.get(module, "")
    command = ["--model", str(given / tower), "--module", named, "--frames", "3", "--out", str(tmp_path / "out")]
    assert encode([str(given / "videos/a.mp4"), *command]) == 0
    said = capsys.readouterr().err
    preset = "siglip" if tower == "siglip" else "clip"
    assert f"pixels as {preset}\n" in said and f"module: {module}" in said
    assert encode([str(given / "videos"), *command, "--resume"]) == 1, "the broken file is a row, and an error"
    rows, about = embeddings.load(tmp_path / "out")
    assert [r.path.rsplit("/")[-1] for r in rows if r.error is None] == ["a.mp4", "b.mp4"] and len(rows) == 3
    assert about["module"] == named
    model, _ = open_model(given / tower, named)
    for row in rows[:2]:
        pixels = preprocess(read(row.path, frames=3).frames, sized(preset, model))[None]
        with torch.inference_mode():
            want = model(pixels)
        torch.testing.assert_close(row.encoding.pooled, want.pooled, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(row.encoding.tokens, want.tokens, rtol=1e-4, atol=1e-4)


def test_int8(given, tmp_path):
    """Close to float32, and another corpus: a run in one precision does not go on with another's."""
    command = [str(given / "videos/a.mp4"), "--model", str(given / "clip"), "--frames", "3", "--out"]
    assert encode([*command, str(tmp_path / "whole")]) == 0
    assert encode([*command, str(tmp_path / "int8"), "--precision", "int8"]) == 0
    whole, int8 = (embeddings.load(tmp_path / name)[0][0].encoding.pooled for name in ("whole", "int8"))
    assert torch.nn.functional.cosine_similarity(whole, int8) > 0.99 and not torch.equal(whole, int8)
    with pytest.raises(SystemExit):
        encode([*command, str(tmp_path / "whole"), "--precision", "int8", "--resume"])
