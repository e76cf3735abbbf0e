"""Stored features that were cut, changed or made from something else: mended, or refused, and never trained on."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pyvidx.train import Ranks
from pyvidx.train.features import INDEX, Features, StoredPairs, store
from pyvidx.train.pairs import Pair

ABOUT = {"frames": 2, "towers": "abc", "rows": "digest"}
SHAPE = (3, 2, 5, 4, 6)  # d, T, 1+P, C, E


class Rows(torch.utils.data.Dataset):
    """Row 4 is broken, and the one after it comes in its place."""

    def __len__(self):
        return 7

    def __getitem__(self, at):
        row = 5 if at[1] == 4 else at[1]
        broken = {"4\udcff.mp4": "ValueError: no video"} if at[1] == 4 else {}
        return Pair((at[0], row), f"text {row}", torch.full((2, 3), float(10 * at[0] + row)), broken)


calls = []


def frozen(pairs):
    calls.append(len(pairs))
    x = pairs.video[:, :, :1, None].expand(-1, 2, 5, 4)
    return (x, x + 0.25, x + 0.5), torch.arange(6.0).expand(len(pairs), 6)


def fill(folder: Path, about=ABOUT, **changes) -> list:
    """Store, and read all of both variants."""
    features = Features(str(folder), **{"variants": 2, "shard": 4} | changes)
    calls.clear()
    store(features, Rows(), frozen, about, Ranks(), 3, shape=SHAPE)
    stored = StoredPairs(features, about)
    assert stored.digest() == "digest" and len(stored) == 7
    return [stored[epoch, row] for epoch in range(3) for row in range(7)]


def same(got: list, want: list) -> None:
    assert [(p.at, p.broken) for p in got] == [(p.at, p.broken) for p in want]
    torch.testing.assert_close([p.video for p in got], [p.video for p in want], rtol=0, atol=0)


def header(path: Path, change) -> None:
    """Change the JSON in the header of a shard."""
    with safe_open(path, "pt") as file:
        note = json.loads(file.metadata()["pyvidx"])
    save_file(load_file(path), path, {"format": "pt", "pyvidx": json.dumps(change(note))})


def cut(share: float):
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def tensors(**changes):
    def change(path):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file(load_file(path) | changes, path, metadata)

    return change


SHARD_DAMAGES = {
    "gone": Path.unlink,
    "empty": cut(0),
    "half": cut(0.5),
    "cut": cut(0.99),
    "nul": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    "claims": lambda path: path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "rows": tensors(layers=torch.zeros(3, 3, 2, 5, 4).half()),
    "width": tensors(layers=torch.zeros(4, 3, 2, 5, 8).half()),
    "dtype": tensors(layers=torch.zeros(4, 3, 2, 5, 4)),
    "text": tensors(text=torch.zeros(4, 7)),
    "at": tensors(at=torch.zeros(4, 2)),
    "more": tensors(more=torch.zeros(1)),
    "no note": lambda path: save_file(load_file(path), path),
    "note": lambda path: header(path, lambda note: [note]),
    "no about": lambda path: header(path, lambda note: {"broken": {}}),
    "broken": lambda path: header(path, lambda note: note | {"broken": {"x": 1}}),
}


@pytest.mark.parametrize("damage", SHARD_DAMAGES.values(), ids=SHARD_DAMAGES)
@pytest.mark.parametrize("indexed", [True, False])
def test_damaged_shards_are_made_anew(tmp_path, damage, indexed):
    want = fill(tmp_path)
    assert calls == [3, 1, 3, 1, 3, 1, 2]
    damage(tmp_path / "00001.safetensors")
    if not indexed:
        (tmp_path / INDEX).unlink()
    same(fill(tmp_path), want)
    assert calls == [3, 1] and not list(tmp_path.glob(".*"))
    same(fill(tmp_path), want)
    assert calls == []


INDEX_DAMAGES = [b"", b"{", b"null", b"[]", b"[" * 10**5, b"\0" * 100, b"\xff\xfe", b'{"about": {}}',
                 {"rows": 10**12}, {"rows": "7"}, {"rows": True}, {"rows": -1}, {"broken": []}, {"broken": {"x": {}}},
                 {"broken": {"1": "a"}}, {"broken": {"1" * 5000: {}}}, {"broken": {"1": {"a.mp4": 5}}},
                 {"about": None}]  # fmt: skip


@pytest.mark.parametrize("damage", INDEX_DAMAGES, ids=range(len(INDEX_DAMAGES)))
def test_a_damaged_index_is_made_anew(tmp_path, damage):
    want = fill(tmp_path)
    content = (tmp_path / INDEX).read_text()
    if isinstance(damage, dict):
        damage = json.dumps(json.loads(content) | damage).encode()
    (tmp_path / INDEX).write_bytes(damage)
    same(fill(tmp_path), want)
    assert calls == [] and (tmp_path / INDEX).read_text() == content


def test_features_of_something_else_are_kept(tmp_path):
    """With an index or without: they may have taken days."""
    fill(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in (INDEX, "00000.safetensors"):
        with pytest.raises(ValueError, match=r"are of something else: towers abc \(now xyz\); remove them or give"):
            fill(tmp_path, ABOUT | {"towers": "xyz"})
        assert calls == [] and {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
        (tmp_path / name).unlink(), before.pop(name)


def test_a_shard_that_goes_away_is_named(tmp_path):
    fill(tmp_path)
    stored = StoredPairs(Features(str(tmp_path), variants=2, shard=4), ABOUT)
    tensors(at=torch.full((4, 2), 10**9))(tmp_path / "00000.safetensors")
    cut(0.5)(tmp_path / "00001.safetensors")
    (tmp_path / "00002.safetensors").unlink()
    for place, name in (((0, 0), "00000"), ((0, 5), "00001"), ((1, 2), "00002")):
        with pytest.raises(RuntimeError, match=f"{name}.safetensors"):
            stored[place]
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ValueError, match="index.json is damaged"):
        StoredPairs(Features(str(tmp_path), variants=2, shard=4), ABOUT)
    with pytest.raises(FileNotFoundError, match=r"there is no .*index.json"):
        StoredPairs(Features(str(tmp_path / "other")), ABOUT)
