"""docs/dependencies.md names every package that pyproject.toml asks for and that pyvidx imports."""

import ast
import re
import sys

import pytest

pytest.importorskip("tomllib", reason="pyproject.toml is read with Python 3.11's tomllib")

from bench.pages import ROOT, dependencies  # noqa: E402

NAMED = {"PIL": "pillow", "open_clip": "open_clip_torch"}
PAGE = (ROOT / dependencies.PAGE).read_text()


def test_the_table_is_that_of_pyproject():
    rows = [row.split(" | ") for row in dependencies.TABLE.search(PAGE)[0].removesuffix(" |\n").split(" |\n")[2:]]
    stated = {name.removeprefix("| "): (oldest.strip("`"), extras.split(", ")) for name, oldest, _, extras in rows}
    assert stated == dependencies.required(), "python -m bench.pages --dependencies writes it"
    unsaid = [name for name, _, licence, _ in rows if "not stated" in licence or len(licence) < 5]
    assert not unsaid, f"{unsaid}: what do their licences say?"


def test_a_licence_is_what_a_package_states():
    assert dependencies.licence("pytest") == "MIT"


def test_what_is_imported_is_named():
    wanted = set()
    for file in (ROOT / "pyvidx").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                wanted.add(node.module.split(".")[0])
    others = {NAMED.get(name, name) for name in wanted - {"pyvidx", *sys.stdlib_module_names}}
    assert {"torch", "pillow"} <= others
    assert not [name for name in others if not re.search(rf"\b{name}\b", PAGE)]
