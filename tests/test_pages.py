"""README and docs say what was measured: every number is a committed result's, or known to be no measurement."""

import pytest

from bench.pages import ROOT, claim, loose, result, tables, wheels, written
from bench.pages.claims import CLAIMS, SETTINGS

PAGES = ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", CLAIMS)
def test_numbers_are_those_of_their_results(name):
    page = (ROOT / name).read_text()
    assert page == written(page, CLAIMS[name]()), "python -m bench.pages writes them"


@pytest.mark.parametrize("name", PAGES)
def test_a_number_has_a_source(name):
    page = (ROOT / name).read_text()
    without = loose(page, CLAIMS.get(name, list)(), SETTINGS.get(name, []))
    assert not without, f"give these a claim in bench/pages/claims.py, or a place in its SETTINGS: {without}"
    gone = [text for text in SETTINGS.get(name, []) if " ".join(text.split()) not in " ".join(page.split())]
    assert not gone, f"SETTINGS of {name} that it does not say any more: {gone}"


def test_claims_are_of_pages():
    assert CLAIMS.keys() | SETTINGS.keys() <= set(PAGES)


TABLES = tables.pages() | wheels.pages()


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_their_results(name):
    assert (ROOT / name).read_text() == TABLES[name], "python -m bench.pages writes them"


def test_files_that_tests_run_little_of_are_named():
    page = (ROOT / "docs/contributing.md").read_text()
    shares = result("coverage-2026-11-29")["files"]
    under = [name.removeprefix("pyvidx/") for name, share in shares.items() if share < 85]
    assert under and not [name for name in under if f"`{name}`" not in page]


def test_pictures_are_small():
    drawn = list((ROOT / "docs").glob("*.png"))
    assert len(drawn) >= 3 and all(p.stat().st_size < 100 << 10 for p in drawn)


PAGE = "On a Zen 4, T = 8, it\ntakes 3.1 ms (`a-2026-11-28.json`),\n2.0x of eager, with 16 slots.\n"


@pytest.mark.parametrize("claims, known, want", [
    ([], [], ["3.1", "2.0", "16"]),
    ([claim("it takes {:.1f} ms", 3.14)], [], ["2.0", "16"]),
    ([claim("it takes {:.1f} ms", 3.14), claim("{:.1f}x of eager", 2.0)], ["16 slots"], []),
])  # fmt: skip
def test_what_has_no_source_is_found(claims, known, want):
    found = loose(PAGE, claims, known)
    assert len(found) == len(want) and all(number in line for number, line in zip(want, found))


def test_a_stale_number_is_written_anew():
    stale = [claim("it takes {:.1f} ms", 12.34), claim("{:.1f}x of eager", 1.25)]
    assert written(PAGE, stale) == PAGE.replace("3.1", "12.3").replace("2.0", "1.2")


@pytest.mark.parametrize("text, times", [("it took {:.1f} ms", 0), ("{:.1f}", 2)])
def test_a_claim_stands_once(text, times):
    with pytest.raises(ValueError, match=f"got {times} times"):
        written("it takes 3.1 ms, 2.0x", [claim(text, 1.0)])
