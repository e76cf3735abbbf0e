"""A corpus: rows leave memory as they come, and a run that was killed goes on as if nobody had."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch

from pyvidx import corpus
from pyvidx.cli.encode import main as encode
from pyvidx.corpus import Corpus, Encoded, Manifest, engines, stores
from pyvidx.corpus.encode import Timing, encode_videos
from pyvidx.corpus.folder import MANIFEST, check, parts
from pyvidx.models import Encoding, TextVideo
from pyvidx.video import Damage, write
from tests.drawn import drawn_clip

pytest.importorskip("av", reason="reading video needs PyAV: pip install 'pyvidx[video]'")
pytest.importorskip("pyarrow")
STORES = list(stores.STORES)
RAW = os.fsdecode(b"caf\xe9 \xff.mp4")  # no UTF-8


def row(path, error=None, tokens=3, frames=2, **more):
    if error:
        return Encoded(path, error=error)
    draws = torch.Generator().manual_seed(sum(path.encode(errors="surrogateescape")))
    seconds = torch.arange(frames, dtype=torch.float64) / 3
    encoding = Encoding(torch.randn(1, tokens, 4, generator=draws), torch.randn(1, 6, generator=draws), seconds[None])
    return Encoded(path, encoding, seconds, **more)


def made(store="parquet", dtype="float32", **options):
    return Manifest(store, {"pooled": 6, "tokens": 4}, dtype, {"frames": "2", "weights": "abc"} | options)


def same(one, other):
    """Equal but for a float16's rounding."""
    assert (one.path, one.error, one.damaged) == (other.path, other.error, other.damaged)
    if one.error is None:
        assert torch.equal(one.seconds, other.seconds)
        assert list(one.encoding) == list(other.encoding)
        for name in {*one.encoding} - {"times"}:
            torch.testing.assert_close(one.encoding[name], other.encoding[name].to(one.encoding[name].dtype))


ROWS = [
    row("a.mp4"), row("bad.mp4", "RuntimeError: x\nand more"), row(RAW, frames=1), row("c.mp4", tokens=5),
    row("d.mp4", damaged=Damage(cut=True, reason="its end is missing")), row("worse.mp4", "ValueError: y"),
]  # fmt: skip


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("size", [1, 2, 100])
def test_rows_come_back(store, size, tmp_path):
    with Corpus(tmp_path / "c", made(store), rows=size) as folder:
        for one in ROWS:
            folder.add(one)
        assert len(parts(tmp_path / "c")) == len(ROWS) // size
    found = {one.path: one for one in corpus.iterate(tmp_path / "c")}
    assert len(found) == len(ROWS) == len(list(corpus.iterate(tmp_path / "c")))
    for one in ROWS:
        same(found[one.path], one)
    whole = corpus.read(tmp_path / "c")
    assert set(whole.paths) | set(whole.errors) == {one.path for one in ROWS}
    assert whole.errors == {"bad.mp4": "RuntimeError: x\nand more", "worse.mp4": "ValueError: y"}
    assert whole.pooled.shape == (4, 6) and len(whole.seconds) == 4 and whole.about["frames"] == "2"
    assert sorted(len(one) for one in whole.tokens) == [3, 3, 3, 5], "where videos differ, a list"
    assert corpus.read(tmp_path / "c", ["pooled"]).tokens is None
    assert corpus.load(tmp_path / "c")[1] == whole.about


@pytest.mark.parametrize("store", STORES)
def test_sixteen_bits(store, tmp_path):
    given = [Encoded(r.path, r.encoding and Encoding(r.encoding.tokens.half(), r.encoding.pooled.half()), r.seconds,
                     r.error, r.damaged) for r in ROWS]  # fmt: skip
    with Corpus(tmp_path / "c", made(store, "float16")) as folder:
        for one in given:
            folder.add(one)
    whole = corpus.read(tmp_path / "c")
    assert whole.pooled.dtype == whole.tokens[0].dtype == torch.float16
    for one in given:
        if one.error is None:
            assert torch.equal(whole.pooled[whole.paths.index(one.path)], one.encoding.pooled[0])


