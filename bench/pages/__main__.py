"""python -m bench.pages: write what was measured into README and docs. The text around it stays as it is."""

from bench.pages import ROOT, written
from bench.pages.claims import CLAIMS


def main() -> None:
    for name, claims in CLAIMS.items():
        page = ROOT / name
        before = page.read_text()
        after = written(before, claims())
        if after != before:
            page.write_text(after)
            print(f"{name}: {sum(a != b for a, b in zip(before.splitlines(), after.splitlines()))} lines changed")


if __name__ == "__main__":
    main()
