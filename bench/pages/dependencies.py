"""The table of docs/dependencies.md: every package of pyproject.toml, its oldest version and its licence.

Licences are those that the installed packages state about themselves; python -m bench.pages --dependencies writes them.
"""

import importlib.metadata
import re

from packaging.requirements import Requirement

from bench.pages import ROOT
from pyvidx.bench import report

PAGE = "docs/dependencies.md"
UNSTATED = {"torchao": "BSD-3-Clause"}  # read in the licence file that it carries
TABLE = re.compile(r"^\| package \|.*?(?=^$)", re.MULTILINE | re.DOTALL)


def required() -> dict[str, tuple[str, list[str]]]:
    """Package -> its oldest version, or "any", and what needs it: "pyvidx", or extras.

    Raises:
        ValueError: two extras ask for different versions.
    """
    import tomllib  # Python 3.11

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {}
    for extra, texts in {"pyvidx": project["dependencies"], **project["optional-dependencies"]}.items():
        for one in map(Requirement, texts):
            oldest, extras = found.setdefault(one.name, (str(one.specifier) or "any", []))
            if oldest != (str(one.specifier) or "any"):
                raise ValueError(
                    f"pyproject.toml: {one.name} must have one oldest version, got {oldest}, {one.specifier}"
                )
            extras.append(extra)
    return found


def licence(package: str) -> str:
    """What an installed package states: as an expression, else as classifiers, else as text."""
    about = importlib.metadata.metadata(package)
    names = [
        c.split(" :: ")[-1] for c in about.get_all("Classifier", []) if c.startswith("License :: OSI Approved :: ")
    ]
    stated = about.get("License-Expression") or " and ".join(names) or about.get("License")
    return stated or UNSTATED.get(package, "not stated")


def table() -> str:
    """The table. All packages must be installed."""
    rows = [
        (name, f"`{oldest}`", f"`{licence(name)}`", ", ".join(extras)) for name, (oldest, extras) in required().items()
    ]
    return report.piped([("package", "version", "licence, as it states it", "for"), *rows], numbers=False) + "\n"


def page() -> str:
    """The page with its table written anew."""
    return TABLE.sub(lambda _: table(), (ROOT / PAGE).read_text(), count=1)