@pytest.mark.parametrize("store", STORES)
def test_rows_are_kept_in_the_dtype_of_the_folder(store, tmp_path):
    with Corpus(tmp_path / "c", made(store, "float16")) as folder:
        for one in ROWS:
            folder.add(one)
        wide = row("wide.mp4")
        wide.encoding.pooled[0, 0] = 1e5
        with pytest.raises(ValueError, match="must be finite, got NaN or Inf of wide.mp4 in torch.float16"):
            folder.add(wide)
    whole = corpus.read(tmp_path / "c")
    assert whole.pooled.dtype == whole.tokens[0].dtype == torch.float16
    if torch.bfloat16 not in stores.named(store).dtypes:
        with pytest.raises(ValueError, match="must hold float32 or float16, got torch.bfloat16"):
            Corpus(tmp_path / "d", made(store, "bfloat16"))


def test_parquet_is_one_table_for_any_reader(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    many = [row(f"{i:03d}.mp4") for i in range(50)]
    failed = [row(f"x{i}.mp4", "RuntimeError: x") for i in range(3)]
    with Corpus(tmp_path / "c", made(dtype="float16"), rows=3) as folder:
        for one in failed + many:  # the first part has no embedding at all
            folder.add(one)
    table = pq.read_table(tmp_path / "c")
    assert table.schema.field("pooled").type == pa.list_(pa.float16())  # null in a fixed size is not for every Arrow
    assert table.schema.field("tokens").type.value_type == pa.list_(pa.float16(), 4)
    assert {"path", "error", "seconds", "damaged"} < set(table.column_names) and len(table) == 53
    assert np.asarray(table["pooled"].to_pylist()[5], np.float16).tolist() == many[2].encoding.pooled[0].half().tolist()
    assert table["error"].to_pylist()[:4] == ["RuntimeError: x"] * 3 + [None]


def test_parquet_of_the_first_release_is_read(tmp_path):
    """Its pooled embeddings were lists of fixed size."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    stores.named("parquet").write(
        tmp_path / "a.parquet", rows := [row(f"{i}.mp4") for i in range(3)], made().layout, {}
    )
    table = pq.read_table(tmp_path / "a.parquet")
    place = table.column_names.index("pooled")
    pq.write_table(
        table.set_column(place, "pooled", table["pooled"].cast(pa.list_(pa.float32(), 6))), tmp_path / "b.parquet"
    )
    assert torch.equal(corpus.read(tmp_path / "b.parquet").pooled, torch.cat([one.encoding.pooled for one in rows]))


def test_large_parts_have_row_groups(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    monkeypatch.setattr("pyvidx.corpus.stores.parquet._GROUP", 1000)
    stores.named("parquet").write(tmp_path / "a.parquet", [row(f"{i}") for i in range(50)], made().layout, {})
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups > 5
    assert len(corpus.load(tmp_path / "a.parquet")[0]) == 50


def test_a_part_is_written_for_many_rows_bytes_or_seconds(tmp_path):
    with Corpus(tmp_path / "bytes", made(), size=100) as folder:
        folder.add(row("a", tokens=1))
        assert not parts(tmp_path / "bytes")
        folder.add(row("b", tokens=50))
        assert len(parts(tmp_path / "bytes")) == 1
    with Corpus(tmp_path / "seconds", made(), seconds=0.0) as folder:
        folder.add(row("a"))
        assert len(parts(tmp_path / "seconds")) == 1


def test_resume_and_its_errors(tmp_path):
    out = tmp_path / "c"
    with Corpus(out, made(), rows=2) as folder:
        for one in ROWS:
            folder.add(one)
    with pytest.raises(FileExistsError, match="--resume goes on with it, --overwrite replaces it"):
        Corpus(out, made())
    with pytest.raises(ValueError, match="it has frames = 2, not 3, weights = abc, not d"):
        Corpus(out, made(frames="3", weights="d"), resume=True)
    with pytest.raises(ValueError, match="it has frames = 2, not None"):
        Corpus(out, Manifest("parquet", {"pooled": 6, "tokens": 4}, options={"weights": "abc"}), resume=True)
    with pytest.raises(ValueError, match="widths = .*, dtype_out = float32, not float16"):
        Corpus(out, Manifest("parquet", {"pooled": 6}, "float16", made().options), resume=True)
    with pytest.raises(ValueError, match="store = parquet, not npz"):
        check(out, "npz", {}, resume=True)
    (out / f".part-000003.host.{2**22 + 1}.00.part.parquet").write_bytes(b"half")
    (out / "._pyvidx.host.3.00.part.json").write_bytes(b"half")
    with Corpus(out, made(), resume=True) as folder:
        assert folder.done == {one.path for one in ROWS} and folder.failed == 2
        assert not [name for name in os.listdir(out) if "host" in name], "what a kill left"
        with pytest.raises(ValueError, match="a path must be added once"):
            folder.add(ROWS[0])
        with pytest.raises(BlockingIOError, match="another run is writing"):
            Corpus(out, made(), resume=True)
    with Corpus(out, made(), resume=True, retry_errors=True) as folder:
        assert folder.done == {one.path for one in ROWS if one.error is None} and not folder.failed
        folder.add(row("bad.mp4"))
    found = corpus.read(out)
    assert sorted(found.paths) == sorted([o.path for o in ROWS if o.error is None] + ["bad.mp4"]) and not found.errors
    with Corpus(out, made(frames="3"), overwrite=True) as folder:
        assert not folder.done
    assert corpus.read(out).about["frames"] == "3" and corpus.read(out).pooled is None


def test_what_cannot_be_a_row_is_refused(tmp_path):
    with Corpus(tmp_path / "c", made()) as folder:
        bad = row("a")
        bad.encoding.pooled[0, 0] = torch.nan
        with pytest.raises(ValueError, match="must be finite"):
            folder.add(bad)
        with pytest.raises(ValueError, match="must have widths"):
            folder.add(Encoded("b", Encoding(None, torch.zeros(1, 6)), torch.zeros(2).double()))


@pytest.mark.parametrize("content", [
    "{", "3", "{}", '{"kind": "csv", "widths": {}}', '{"kind": "npz", "widths": 3}', "[" * 9999,
    '{"kind": "npz", "widths": {"pooled": "x"}}', '{"kind": "npz", "widths": {}, "dtype": "int8"}',
])  # fmt: skip
def test_a_damaged_manifest_is_one_error(content, tmp_path):
    (tmp_path / MANIFEST).write_text(content)
    for door in (corpus.read, corpus.load, lambda p: Corpus(p, made(), resume=True)):
        with pytest.raises(ValueError, match="must be a manifest of this version"):
            door(tmp_path)


@pytest.mark.parametrize("store", STORES)
def test_a_damaged_part_is_one_error(store, tmp_path):
    with Corpus(tmp_path, made(store), rows=3) as folder:
        for one in ROWS:
            folder.add(one)
    path = parts(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"{path.name} must be written by pyvidx encode"):
        corpus.read(tmp_path)
    with pytest.raises(ValueError, match="take it away, and --resume encodes its videos again"):
        Corpus(tmp_path, made(store), resume=True)


def test_a_scrambled_footer_names_its_part(tmp_path):
    """pyarrow says OSError of what it cannot parse."""
    with Corpus(tmp_path, made()) as folder:
        folder.add(ROWS[0])
    (path,) = parts(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:-108] + b"\xff" * 100 + content[-8:])
    with pytest.raises(ValueError, match=f"{path.name} must be a part that pyvidx encode wrote"):
        Corpus(tmp_path, made(), resume=True)


def test_folders_that_are_something_else(tmp_path):
    (tmp_path / "video.mp4").write_bytes(b"x")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="must be a new or empty folder"):
            check(tmp_path, "parquet", {}, overwrite=overwrite)
    with pytest.raises(FileExistsError, match="it is a file"):
        check(tmp_path / "video.mp4", "parquet", {})
    with pytest.raises(FileNotFoundError, match="must be a folder of pyvidx encode"):
        corpus.folder.manifest(tmp_path)
    for folder, message in ((tmp_path, "must be a folder of pyvidx encode"), (tmp_path / "new", "there is no")):
        for door in (corpus.read, corpus.load):
            with pytest.raises(FileNotFoundError, match=message):
                door(folder)
    with pytest.raises(ValueError, match="outputs must be a list, of pooled and tokens, got 'pooled'"):
        corpus.read(tmp_path, "pooled")
    with pytest.raises(ValueError, match="store must be one of"):
        check(tmp_path / "new", "csv", {})
    with pytest.raises(ValueError, match="engine must be one of"):
        engines.named("spark")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Clips of 30 and 45 frames, in turn, with a broken one among them."""
    folder = tmp_path_factory.mktemp("videos")
    write(folder / "00.mp4", drawn_clip(0.4, (48, 64)), fps=25)
    write(folder / "01.mp4", drawn_clip(0.6, (48, 64)), fps=25)
    for i in range(2, 12):
        os.link(folder / f"{i % 2:02d}.mp4", folder / f"{i:02d}.mp4")
    (folder / "05.mp4").unlink()
    (folder / "05.mp4").write_bytes(b"no video" * 100)
    return folder


@pytest.fixture(scope="module")
def model():
    return TextVideo.default().model.fold()


def test_videos_of_one_length_are_encoded_together_though_others_lie_between(videos, model):
    paths, sizes, job = sorted(map(str, videos.glob("*.mp4"))), [], {"sampler": "midpoint", "frames": 35}
    hook = model.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[:2])))
    timing = Timing()
    found = list(encode_videos(paths, model, **job, batch=5, ordered=False, timing=timing))
    hook.remove()
    assert sorted(one.path for one in found) == paths and timing.failed == 1
    assert sorted(sizes) == [(1, 30), (5, 30), (5, 35)]
    for one, alone in zip(sorted(found, key=lambda r: r.path), encode_videos(paths, model, **job)):
        assert one.error == alone.error
        if one.error is None:
            torch.testing.assert_close(one.encoding.pooled, alone.encoding.pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("store", STORES)
def test_the_command(store, videos, tmp_path, capsys, model):
    out = str(tmp_path / "out")
    given = [str(videos), "--out", out, "--frames", "3", "--batch", "2", "--store", store, "--part-rows", "5"]
    given += ["--dtype-out", "float16"]
    assert encode(given) == 1
    said = capsys.readouterr()
    assert f"wrote 12 rows to {out}" in said.out and "FAILED" in said.err and "wait" in said.out
    assert len(parts(out)) == 3
    found = corpus.read(out)
    assert len(found.paths) == 11 and list(found.errors) == [str(videos / "05.mp4")]
    (want,) = encode_videos([found.paths[3]], model, frames=3)
    torch.testing.assert_close(found.pooled[3].float(), want.encoding.pooled[0], rtol=2e-3, atol=2e-3)
    assert encode([*given, "--resume"]) == 0
    said = capsys.readouterr()
    assert "has 12 rows, 1 of them errors, which --retry-errors tries again; 0 videos to do" in said.err
    assert encode([*given, "--resume", "--retry-errors"]) == 1
    assert "has 11 rows; 1 videos to do" in capsys.readouterr().err
    assert len(corpus.read(out).errors) == 1
    for more, message in (
        ([], "--resume goes on with it"), (["--resume", "--frames", "4"], "it has frames = 3, not 4"),
        (["--resume", "--start", "0.1"], "it has start = None, not 0.1"),
        (["--resume", "--outputs", "pooled"], "outputs"),
        (["--resume", "--overwrite"], "give one of them"), (["--resume", "--compat", "official"], "compat = None, not"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            encode([*given, *more])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and message in said and said.count("\n") == 1, said


def test_a_progress_bar_counts_failures(videos, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert encode([str(videos), "--out", str(tmp_path / "out"), "--frames", "2", "--outputs", "pooled"]) == 1
    said = capsys.readouterr().err
    assert "12/12" in said and "failed=1" in said and "video/s" in said
    assert "\nFAILED" in said.replace("\r", "\n"), "on a line of its own"


def test_a_store_and_an_engine_are_one_class_each(videos, tmp_path, monkeypatch):
    class Shards(stores.Safetensors):
        suffix = ".shard"

    class Backwards(engines.Local):
        def run(self, paths, *arguments):
            return super().run(paths[::-1], *arguments)

    monkeypatch.setitem(stores.STORES, "shards", Shards())
    monkeypatch.setitem(engines.ENGINES, "backwards", Backwards())
    out = tmp_path / "out"
    words = ["--out", str(out), "--frames", "2", "--store", "shards", "--engine", "backwards", "--outputs", "pooled"]
    assert encode([str(videos), *words]) == 1
    assert [path.name for path in parts(out)] == ["part-000000.shard"] and len(corpus.read(out).paths) == 11


def test_another_model_is_refused(videos, tmp_path, capsys):
    for i in range(2):
        torch.manual_seed(i)
        model = TextVideo.default().model
        torch.nn.init.normal_(next(model.parameters()))
        model.save(tmp_path / f"{i}.safetensors")
    given = [str(videos), "--frames", "2", "--out", str(tmp_path / "out")]
    encode([*given, "--model", str(tmp_path / "0.safetensors")])
    assert encode([*given, "--model", str(tmp_path / "0.safetensors"), "--resume"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        encode([*given, "--model", str(tmp_path / "1.safetensors"), "--resume"])
    assert "must be of the same model and options to be resumed, it has weights = " in capsys.readouterr().err


@pytest.mark.parametrize("more, message", [
    (["--out", "e.npz", "--resume"], "--resume: --out must be a folder, got e.npz"),
    (["--out", "e.npz", "--store", "npz"], "--store: --out must be a folder"),
    (["--resume"], "--out must be a folder, got None"),
    (["--out", "e.npz", "--dtype-out", "bfloat16"], "--dtype-out bfloat16 cannot be kept in .npz"),
    (["--out", "new", "--dtype-out", "bfloat16"], "--dtype-out bfloat16 cannot be kept in .parquet"),
    (["--out", "e.csv"], "must end in"),
])  # fmt: skip
def test_arguments_that_do_not_fit(more, message, videos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        encode([str(videos), *more])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and said.count("\n") == 1
    assert not os.listdir(tmp_path)


def killed_encode(words, when):
    """The command in a fork, killed once `when()` holds; whether it was."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            code = encode(words)
        finally:
            os._exit(code)
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) in (0, 1)
            return False
        if when():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.001)


def test_kill_9_and_resume(videos, tmp_path):
    out = tmp_path / "out"
    words = ["--frames", "2", "--part-rows", "3", "--outputs", "pooled"]
    ours = [str(videos), "--out", str(out), *words, "--resume"]
    have = [0]

    def writing():  # a part, or one that is not whole yet
        return out.is_dir() and any(".part" in name for name in os.listdir(out)) and len(parts(out)) >= have[0]

    def written():
        return out.is_dir() and len(parts(out)) > have[0]

    for when in (lambda: (out / MANIFEST).exists(), writing, written):
        assert killed_encode(ours, when)
        have[0] = len(parts(out))
    assert encode(ours) in (0, 1)
    rows = list(corpus.iterate(out))
    assert sorted(one.path for one in rows) == sorted(map(str, videos.glob("*.mp4")))
    assert encode([str(videos), "--out", str(tmp_path / "undisturbed"), *words]) == 1
    want = {one.path: one for one in corpus.iterate(tmp_path / "undisturbed")}
    for one in rows:
        same(one, want[one.path])
    assert not [name for name in os.listdir(out) if name.startswith(".")]
    assert json.loads((out / MANIFEST).read_text())["options"]["frames"] == "2"
