"""What NVIDIA's compilers make of the kernels computes what g++ makes of them in the emulator. An emulator alone cannot
see where the two differ: an array of arrays of a struct, whose members had initial values, got them in its first row
only.

`pytest -m "not slow"` takes one dtype each to the oldest and the newest machine code.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_emu import build
from tests.op_calls import op_calls
from tests.test_predict import usable

ROOT = Path(__file__).parents[1]
# Products and sums in another order: of float32, and where they are rounded to 16 bits.
APART = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
ATTENTION = {"temporal_attention", "bank_attention", "bank_attention by a table"}
LEFT_OUT = {(70, "float16"): ATTENTION}  # on that GPU's tensor cores, which the interpreter does not know


@pytest.mark.skipif(usable() is not None, reason=str(usable()))
@pytest.mark.parametrize("arch, dtype", [
    (70, "float32"), (90, "float16"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        (70, "float16"), (80, "float32"), (80, "bfloat16"), (90, "float32"),
    ]),
])  # fmt: skip
def test_machine_code(arch, dtype):
    library = str(build.ops_library("plain"))
    env = os.environ | {"PYVIDX_OPS_LIBRARY": library, "PYVIDX_STRICT": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.sass_calls", library, str(arch), dtype]
    run = subprocess.run(command, cwd=ROOT, env=env | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found = {row["op"]: row for row in map(json.loads, run.stdout.splitlines())}
    assert {*found} == {*op_calls("cpu")}
    left_out = LEFT_OUT.get((arch, dtype), set())
    assert {op: row["left out"] for op, row in found.items() if "left out" in row} == dict.fromkeys(left_out, "HMMA")
    apart = {op: row["apart"] for op, row in found.items() if op not in left_out}
    print(apart)
    assert all(found[op]["kernels"] for op in apart)
    assert {op: a for op, a in apart.items() if a > APART[dtype]} == {}
