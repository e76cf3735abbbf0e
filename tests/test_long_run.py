"""Streams stay flat: what bench/long_run.py measures over thousands of frames, over some dozens here."""

import pytest

from bench.long_run import main

FLAT_MIB = 16  # allocators keep some; one more M = 20 bank of the real model would be 30


@pytest.mark.parametrize(
    "size", [["--small", "--frames", "300"], pytest.param([], marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
)
def test_a_stream_holds_its_memory(size):
    rows = main(["memory", *size])["rows"]
    full, *_, last = rows[1:]
    assert last["resident_mib"] < full["resident_mib"] + FLAT_MIB, rows


@pytest.mark.parametrize("size", [["--small", "--frames", "200"], pytest.param([], marks=pytest.mark.slow)])
def test_a_video_streams_in_flat_memory(size):
    pytest.importorskip("av", reason="reading video needs PyAV: pip install 'pyvidx[video]'")
    rows = main(["video", *size])["rows"]
    assert rows[-1]["resident_mib"] < rows[0]["resident_mib"] + FLAT_MIB, rows


@pytest.mark.parametrize("size", [["--small", "--frames", "100"], pytest.param([], marks=pytest.mark.slow)])
def test_drift_of_16_bit_banks(size):
    """Where the same entries merged, a 16-bit bank is off by the rounding of its entries, however long the stream."""
    result = main(["drift", *size])
    rounding = {"float16": 2e-3, "bfloat16": 1.6e-2}
    for bank in result["banks"]:
        assert all(error < rounding[bank["bank"]] for error in bank["relative_error"].values()), bank
    kept = [row for row in result["tokens"] if row["bank"] == "float32"]
    assert kept and all(row["max"] < 10 * rounding[row["weights"]] for row in kept), kept


@pytest.mark.parametrize("size", [["--small", "--frames", "20"], pytest.param([], marks=pytest.mark.slow)])
def test_a_clip_gives_the_official_tokens_on_both_paths(size):
    for row in main(["clip", *size])["rows"]:
        for path in ("stream", "clip"):
            # Consecutive query states are so alike that rounding decides some merges.
            assert row[path]["difference"] < 2e-3, row
